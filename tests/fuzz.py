"""A stateful fuzzer: random lives of an optimizer, all that it offers in any order, against NumPy.

A life is an optimizer, its twin in NumPy (`twin.py`) and what the caller keeps; its operations are
public calls, valid and not, and what a caller may do to arrays and dictionaries in between. Before
each call the fuzzer says whether it must be refused, and with what. After it the bits of
every array, the counts and the options are compared; a call that was refused has changed nothing.

    python tests/fuzz.py [--operations 1000000] [--seed 0] [--length 60]
    python tests/fuzz.py --life 17 [--only 3,8,20]

The second form runs one life again, and of it only the operations named: what the first prints for
a life that went wrong, after leaving out whatever it goes wrong without.
"""
from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import math
import pickle
import random
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from twin import OPTIONS, Twin, alike, leaves, like, number_now

import optcore
from optcore._state import STATE_VERSION
from optcore.runtime import always_threaded, simd, simd_levels_available
from reference import (
    BFLOAT16,
    FRACTION_BITS,
    LINEAR,
    Options,
    rounded,
    type_name,
    widened,
)

DTYPES = {"float32": np.dtype(np.float32), "float64": np.dtype(np.float64),
          "float16": np.dtype(np.float16), "bfloat16": BFLOAT16}
IN_FLOAT32 = ["float32", "float16", "bfloat16"]     # are stepped so
SHAPES = [(), (0,), (1,), (7,), (33,), (3, 5), (5, 3), (4, 3, 2), (2, 0, 3), (300,), (40, 30)]
RARE_SHAPES = [(8193,), (100, 90)]          # of more than one chunk
NUMBERS = ["lr", "momentum", "dampening", "weight_decay", "clip_value"]
FLAGS = ["maximize", "decoupled_weight_decay", "lr_in_velocity", "flush_subnormals", "nesterov",
         "dampen_first"]
CHOICES = {"master": ["auto", None, "split", "float32"], "rounding": ["stochastic", "nearest"],
           "velocity_dtype": [None, "float32", "bfloat16"], "lazy": ["exact", "rows"]}
LASTING = ["lr_in_velocity", "master", "velocity_dtype"]
RECORDED = [*OPTIONS, "nesterov", "lr_in_velocity"]
DEFAULTS = {name: getattr(Options(), name, False) for name in RECORDED} | {
    "lr": None, **{name: values[0] for name, values in CHOICES.items()}}
SETTINGS = ["max_norm", "skip_nonfinite", "track_grad_norm", "ema_decay", "seed"]
LEVELS = simd_levels_available()


NOTHING = object()          # what an operation returns that had nothing to do


class MismatchError(AssertionError):
    """The optimizer is not what its twin is."""


def agree(condition, what):
    if not condition:
        raise MismatchError(what)


@dataclass(frozen=True)
class Wave:
    """A schedule that copies and pickles equal."""

    values: tuple

    def __call__(self, count):
        return self.values[count % len(self.values)]


# What is refused

def number_refusal(name, value, as_float32=False):
    """What a number is refused with; None for one that is taken."""
    if isinstance(value, (bool, np.bool_, str, bytes, complex, list, type(None))) or (
        isinstance(value, np.ndarray) and value.size != 1
    ):
        return TypeError
    try:
        x = float(value)
    except OverflowError:
        return ValueError
    if not 0 <= x < math.inf or (x == 0 and name == "grad_scale") or (
        x >= 1 and name in ("momentum", "dampening", "ema_decay")
    ):
        return ValueError
    if not as_float32:
        return None
    rounded = float(np.float32(x))
    if math.isinf(rounded) or (rounded == 0) != (x == 0) or (
        rounded == 1 and name in ("momentum", "ema_decay")
    ):
        return ValueError
    return None


def types_of(arrays):
    return {type_name(a) for a in arrays}


def storage_refusal(group, types):
    """What a group's choices are refused with, beside parameters of these types."""
    for name, among in CHOICES.items():
        value = group[name]
        if not isinstance(value, (str, type(None))) or value not in among:
            return ValueError if isinstance(value, str) else TypeError
    halves = types & {*FRACTION_BITS}
    if (
        (group["master"] == "split" and halves != {"bfloat16"})
        or (group["master"] == "float32" and not halves)
        or (group["velocity_dtype"] is not None and "float64" in types)
    ):
        return ValueError
    return None


def group_refusal(group, types, max_norm, count=None):
    """What a group's options are refused with: as they are set, or by the step of a count."""
    values = {}
    in_float32 = not types <= {"float64"}
    for name in RECORDED:
        value = group[name]
        if name in FLAGS:
            if not isinstance(value, (bool, np.bool_)):
                return TypeError
        else:
            if callable(value):
                value = value(count) if count is not None else {"momentum": 0.5, "lr": 0.0}.get(
                    name, DEFAULTS[name])       # until a step asks
            if name == "clip_value" and value is None:
                values[name] = None
                continue
            refusal = number_refusal(name, value)
            if refusal:
                return refusal
            value = float(value)
        values[name] = value
    refusal = storage_refusal(group, types)
    if refusal:
        return refusal
    if in_float32 and any(
        values[name] is not None and number_refusal(name, values[name], True) for name in NUMBERS
    ):
        return ValueError
    has_momentum = values["momentum"] > 0
    if values["dampening"] and (
        not has_momentum or values["nesterov"] or values["lr_in_velocity"]
    ):
        return ValueError
    if values["nesterov"] and not has_momentum:
        return ValueError
    if values["clip_value"] is not None and max_norm is not None:
        return ValueError
    if values["decoupled_weight_decay"]:
        shrink = 1 - values["lr"] * values["weight_decay"]
        if not math.isfinite(shrink) or (in_float32 and np.isinf(np.float32(shrink))):
            return ValueError
    return None


def plain(value):
    """What a state dictionary has for an option: Python's numbers, None for a schedule."""
    if value is None or callable(value):
        return None
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    return value if isinstance(value, str) or type(value) is int else float(value)


# Where values come from

def pools(dtype):
    """Gradients and parameters to cut from: harmless ones, ends of the range, no numbers."""
    rng = np.random.default_rng(20170425)
    info = np.finfo(dtype)
    usual = rng.standard_normal(20_000).astype(dtype)
    ends = np.array([0.0, -0.0, info.tiny, -info.tiny, info.smallest_subnormal,
                     -info.smallest_subnormal, info.tiny / 3, info.max / 8, -info.max / 8,
                     info.eps, 1, -1, math.sqrt(info.max), math.sqrt(info.tiny)], dtype)
    odd = np.array([np.nan, np.inf, -np.inf, info.max, -info.max], dtype)
    finite = np.where(rng.random(20_000) < 0.3, rng.choice(ends, 20_000), usual)
    any_at_all = np.where(rng.random(20_000) < 0.02, rng.choice(odd, 20_000), finite)
    return {"usual": usual, "finite": finite.astype(dtype), "any": any_at_all.astype(dtype)}


POOLS = {name: pools(DTYPES[name]) for name in ("float32", "float64")}
POOLS |= {name: {kind: rounded(pool, name) for kind, pool in POOLS["float32"].items()}
          for name in FRACTION_BITS}


def places(nest):
    """Yield the container and key of every leaf, with those of tuples."""
    for key, item in nest.items() if isinstance(nest, dict) else enumerate(nest):
        if isinstance(item, (dict, list, tuple)):
            yield from places(item)
        else:
            yield nest, key


def misaligned(a):
    memory = np.zeros(a.nbytes + 1, np.uint8)
    return np.ndarray(a.shape, a.dtype, buffer=memory, offset=1)


def arrays_of(gradient):
    """What a gradient consists of."""
    if isinstance(gradient, optcore.Rows):
        return gradient.indices, gradient.values
    return () if gradient is None else (gradient,)


def flaws(refusal):
    """One that may be several as a list."""
    return refusal if isinstance(refusal, tuple) else (refusal,)


class Life:
    """An optimizer, its twin, the caller's containers, and what may be done with them.

    `trees` are parameters as they were given, `bound` and `own` gradients and velocities, each a
    list of what came at the beginning and with each group since. `groups` and `settings` are the
    options that the optimizer must have.
    """

    def __init__(self, seed, folder=None):
        self.seed, self.folder = seed, folder
        self.random = random.Random(f"life {seed}")
        self.n_names = self.n_refused = 0
        self.snapshots = []
        self.level = self.one_of(*LEVELS)
        self.n_threads = self.one_of(*[1] * 30, 2, 3)
        optcore.set_num_threads(self.n_threads)
        self.types = self.one_of(
            ["float32"], ["float64"], ["float32", "float64"], ["bfloat16"], ["float16"], IN_FLOAT32,
            [*DTYPES])
        self.mixes = self.chance()      # gradients of other types than their parameters'
        self.by_rows = self.chance(0.6)     # gradients of some rows are among them
        self.mood = self.one_of("usual", "usual", "finite", "any")
        self.named = self.chance(0.7)
        self.trees = [self.new_tree() for _ in range(self.one_of(1, 1, 2))]
        grouped = len(self.trees) > 1 or self.chance(0.3)
        self.whole = not grouped       # gradients come as the one tree does
        # A later group takes what this one has: no array, which two optimizers would share.
        given = {**self.options(kinds=(np.float64, np.float32)), **self.storage(self.trees[0])}
        groups = [{**given, **({**self.options(), **self.storage(tree)} if k else {})}
                  for k, tree in enumerate(self.trees)]
        self.kept = {}          # types of velocities by the parameter's id
        for tree, group in zip(self.trees, groups, strict=True):
            self.keep(tree, group)
        self.max_norm_beside(groups)
        bound = [self.map_trees(self.bindable)] if self.chance(0.4) else []
        bound = [part for part in bound if part is not None]    # None: that none were given
        own = []
        if self.chance(0.3) and all(group["momentum"] != 0 for group in groups):
            own = [self.map_trees(self.velocity)]
        params = [{"params": tree, **(group if k else {})}
                  for k, (tree, group) in enumerate(zip(self.trees, groups, strict=True))]
        params = params if grouped else self.trees[0]
        arguments = {**given, **self.settings, "grads": bound[0] if bound else None,
                     "velocities": own[0] if own else None}
        if self.chance(0.3):
            self.build_badly(params, arguments)
        self.opt = optcore.SGD(params, **arguments)
        self.defaults, self.groups, self.bound, self.own = given, groups, bound, own
        self.lends = bool(own)      # whether `own` is what the optimizer was given, and looks at
        self.twin = Twin(self.opt, leaves(own) or None)
        self.twin.norm, self.twin.nonfinite = None, []

    # Drawing

    def chance(self, p=0.5):
        return self.random.random() < p

    def one_of(self, *things):
        return things[self.random.randrange(len(things))]

    def options(self, clip=True, kinds=(np.float64, np.float32, np.asarray)):
        """Options of a group that go together; numbers are of any kind."""
        def dressed(value):
            return self.one_of(*kinds)(value) if self.chance(0.1) else value

        momentum = self.one_of(0.9, 0.9, 0.5, np.float32(0.9), Wave((0.5, 0.25, 0.9)), 0.0)
        has_momentum = not isinstance(momentum, float) or momentum > 0
        nesterov, right = has_momentum and self.chance(0.3), self.chance(0.3)
        damped = has_momentum and not nesterov and not right
        return {
            "lr": self.one_of(dressed(0.05), 1, 0.0, 0.3, Wave((0.5, 0.25))),
            "momentum": momentum,
            "weight_decay": self.one_of(0.0, 0, dressed(0.01), Wave((0.0, 0.5, 0.125))),
            "maximize": self.chance(), "decoupled_weight_decay": self.chance(),
            "flush_subnormals": self.one_of(True, False, np.True_), "nesterov": nesterov,
            "lr_in_velocity": right, "dampen_first": self.chance(),
            "dampening": self.one_of(0.0, 0.3, Wave((0.0, 0.9))) if damped else 0.0,
            "clip_value": self.one_of(None, None, 0.5, 0.0, Wave((0.5, 1e-3))) if clip else None,
        }

    def storage(self, tree):
        """Choices of a group that its parameters can have."""
        types = types_of(leaves(tree))
        while True:
            drawn = {name: self.one_of(*values) for name, values in CHOICES.items()}
            if storage_refusal(drawn, types) is None:
                return drawn

    def keep(self, tree, group):
        for p in leaves(tree):
            self.kept[id(p)] = self.velocity_type(p, group)

    def velocity_type(self, p, group):
        return group["velocity_dtype"] or ("float64" if p.dtype == np.float64 else "float32")

    def max_norm_beside(self, groups):
        clips = any(group["clip_value"] is not None for group in groups)
        self.settings = {
            "max_norm": None if clips else self.one_of(None, None, 1.0, 0.0, 1e3),
            "skip_nonfinite": self.chance(), "track_grad_norm": self.chance(),
            "ema_decay": self.one_of(None, None, 0.9, 0.0, Wave((0.5, 0.75))),
            "seed": self.one_of(0, 7, 2**64 - 1),
        }

    def values(self, shape, name):
        kind = self.mood if self.chance(0.3) else "usual"
        size = math.prod(shape)
        first = self.random.randrange(20_001 - size)
        return POOLS[name][kind][first : first + size].reshape(shape)

    def array(self):
        shape = self.one_of(*RARE_SHAPES) if self.chance(0.004) else self.one_of(*SHAPES)
        return np.array(self.values(shape, self.one_of(*self.types)), order=self.one_of("C", "F"))

    def new_tree(self, depth=0):
        """A nest with names, or a list, a tuple or a bare array without."""
        if not self.named and self.chance(0.2):
            return self.array()
        items = [
            self.new_tree(depth + 1) if self.named and depth < 2 and k and self.chance(0.3)
            else self.array() for k in range(self.random.randrange(depth == 0, 4))
        ]
        if self.named and (depth == 0 or self.chance()):
            self.n_names += len(items)
            return {f"p{self.n_names - k}": item for k, item in enumerate(items)}
        return items if self.chance() else tuple(items)

    def map_trees(self, make):
        """`make` of every parameter, in the structure that gradients have."""
        if self.whole:
            return like(self.trees[0], make)
        mapped = [like(tree, make) for tree in self.trees]
        if self.named:
            return {key: item for tree in mapped for key, item in tree.items()}
        return leaves(mapped)

    def laid(self, values, p, layout):
        """The values in an array that lies in one of the ways of NumPy's idioms."""
        order = "F" if p.flags.fnc else "C"
        if layout == "strided":
            wide = np.empty((*values.shape, 2), values.dtype)
            wide.view(np.uint8)[...] = 0xFF         # NaN
            wide[..., 1] = values
            return wide[..., 1]
        if layout == "reversed" and values.ndim:
            return np.array(values[::-1])[::-1]
        if layout == "scalar" and not values.ndim and type_name(values) != "bfloat16":
            return values[()]
        if layout == "read-only":
            values = np.array(values, order=order)
            values.flags.writeable = False
            return values
        return np.array(values, order={"C": "F", "F": "C"}[order] if layout == "other" else order)

    def gradient(self, p, *, bound=False):
        if self.chance(0.1):
            return None
        more = ["scalar"] if bound else ["scalar", "read-only"]
        return self.laid(self.values(p.shape, self.type_beside(p)), p, self.one_of(
            "as p", "as p", "as p", "other", "strided", "reversed", *more))

    def given(self, p):
        """A gradient that a step is given: Rows may be among those."""
        if not self.by_rows or self.chance(0.4) or self.rows_refusal(p):
            return self.gradient(p)
        return self.rows(p)

    def rows(self, p):
        k = self.one_of(0, 1, 1, 2, 3, 3 * len(p)) % 100 if len(p) else 0
        indices = [self.random.randrange(len(p)) for _ in range(k)]
        return optcore.Rows(
            self.one_of(np.array(indices, np.int32), np.array(indices, np.int64), indices),
            self.laid(self.values((k, *p.shape[1:]), self.type_beside(p)), p,
                      self.one_of("as p", "strided", "reversed", "read-only")))

    def rows_refusal(self, p):
        """What Rows for p are refused with."""
        i = self.index_of(p)
        group = self.groups[self.group_of(i)]
        if not p.ndim or not p.flags.c_contiguous or (group["lazy"] == "exact" and (
            self.settings["ema_decay"] is not None or group["velocity_dtype"] == "bfloat16"
            or (type_name(p) in FRACTION_BITS and self.twin.masters[i] is None)
        )):
            return ValueError
        # Here values that were written beside the master's would be late too
        return AssertionError if i in self.twin.before else None

    def index_of(self, p):
        return next(k for k, q in enumerate(self.live) if q is p)

    def group_of(self, i):
        return [g for g, group in enumerate(self.opt.param_groups) for _ in group["params"]][i]

    def type_beside(self, p):
        """Of a gradient."""
        if self.mixes and p.dtype != np.float64:
            return self.one_of(*IN_FLOAT32)
        return type_name(p)

    def bindable(self, p):
        return self.gradient(p, bound=True)

    def velocity(self, p):
        kept = self.kept[id(p)]
        return self.one_of(None, np.zeros_like(p, DTYPES[kept]), np.array(self.laid(
            self.values(p.shape, kept), p, "as p")))

    def shuffled(self, nest):
        """The nest with the keys of its mappings in another order."""
        if isinstance(nest, dict):
            keys = list(nest)
            self.random.shuffle(keys)
            return {key: self.shuffled(nest[key]) for key in keys}
        if isinstance(nest, (list, tuple)):
            return type(nest)(map(self.shuffled, nest))
        return nest

    # What must be

    @property
    def live(self):
        return self.twin.live

    def types_of_group(self, g):
        return types_of(self.opt.param_groups[g]["params"])

    @property
    def any_float32(self):
        return any(p.dtype != np.float64 for p in self.live)

    def names(self):
        return [name for group in self.opt.param_groups
                for name in group["param_names"] or [None] * len(group["params"])]

    def groups_refusal(self, groups=None, count=None, max_norm="as set"):
        """What a change of the groups is refused with, or the next step for their sake."""
        for g, group in enumerate(self.groups if groups is None else groups):
            refusal = group_refusal(group, self.types_of_group(g), self.settings["max_norm"]
                                    if max_norm == "as set" else max_norm, count)
            if refusal is None and any(group[name] != self.groups[g][name] for name in LASTING):
                refusal = ValueError
            if refusal:
                return refusal
        return None

    def settle(self):
        """Have all rows up to date, and the twin go on from there."""
        self.twin.settle(strictly=self.mood == "usual")

    def check(self):
        if self.twin.late and self.chance(0.2):
            self.settle()
        self.twin.check(None if self.chance(0.25) else self.opt._state)
        for i, (v, w) in enumerate(zip(leaves(self.own), self.twin.velocities, strict=False)):
            there = self.twin.promised(i)
            agree(v is None or alike(v[there], w[there]), "a velocity of the caller's")
        groups = self.opt.param_groups
        for group, expected in zip(groups, self.groups, strict=True):
            for name, value in expected.items():
                agree(group[name] is value or group[name] == value, f"{name}: {group[name]!r}")
        for name, value in self.settings.items():
            agree(getattr(self.opt, name) == value, f"{name}: {getattr(self.opt, name)!r}")
        agree(repr(self.opt.grad_norm) == repr(self.twin.norm), f"norm {self.opt.grad_norm}")
        if self.twin.nonfinite or self.opt.nonfinite_params:
            names = self.names()
            agree(self.opt.nonfinite_params == [i if names[i] is None else names[i]
                                                for i in self.twin.nonfinite], "nonfinite_params")

    def seen(self, *more):
        """All that a call that is refused may not change."""
        opt = self.opt
        arrays = leaves([self.trees, self.bound, self.own, *more])
        for entry in opt._state:
            arrays += entry.values()
        return [
            [a.tobytes() if isinstance(a, (np.ndarray, np.generic)) else repr(a) for a in arrays],
            [[(key, id(value)) for key, value in group.items()] if isinstance(group, dict)
             else group for group in opt.param_groups],
            opt.step_count, opt.skipped, repr(opt.grad_norm), opt.nonfinite_params,
            [repr(getattr(opt, name)) for name in SETTINGS],
        ]

    def attempt(self, refusals, call, *more):
        """Call; where one of the refusals is due, see that one comes, and that nothing changes."""
        refusals = tuple(filter(None, refusals))
        if not refusals:
            return call()
        before = self.seen(*more)
        for _ in range(self.one_of(1, 1, 2)):
            try:
                call()
            except refusals:
                pass
            else:
                raise MismatchError(f"was not refused with {refusals}")
            agree(self.seen(*more) == before, "a refused call has changed something")
        self.n_refused += 1
        return None

    # What is wrong

    def nonempty(self):
        found = [p for p in self.live if p.size]
        return self.one_of(*found) if found else None

    def wrong_array(self, p, kinds=()):
        """What cannot be a gradient, a velocity or a saved array of p's, and its refusal."""
        other = np.float32 if p.dtype == np.float64 else np.float64
        found = [
            (p.astype(other), TypeError), (p.astype(np.uint16), TypeError),
            (np.zeros(p.shape, np.int64), TypeError), (p.astype(np.complex64), TypeError),
            (p.astype(p.dtype.newbyteorder()), TypeError), (np.ma.masked_array(p, True), TypeError),
            (frozenset(), TypeError), ("gradient", TypeError),
            (np.zeros((*p.shape, 2), p.dtype), ValueError), *kinds,
        ]
        if p.ndim > 1:
            found.append((np.zeros(p.size, p.dtype), ValueError))
            found.append((np.zeros((*p.shape[:-1], p.shape[-1] + 1), p.dtype), ValueError))
        return self.one_of(*found)

    def wrong_gradients(self):
        """Gradients that are refused, and with what."""
        p = self.nonempty()
        if p is None or self.chance(0.3):
            return self.wrong_structure()
        entry = self.opt._state[self.index_of(p)]
        taken = [(entry[key], ValueError) for key in ("velocity", "ema") if entry[key] is not None]
        wrong, refusal = self.wrong_array(p, [
            (p, ValueError), (p[...], ValueError), (misaligned(p), ValueError), *taken])
        return self.map_trees(lambda q: wrong if q is p else np.zeros_like(q)), refusal

    def wrong_rows(self, p):
        """Rows that are refused for p, and with what."""
        n, values = len(p), np.zeros((2, *p.shape[1:]), p.dtype)
        other = np.float32 if p.dtype == np.float64 else np.float64
        wrong, refusal = self.one_of(
            (([0, n], values), IndexError), (([-1, 0], values), IndexError),
            (([0, 2**31 - 1], values), IndexError), (([2**63 - 1, 0], values), IndexError),
            (([0, 0], values[..., None]), ValueError), (([0, 0], values.astype(other)), TypeError),
            (([0, 0], values.astype(np.int64)), TypeError), (([0] * n, p), ValueError))
        return optcore.Rows(*wrong), (refusal, self.rows_refusal(p))

    def wrong_structure(self):
        grads = self.map_trees(np.zeros_like)
        if isinstance(grads, dict):
            keys = list(grads)
            return self.one_of(
                ({key: grads[key] for key in keys[1:]}, ValueError),
                ({**grads, "new": np.zeros(3)}, ValueError), ({}, ValueError),
                (list(grads.values()), TypeError), (None, TypeError), ("grads", TypeError))
        if isinstance(grads, np.ndarray):
            return self.one_of(([grads], TypeError), (None, ValueError))
        return self.one_of(
            ([*grads, np.zeros(3)], ValueError), (list(grads)[1:], ValueError),
            (dict(enumerate(grads)), TypeError), (None, TypeError), (set(), TypeError))

    def arguments(self, n_sets=1, *, wrong=True):
        """Keywords of a step, and what they are refused with."""
        scale, refusal = self.scaling(n_sets, wrong=wrong)
        zero = self.one_of(False, False, False, True, np.True_)
        if wrong and self.chance(0.03):
            zero = self.one_of(1, None, "no")
        return zero, scale, refusal if isinstance(zero, (bool, np.bool_)) else TypeError

    def scaling(self, n_sets=1, *, wrong=True):
        """A step's grad_scale, and what it is refused with."""
        scale = self.one_of(1.0, 1.0, 1, 0.25, np.float32(0.5), 1 / 3)
        if wrong and self.chance(0.04):
            scale = self.one_of(0, -1, math.nan, math.inf, "1", True, None, 1e-300, 1e300,
                                np.ones(2), 1j)
        refusal = number_refusal("grad_scale", scale)
        if refusal is None and float(scale) / n_sets != 1:
            refusal = number_refusal("grad_scale", float(scale) / n_sets, self.any_float32)
        return scale, refusal

    def wrong_option(self, name):
        if name in FLAGS:
            return self.one_of(1, 0, None, "True", [])
        if name in CHOICES:
            return self.one_of("half", "int4", 8, np.int8, np.ones(2), *CHOICES[name])
        return self.one_of(-1, math.nan, math.inf, True, "0.1", 1j, np.ones(2), [0.1], 1e-50, 1e300,
                           1 - 1e-9, 1.0, None, 10**400)

    def build_badly(self, params, arguments):
        """Constructors that are refused leave what they were given as it was."""
        before = [a.tobytes() for a in leaves([self.trees, arguments["grads"],
                                               arguments["velocities"]]) if a is not None]
        p = next((p for p in leaves(self.trees) if p.size), None)
        name = self.one_of(*NUMBERS, *FLAGS, *CHOICES, *SETTINGS[:4])
        value = self.wrong_option("maximize" if name in SETTINGS[1:3] else name)
        types = types_of(leaves(self.trees[0]))
        if name in SETTINGS[1:3]:
            refusal = TypeError
        elif name in SETTINGS:
            refusal = None if value is None else number_refusal(name, value)
        else:
            refusal = group_refusal({**arguments, name: value}, types, self.settings["max_norm"])
        changed = {**arguments, name: value} if refusal else {**arguments, "lr": None}
        bad = [(params, changed, (refusal or TypeError,))]
        if p is not None:
            wrong, refusal = self.one_of(
                (p.astype(np.uint16), TypeError), (np.ma.masked_array(p), TypeError),
                (misaligned(p), ValueError), (np.zeros((4, 4), p.dtype)[::2, ::2], ValueError),
                (p.astype(p.dtype.newbyteorder()), TypeError), (np.float64(3), TypeError))
            bad += [
                ([p, wrong], {"lr": 0.1}, (refusal,)), ([p, p], {"lr": 0.1}, (ValueError,)),
                ([p, p[...]], {"lr": 0.1}, (ValueError,)),
                ({"a": p}, {"lr": 0.1, "grads": {"b": p.copy()}}, (ValueError,)),
                ({"a": p}, {"lr": 0.1, "grads": {"a": p}}, (ValueError,)),
                ({"a": p}, {"lr": 0.1, "velocities": {"a": np.array(widened(p))}}, (ValueError,)),
                ({"a": p}, {"lr": 0.1, "momentum": 0.5, "velocities": {"a": p}},
                 (TypeError if type_name(p) in FRACTION_BITS else ValueError,)),
                ([{"params": [p]}, {"lr": 0.1}], {"lr": 0.1}, (ValueError,)),
                ([{"params": [p], "learning_rate": 1}], {"lr": 0.1}, (TypeError,)),
                ({"params": p, "lr": 0.1}, {}, (TypeError,)),
                (p, {"lr": 0.1, "clip_value": 1.0, "max_norm": 1.0}, (ValueError,)),
            ]
        given, options, refusals = self.one_of(*bad, ([], {"lr": 0.1}, (ValueError,)),
                                               ("params", {"lr": 0.1}, (TypeError,)))
        try:
            optcore.SGD(given, **options)
        except refusals:
            self.n_refused += 1
        else:
            raise MismatchError(f"SGD({given!r}, **{options!r}) was not refused with {refusals}")
        agree(before == [a.tobytes() for a in leaves([self.trees, arguments["grads"],
                                                      arguments["velocities"]]) if a is not None],
              "a refused constructor has changed an array")

    # What may happen

    def applied(self, step, grads, follow, flaw=None, n_sets=1):
        """Take a step in the way given, and the twin's after it; or be refused, without any."""
        given = leaves(grads)
        zero, scale, wrong = self.arguments(n_sets, wrong=flaw is None)
        refusals = [wrong, self.groups_refusal(count=self.twin.count), *flaws(flaw)]
        if not flaw:
            kept = copy.deepcopy(given)
            refusals += [ValueError] * all(g is None for g in given)
            if zero is not False:
                refusals += self.unwritable(given)
        done = self.attempt(refusals, lambda: step(grad_scale=scale, zero_grad=zero),
                            [] if flaw else grads)
        if any(refusals):
            return
        agree(done is follow(kept, float(scale)), "whether the step was skipped")
        self.check_given(given, kept, zero)

    def check_given(self, given, kept, zeroed):
        for g, before in zip(given, kept, strict=True):
            for a, b in zip(*map(arrays_of, (g, before)), strict=True):
                agree(not a.any() if zeroed else alike(a, b), "a given gradient")

    def unwritable(self, given):
        """What those that are to be written are refused with."""
        return [error for g in given for a in arrays_of(g)
                for error in ([TypeError] if g is not a else [ValueError] * (
                    not a.flags.writeable) + [TypeError] * isinstance(a, np.generic))]

    def step(self):
        flaw = None
        grads = self.map_trees(self.given)
        if self.chance(0.12):
            grads, flaw = self.wrong_gradients()
        order = grads if flaw else self.shuffled(grads)
        self.applied(lambda **more: self.opt.step(order, **more), grads, self.twin.step, flaw)

    def rows_badly(self):
        """Rows that are wrong, or come where whole gradients must."""
        p = self.nonempty()
        if p is None or not p.ndim:
            return NOTHING
        opt, zeros = self.opt, self.map_trees(np.zeros_like)
        rows, refusals = optcore.Rows([0], np.zeros((1, *p.shape[1:]), p.dtype)), (TypeError,)
        way = self.random.randrange(8)
        if way < 2:
            rows, refusals = self.wrong_rows(p)
        grads = self.map_trees(lambda q: rows if q is p else np.zeros_like(q))

        def inside(piece):
            with piece as part:
                part.add(grads)

        call = [lambda: opt.step(grads), lambda: opt.step_replicas([grads, grads]),
                lambda: opt.step_replicas([grads, zeros]), lambda: opt.step(grads, zero_grad=True),
                lambda: opt.outer_step([grads]), lambda: opt.accumulate(grads),
                lambda: inside(opt.accumulating()), lambda: inside(opt.collecting())][way]
        others = [self.rows_refusal(p), self.groups_refusal(count=self.twin.count),
                  RuntimeError if self.bound == [] else ValueError if way == 5 else None,
                  self.measures if way == 6 else None,
                  ValueError if way == 6 and any(map(self.cannot_fold, self.groups)) else None,
                  ValueError if way == 7 else None]     # by the options of the last step
        self.attempt([*refusals, *others], call, zeros)
        return None

    def step_shared(self):
        """Gradients in one memory: read as they are, but not zeroed."""
        pair = [p for p in self.live if p.size][:2]
        if len(pair) < 2 or len(types_of(pair)) > 1:
            return NOTHING
        memory = np.array(self.values((sum(p.size for p in pair),), type_name(pair[0])))
        second = self.one_of(0, pair[0].size - 1)
        cut = [memory[: pair[0].size], memory[second : second + pair[1].size]]
        shared = {id(p): g.reshape(p.shape, order="F" if p.flags.fnc else "C")
                  for p, g in zip(pair, cut, strict=True)}
        grads = self.map_trees(lambda q: shared.get(id(q)))
        kept = [None if g is None else g.copy() for g in leaves(grads)]
        refusals = [self.groups_refusal(count=self.twin.count)]
        if self.chance():
            self.attempt([ValueError, *refusals], lambda: self.opt.step(grads, zero_grad=True),
                         grads)
        done = self.attempt(refusals, lambda: self.opt.step(grads), grads)
        agree(any(refusals) or done is self.twin.step(kept), "whether the step was skipped")
        return None

    def step_bound(self):
        """A step of bound gradients, some filled anew and some rebound."""
        if not self.bound:
            self.attempt([TypeError], self.opt.step)
            return
        at = [place for part in self.bound for place in self.places_of(part)]
        for p, (container, key) in zip(self.live, at, strict=True):
            if container is None or isinstance(container, tuple) or self.chance(0.4):
                continue
            new, old = self.bindable(p), container[key]
            if self.chance() or isinstance(old, np.generic) or old is None or new is None:
                container[key] = new
            else:
                old[...] = new
        if self.chance(0.1):
            self.rebind_badly(at)
        self.applied(self.opt.step, self.bound, self.twin.step)

    def places_of(self, nest):
        return [(None, None)] if isinstance(nest, (np.ndarray, np.generic, type(None))) else (
            list(places(nest)))

    def rebind_badly(self, at):
        """Put something else in the place of a bound gradient for a moment."""
        p = self.nonempty()
        if p is None:
            return
        container, key = next(place for q, place in zip(self.live, at, strict=True) if q is p)
        if container is None or isinstance(container, tuple):
            return
        old = container[key]
        container[key], refusal = self.wrong_array(p, [
            (p, ValueError), (self.laid(np.zeros_like(p), p, "read-only"), ValueError)])
        call = self.one_of(self.opt.step, self.opt.zero_grad)
        self.attempt([refusal, call == self.opt.step and self.groups_refusal(
            count=self.twin.count)], call)
        container[key] = old

    def accumulate(self):
        if self.chance(0.7):
            self.bind_like_params()
        bound, params = leaves(self.bound), self.live
        grads, flaw = self.map_trees(self.gradient), None
        if not self.bound:
            flaw = RuntimeError
        elif not all(g is None or (
            isinstance(g, np.ndarray) and (
                (g.flags.c_contiguous and p.flags.c_contiguous)
                or (g.flags.f_contiguous and p.flags.f_contiguous))
        ) for g, p in zip(bound, params, strict=True)) or any(
            g is not None and b is None for g, b in zip(leaves(grads), bound, strict=True)
        ):
            flaw = ValueError
        elif self.chance(0.1):
            grads, flaw = self.wrong_gradients()
            if grads is None and isinstance(self.map_trees(np.zeros_like), np.ndarray):
                flaw = None
            elif any(b is None for b in bound):
                flaw = (flaw, ValueError)
        elif self.chance(0.1):
            p = self.nonempty()
            i = next((k for k, q in enumerate(params) if q is p), None)
            if i is not None and bound[i] is not None:
                grads = self.map_trees(lambda q: bound[i] if q is p else None)
                flaw = ValueError
        refusals = flaw if isinstance(flaw, tuple) else [flaw]
        given = [None] * len(bound) if flaw or grads is None else leaves(grads)
        expected = [b if g is None or b is None else
                    rounded(np.asarray(widened(b) + widened(g)), type_name(b))
                    for b, g in zip(bound, given, strict=True)]
        self.attempt(refusals, lambda: self.opt.accumulate(
            grads if flaw else self.shuffled(grads)))
        agree(all(b is None or alike(b, e) for b, e in zip(bound, expected, strict=True)),
              "the sum of gradients")

    def bind_like_params(self):
        at = [place for part in self.bound for place in self.places_of(part)]
        for p, (container, key) in zip(self.live, at, strict=False):
            if container is not None and not isinstance(container, tuple) and self.chance(0.9):
                container[key] = self.laid(self.values(p.shape, self.type_beside(p)), p, "as p")

    def zero_grad(self):
        bound = leaves(self.bound)
        refusal = None if self.bound else RuntimeError
        if any(isinstance(g, np.generic) for g in bound):
            refusal = ValueError
        self.attempt([refusal], self.opt.zero_grad)
        agree(refusal or all(g is None or not g.any() for g in bound), "a gradient is not zero")

    def step_replicas(self):
        n = self.one_of(1, 2, 3)
        replicas = self.replicas(n, self.given)
        weights = self.one_of(None, [self.random.random() + 0.1 for _ in range(n)], [1] * n,
                              tuple(range(1, n + 1)), np.arange(1.0, n + 1))
        flaw = None
        given = replicas
        if self.chance(0.15):
            given, weights, flaw = self.wrong_replicas(replicas, weights)
        m = len(self.twin.params)
        self.applied(
            lambda **more: self.opt.step_replicas(
                given if flaw else [self.shuffled(grads) for grads in given], weights=weights,
                **more),
            [] if flaw else replicas,
            lambda kept, scale: self.twin.step_replicas(
                [kept[k * m : (k + 1) * m] for k in range(n)], weights, scale),
            flaw, 1 if weights is not None else n,
        )

    def replicas(self, n, make=None):
        """Parameters, or gradients, of n replicas, None and Rows in the same places."""
        def another(p, g):
            if isinstance(g, optcore.Rows):
                return self.rows(p)
            return None if g is None else self.laid(
                self.values(g.shape, type_name(g)), g, self.one_of("as p", "other", "strided"))

        first = self.map_trees(make or self.gradient)
        drawn = dict(zip(map(id, self.live), leaves(first), strict=True))
        return [first] + [
            self.map_trees(lambda p: another(p, drawn[id(p)])) for _ in range(n - 1)]

    def before_outer(self):
        """Have what is measured of parameters the same to the last bit."""
        if self.measures:
            self.settle()

    def outer_step(self):
        self.before_outer()
        n = self.one_of(1, 2, 3)
        replicas = self.replicas(n)
        weights = self.one_of(None, [self.random.random() + 0.1 for _ in range(n)])
        flaw = None
        given = replicas
        if self.chance(0.1):
            given, weights, flaw = self.wrong_replicas(replicas, weights)
        scale, wrong = self.scaling(wrong=flaw is None)
        back = self.chance(0.4)
        arrays = [leaves(replica) for replica in replicas]
        refusals = [wrong, self.groups_refusal(count=self.twin.count), flaw]
        if not flaw:
            refusals += [ValueError] * all(p is None for p in arrays[0])
            if back:
                refusals += self.unwritable([p for replica in arrays for p in replica])
        kept = [[None if p is None else p.copy() for p in replica] for replica in arrays]
        done = self.attempt(refusals, lambda: self.opt.outer_step(
            given if flaw else [self.shuffled(replica) for replica in given], weights=weights,
            grad_scale=scale, write_back=back), replicas)
        if any(refusals):
            return
        agree(done is self.twin.outer_step(kept, weights, float(scale)), "whether it was skipped")
        for replica, before in zip(arrays, kept, strict=True):
            for i, (p, old) in enumerate(zip(replica, before, strict=True)):
                if p is not None:
                    agree(alike(p, self.returned(i, p) if back and done else old), "a replica")

    def returned(self, i, p):
        """What is written back into a replica's parameter."""
        if type_name(p) == type_name(self.live[i]):
            return self.live[i]
        return np.array(rounded(self.twin.params[i], type_name(p)))

    @property
    def measures(self):
        """What a step in pieces is refused with where the norm has to be known."""
        settings = self.settings
        needed = settings["skip_nonfinite"] or settings["track_grad_norm"] or (
            settings["max_norm"] not in (None, math.inf))
        return ValueError if needed else None

    def stepping(self):
        grads = leaves(self.map_trees(self.given))
        zero, scale, wrong = self.arguments()
        if self.unwritable(grads):
            zero = False
            scale, wrong = 1.0, None
        refusals = [wrong, self.measures, self.groups_refusal(count=self.twin.count)]
        refusals += [ValueError] * all(g is None for g in grads)
        order = list(range(len(grads)))
        self.random.shuffle(order)
        size = self.one_of(1, 2, 3)
        kept = copy.deepcopy(grads)

        def block():
            with self.opt.stepping(grad_scale=scale, zero_grad=zero) as part:
                for k in range(0, len(order), size):
                    part.step({i: grads[i] for i in order[k : k + size]})

        self.attempt(refusals, block, grads)
        if any(refusals):
            return
        self.twin.step(kept, float(scale))
        self.check_given(grads, kept, zero)

    def catch_up(self):
        """Some rows, or all, are brought up to date; wrong ones are not there."""
        i = self.random.randrange(len(self.live))
        p, name = self.live[i], self.names()[i]
        n = len(p) if p.ndim else 0
        key, rows, refusal = self.one_of(
            (None, None, None), (i, None, None), (name if self.named else i, None, None),
            (None, [0], TypeError), (-1, None, IndexError), (len(self.live), None, IndexError),
            ("no name", None, KeyError), ([i], None, TypeError), (i, [0, n], IndexError),
            (i, [[-1, 0]], IndexError), (i, [0.5], TypeError), (i, np.array([True]), TypeError))
        if n and refusal is None and self.chance(0.7):
            key, some = i, [self.random.randrange(n) for _ in range(self.one_of(2, 4, 10))]
            rows = self.one_of(
                some, np.array(some), np.array(some, np.uint16).reshape(2, -1), some[0])
        if rows is not None and not p.ndim:
            refusal = (refusal, ValueError)
        self.attempt(flaws(refusal), lambda: self.opt.catch_up(key, rows))
        if refusal or i not in self.twin.late or self.mood != "usual":
            return
        rows = ... if rows is None else np.ravel(rows)
        x, v, _ = self.twin.entry(i, self.opt._state[i] | {"master": self.twin.params[i]})
        self.twin.late[i].check(self.twin.params[i][rows], x[rows])
        self.twin.late[i].check(widened(self.twin.velocities[i])[rows], widened(v)[rows])

    def accumulating(self):
        batches = [self.map_trees(self.gradient) for _ in range(self.one_of(1, 2, 3))]
        batches = [grads for grads in batches if any(g is not None for g in leaves(grads))]
        if not batches:
            return NOTHING
        scale, wrong = self.scaling()
        refusals = [wrong, self.measures, self.groups_refusal(count=self.twin.count)]
        refusals += [ValueError] * any(map(self.cannot_fold, self.groups))

        def block():
            with self.opt.accumulating(grad_scale=scale) as micro:
                for grads in batches:
                    micro.add(self.shuffled(grads))

        self.attempt(refusals, block, batches)
        if not any(refusals):
            self.twin.accumulate([leaves(grads) for grads in batches], float(scale))
        return None

    def cannot_fold(self, group):
        now = {name: number_now(value, self.twin.count) if name in NUMBERS else value
               for name, value in group.items()}
        return (
            now["momentum"] == 0 or now["nesterov"] or now["clip_value"] not in (None, math.inf)
            or now["flush_subnormals"] or now["velocity_dtype"] == "bfloat16"
            or (now["weight_decay"] and not now["decoupled_weight_decay"])
        )

    def collecting(self):
        self.before_outer()
        n = self.one_of(1, 2, 3)
        replicas = self.replicas(n)
        weights = self.one_of(None, [self.random.random() + 0.1 for _ in range(n)],
                              [0.0] * (n - 1) + [3.0])
        total = None if weights is None or self.chance() else sum(weights)
        scale, wrong = self.scaling()
        refusals = [wrong, self.groups_refusal(count=self.twin.count)]
        refusals += [ValueError] * all(p is None for p in leaves(replicas[0]))

        def block():
            with self.opt.collecting(total=total, grad_scale=scale) as mean:
                for k, replica in enumerate(replicas):
                    mean.add(self.shuffled(replica), None if weights is None else weights[k])
            return mean.applied

        done = self.attempt(refusals, block, replicas)
        if not any(refusals):
            agree(done is self.twin.collect(
                [leaves(replica) for replica in replicas], weights, total, float(scale)),
                "whether it was skipped")

    def wrong_replicas(self, replicas, weights):
        n = len(replicas)
        zeros = self.map_trees(np.zeros_like)
        grads, refusal = self.wrong_gradients()
        if grads is None and refusal is ValueError:     # a bare array left out: of all or of some
            grads, refusal = "grads", TypeError
        tiny = [1e-60, 1.0] if self.any_float32 else [5e-324, 1e300]
        return self.one_of(
            ([zeros, grads] if self.chance() else [grads, zeros], None, refusal),
            ([], None, ValueError), (iter([zeros]), None, TypeError), (5, None, TypeError),
            ([zeros, self.map_trees(lambda p: None)], None, ValueError),
            ([zeros] * n, [1.0] * (n + 1), ValueError), ([zeros] * n, [-1.0] * n, ValueError),
            ([zeros] * n, [math.nan] * n, ValueError), ([zeros] * n, [0] * n, ValueError),
            ([zeros] * n, "1" * n, TypeError), ([zeros] * n, {1.0}, TypeError),
            ([zeros] * n, [True] * n, TypeError), ([zeros] * n, 1.0, TypeError),
            ([zeros, zeros], tiny, ValueError),
        )

    def grow(self):
        tree = self.new_tree()
        own_options = {**self.options(clip=self.settings["max_norm"] is None), **self.storage(tree)}
        options = {name: value for name, value in own_options.items() if self.chance()}
        merged = {**self.defaults, **options}
        arrays = leaves(tree)
        has_momentum = callable(merged["momentum"]) or merged["momentum"] != 0
        self.keep(tree, merged)
        grads = like(tree, self.bindable) if self.bound else None
        if grads is None and isinstance(tree, np.ndarray) and self.bound:
            grads = np.zeros_like(tree)     # for None means that none were given
        own = like(tree, self.velocity) if self.chance(0.2 + 0.5 * bool(self.own)) else None
        if not has_momentum and own is not None and any(v is not None for v in leaves(own)):
            own = None
        types = types_of(arrays)
        refusals = [group_refusal(merged, types, self.settings["max_norm"])]
        decay = self.settings["ema_decay"]
        if types != {"float64"} and decay is not None and not callable(decay):
            refusals.append(number_refusal("ema_decay", decay, True))
        group, more = {"params": tree, **options}, {"grads": grads, "velocities": own}
        p = self.nonempty()
        if p is not None and self.chance(0.25):
            wrong, flaw = self.wrong_array(p)
            bad = [
                ({"params": {"new": p}}, more, ValueError), ([tree], more, TypeError),
                ({**options}, more, ValueError), ({**group, "rate": 1}, more, TypeError),
                ({"params": "tree"}, more, TypeError), ({**group, "lr": -1}, more, ValueError),
                (group, {**more, "grads": None if self.bound else tree}, ValueError),
                ({"params": [np.zeros((4, 4))[::2, ::2]]}, more, ValueError),
            ]
            if self.named:
                bad.append(({**group, "params": self.trees[0]}, more, ValueError))
            if not self.bound:
                bad.append(({"params": {"new": p.copy()}, "momentum": 0.5},
                            {"velocities": {"new": wrong}}, flaw))
            group, more, flaw = self.one_of(*bad)
            known = {**self.defaults, **{name: value for name, value in (
                group.items() if isinstance(group, dict) else ()) if name in DEFAULTS}}
            self.attempt(
                [flaw, *(group_refusal(known, types, self.settings["max_norm"])
                         for types in (types_of([p]), types_of(arrays)))],
                lambda: self.opt.add_param_group(group, **more))
            return
        self.attempt(refusals, lambda: self.opt.add_param_group(group, **more), [grads, own])
        if any(refusals):
            return
        known = leaves(self.own) or [None] * len(self.twin.params)
        self.trees.append(tree)
        self.whole = False
        self.groups.append(merged)
        self.bound += [grads] if self.bound else []
        self.own = [*known, own if own is not None else [None] * len(arrays)]
        self.lends = False
        self.twin.grow(leaves(own) if own is not None else None)

    # Options

    def any_option(self, name):
        """Of the options a value that may be taken or not."""
        if self.chance(0.3):
            return self.wrong_option(name)
        if name in CHOICES:
            return self.one_of(*CHOICES[name])
        return self.options()[name]

    def set_option(self):
        name = self.one_of(*NUMBERS, *FLAGS, *CHOICES)
        value = self.any_option(name)
        changed = [{**group, name: value} for group in self.groups]
        refusal = self.groups_refusal(changed)
        self.attempt([refusal], lambda: setattr(self.opt, name, value))
        if refusal is None:
            self.groups = changed

    def edit_group(self):
        """Edit one dictionary, by one option or by all; what is refused is put back."""
        g = self.random.randrange(len(self.groups))
        if self.chance():
            edit = self.options(clip=self.settings["max_norm"] is None)
            edit |= {name: self.one_of(*CHOICES[name]) for name in CHOICES if name not in LASTING}
            edit |= {name: self.groups[g][name] for name in LASTING}
        else:
            name = self.one_of(*NUMBERS, *FLAGS, *CHOICES)
            edit = {name: self.any_option(name)}
        changed = list(self.groups)
        changed[g] = {**self.groups[g], **edit}
        refusal = self.groups_refusal(changed)
        group = self.opt.param_groups[g]
        old = {name: group[name] for name in edit}
        group.update(edit)
        if refusal is None:
            self.groups = changed
        else:
            self.attempt([refusal], self.some_call())
            group.update(old)

    def some_call(self):
        """A call that reads the groups."""
        zeros = self.map_trees(np.zeros_like)
        return self.one_of(
            lambda: self.opt.step(zeros), lambda: self.opt.step_replicas([zeros, zeros]),
            self.opt.state_dict, lambda: pickle.dumps(self.opt), lambda: copy.deepcopy(self.opt),
            lambda: setattr(self.opt, "skip_nonfinite", self.settings["skip_nonfinite"]),
        )

    def edit_groups_badly(self):
        """Make the groups what no call takes, call, and put them back."""
        opt, groups = self.opt, self.opt.param_groups
        g = self.random.randrange(len(groups))
        group, name = groups[g], self.one_of(*NUMBERS, *FLAGS, *CHOICES)
        kept = dict(group)
        kind = self.random.randrange(6)
        if kind == 0:
            del group[name]
        elif kind == 1:
            group["learning_rate"] = 0.1
        elif kind == 2:
            group["params"] = list(group["params"])
        elif kind == 3:
            groups.append({**group})
        elif kind == 4:
            opt.param_groups = tuple(groups)
        else:
            groups[g] = list(group.items())
        self.attempt([[KeyError, TypeError, ValueError, ValueError, ValueError, TypeError][kind]],
                     self.some_call())
        opt.param_groups = groups
        del groups[len(self.groups) :]
        groups[g] = group
        group.clear()
        group.update(kept)

    def schedule_badly(self):
        """Schedules that raise, step, or return what is no number: the step changes nothing."""
        def raises(count):
            raise ZeroDivisionError

        grads = self.map_trees(np.zeros_like)
        wrong, refusal = self.one_of(
            (raises, ZeroDivisionError), (lambda count: self.opt.step(grads), RuntimeError),
            (lambda count: self.opt.state_dict(), RuntimeError),
            (lambda count: math.nan, ValueError), (lambda count: -1.0, ValueError),
            (lambda count: "0.1", TypeError), (lambda count: None, TypeError))
        g = self.random.randrange(len(self.groups))
        group, name = self.opt.param_groups[g], self.one_of("lr", "weight_decay")
        others = self.groups_refusal([{**each, name: 0.0} if k == g else each
                                      for k, each in enumerate(self.groups)], self.twin.count)
        if others:
            return NOTHING
        old, group[name] = group[name], wrong
        self.attempt([refusal], lambda: self.opt.step(grads))
        group[name] = old
        return None

    def change_in_place(self):
        """A 0-d array is another number at the next step."""
        arrays = [group[name] for group in self.groups for name in ("lr", "weight_decay")
                  if isinstance(group[name], np.ndarray)]
        for array in arrays:
            array[...] = self.one_of(0.25, 0.125)
        return None if arrays else NOTHING

    def set_setting(self):
        name = self.one_of(*SETTINGS)
        as_float32 = name == "ema_decay" and self.any_float32
        if name in ("skip_nonfinite", "track_grad_norm"):
            value = self.one_of(True, False, True, False, np.False_, 1, None, "yes")
            refusal = None if isinstance(value, (bool, np.bool_)) else TypeError
        elif name == "seed":
            value, refusal = self.one_of(
                (0, None), (2**63 + 1, None), (np.uint8(3), None), (-1, ValueError),
                (2**64, ValueError), (1.5, TypeError), ("1", TypeError), (True, TypeError),
                (None, TypeError))
        else:
            value = self.one_of(None, 0.5, 0.0, 0.9, self.wrong_option(name))
            if name == "ema_decay" and self.chance(0.3):
                value = Wave((0.5, 0.75))
            refusal = None
            if value is not None and not callable(value):
                refusal = number_refusal(name, value, as_float32)
            elif value is None and name == "ema_decay" and self.settings[name] is not None:
                refusal = ValueError
            if name == "max_norm" and refusal is None:
                refusal = self.groups_refusal(max_norm=value)
        self.attempt([refusal], lambda: setattr(self.opt, name, value))
        if refusal is None:
            if name == "ema_decay" and self.settings[name] is None and value is not None:
                self.twin.averages = [p.copy() for p in self.twin.params]
            self.settings[name] = value

    def read(self):
        """Properties, and what is said of them."""
        opt, name = self.opt, self.one_of(*NUMBERS, *FLAGS, *CHOICES)
        values = [group[name] for group in self.groups]
        if all(value is values[0] or value == values[0] for value in values):
            agree(getattr(opt, name) == values[0], name)
        else:
            self.attempt([ValueError], lambda: getattr(opt, name))
        agree(repr(opt).count("group ") == len(self.groups), "repr")
        averages = opt.ema
        if averages is not None:
            agree(all(map(alike, leaves(averages), self.twin.averages)), "ema")
            if self.whole:
                agree(str(like(averages, np.shape)) == str(like(self.trees[0], np.shape)),
                      "the structure of ema")
        for wrong in (lambda: setattr(opt, "learning_rate", 1), lambda: opt.learning_rate,
                      lambda: setattr(opt, "step_count", 1)):
            self.attempt([AttributeError], wrong)

    # Memory

    def write(self):
        """Other values in arrays of the caller's; the optimizer goes on from them."""
        self.settle()           # and not from what rows have missed
        for kind, arrays in (("params", self.live), ("velocities", leaves(self.own)),
                             ("averages", leaves([self.opt.ema]) if self.opt.ema is not None
                              else [])):
            for i, a in enumerate(arrays):
                if isinstance(a, np.ndarray) and self.chance(0.5):
                    a[...] = self.values(a.shape, type_name(a))
                    if kind == "params":
                        self.twin.set_shown(i)
                    else:
                        getattr(self.twin, kind)[i] = a.copy()

    def spoil_memory(self):
        """Make an array what a step cannot take, and put it back."""
        p = self.nonempty()
        if p is None:
            return NOTHING
        i = next(k for k, q in enumerate(self.live) if q is p)
        own = dict(enumerate(leaves(self.own))).get(i)
        average = self.opt._state[i]["ema"]
        found = [a for a in (p, p, own) if a is not None and a.flags.owndata]   # not unpickled
        found += [average] if average is not None else []
        if not found:
            return NOTHING
        a = self.one_of(*found)
        a.flags.writeable = False
        zeros = self.map_trees(np.zeros_like)
        self.attempt([ValueError, self.groups_refusal(count=self.twin.count)],
                     self.one_of(lambda: self.opt.step(zeros),
                                 lambda: self.opt.step_replicas([zeros, zeros])))
        a.flags.writeable = True
        return None

    def replace_array(self):
        """Put something else in the place of a parameter or a velocity for a moment."""
        which = self.own if self.lends and self.chance() else self.trees
        at = [(container, key) for tree in which for container, key in self.places_of(tree)
              if container is not None and not isinstance(container, tuple)
              and container[key] is not None and container[key].size]
        if not at:
            return NOTHING
        container, key = self.one_of(*at)
        old, zeros = container[key], self.map_trees(np.zeros_like)
        container[key] = self.one_of(old.copy(), None, 3)
        self.attempt([ValueError, self.groups_refusal(count=self.twin.count)],
                     lambda: self.opt.step(zeros))
        container[key] = old
        return None

    # State

    def snapshot(self):
        self.settle()
        twin = self.twin
        return {
            "state": self.opt.state_dict(), "params": list(twin.params),
            "velocities": list(twin.velocities), "averages": list(twin.averages),
            "started": list(twin.started), "masters": list(twin.masters),
            "counts": (twin.count, twin.skipped),
            "groups": [dict(group) for group in self.groups], "settings": dict(self.settings),
            "values": [{name: plain(value) for name, value in group.items()}
                       for group in self.groups],
        }

    def remember(self):
        self.snapshots = [*self.snapshots[-2:], self.snapshot()]

    def groups_loaded(self, saved):
        """What groups become by a load by places, and what that is refused with."""
        if len(saved["groups"]) != len(self.groups):
            return None, ValueError
        groups, refusal = [], None
        for own, old, values in zip(self.groups, saved["groups"], saved["values"], strict=True):
            group = {}
            for name, value in values.items():
                group[name] = value
                if callable(old[name]):
                    group[name] = own[name]
                    if not callable(own[name]):
                        refusal = ValueError
            groups.append({**group, **{name: own[name] for name in LASTING}})
        return groups, refusal

    def recall(self, path=None, saved=None, with_params=False):
        """Go back to a state that was remembered, or that lies in a file."""
        if saved is None:
            if not self.snapshots:
                return NOTHING
            saved = self.one_of(*self.snapshots)
        groups, refusal = self.groups_loaded(saved)
        settings = dict(self.settings)
        if path is not None:
            settings = {**saved["settings"]}
            if settings["ema_decay"] is None or callable(settings["ema_decay"]):
                settings["ema_decay"] = self.settings["ema_decay"]
        if (saved["settings"]["ema_decay"] is None) != (self.settings["ema_decay"] is None):
            refusal = refusal or ValueError
        refusal = refusal or self.groups_refusal(groups, max_norm=settings["max_norm"])
        by_name = bool(self.named and self.chance(0.3) and refusal is None)
        self.attempt([refusal], lambda: self.opt.load_state_dict(saved["state"], by_name=by_name)
                     if path is None else self.opt.restore(path, by_name=by_name))
        if refusal is None:
            twin = self.twin
            self.groups, self.settings = groups, settings
            twin.velocities, twin.averages = list(saved["velocities"]), list(saved["averages"])
            if settings["ema_decay"] is None:
                twin.averages = list(twin.params)
            twin.started, (twin.count, twin.skipped) = list(saved["started"]), saved["counts"]
            twin.norm, twin.nonfinite = None, []
            if with_params:
                twin.params, twin.before, twin.late = list(saved["params"]), {}, {}
            else:
                twin.leave_late()
                for i, master in enumerate(saved["params"]):
                    twin.take_master(i, master)
        return None

    def recall_badly(self):
        """States that do not fit are refused, whatever is wrong with them."""
        state = copy.deepcopy(self.opt.state_dict())
        entries, groups = state["state"], state["param_groups"]
        i = self.random.randrange(len(entries))
        g = self.random.randrange(len(groups))
        entry, group, p = entries[i], groups[g], self.live[i]
        name = self.one_of(*NUMBERS, *FLAGS, *CHOICES)

        def without(mapping, key):
            return lambda: mapping.pop(key)

        def having(mapping, key, value):
            return lambda: mapping.__setitem__(key, value)

        wrong, refusal = self.wrong_array(p)
        key = self.one_of("version", "step_count", "skipped", "param_groups", "state")
        change, refusal = self.one_of(
            (without(state, key), KeyError), (having(state, "version", self.one_of(
                0, STATE_VERSION + 1, "3", None, 2.0, True)), ValueError),
            (having(state, "step_count", self.one_of(-1, 1.5, True, "1", None)), ValueError),
            (having(state, "skipped", self.one_of(-1, 2**63, False)), ValueError),
            (having(state, "state", [1]), TypeError), (having(state, "param_groups", 3), TypeError),
            (without(entries, i), KeyError), (having(entries, len(entries), entry), ValueError),
            (having(entry, "velocity", wrong), refusal),
            (having(entry, "first_step", self.one_of(1, None)), TypeError),
            (without(entry, self.one_of(*[key for key in entry if key != "master"])), KeyError),
            (having(entry, "master", wrong), refusal),
            (having(entry, "master", rounded(np.zeros(p.shape, np.float32), "float16")),
             TypeError),
            (having(group, *self.one_of(("master", "half"), ("rounding", "up"),
                                        ("velocity_dtype", "int4"))), ValueError),
            (having(entry, "m", 1), ValueError),
            (without(group, name), KeyError), (having(groups, g, [group]), TypeError),
            (having(group, "params", [0.5]), ValueError), (having(group, "rate", 1), TypeError),
            (having(group, "momentum", 1.5), ValueError), (having(group, "lr", "1"), TypeError),
            (having(group, "schedules", ["rate"]), ValueError),
            (having(group, "param_names", 3), TypeError),
            (having(state, "options", {"rate": 1}), ValueError),
            (lambda: groups.append(group), ValueError),
            (having(entry, "ema", None if entry["ema"] is not None else np.zeros_like(p)),
             ValueError),
        )
        scheduled = group["schedules"]
        change()
        if (group.get("momentum") == 1.5 and "momentum" in scheduled) or (
            group.get("lr") == "1" and "lr" in scheduled
        ):
            return NOTHING      # the optimizer's own schedule stays
        self.attempt([refusal], lambda: self.opt.load_state_dict(state))
        return None

    def save(self):
        """Save, and go back to the file at once or later, in this optimizer or in a new one."""
        if self.folder is None:
            return NOTHING
        path, with_params = self.folder / "state", self.chance()
        self.opt.save(path, include_params=with_params)
        saved = self.snapshot()
        if self.chance(0.3):
            self.load_anew(path)
            return None
        for _ in range(self.random.randrange(3)):
            self.step()
        if self.chance(0.2):
            content = bytearray(path.read_bytes())
            content[self.random.randrange(len(content))] ^= 1 << self.random.randrange(8)
            path.write_bytes(content)
            self.attempt([optcore.CheckpointError], lambda: self.opt.restore(path))
            return None
        return self.recall(path, saved, with_params)

    def load_anew(self, path):
        trees = copy.deepcopy(self.trees)
        params = trees[0] if self.whole else [{"params": tree} for tree in trees]
        scheduled = {name for group in self.groups for name, value in group.items()
                     if callable(value)}
        needed = {name: value for name, value in self.groups[0].items() if name in scheduled}
        if callable(self.settings["ema_decay"]):
            needed["ema_decay"] = self.settings["ema_decay"]
        if needed:
            self.attempt([ValueError], lambda: optcore.SGD.load(path, params))
            if len(self.groups) > 1:
                return
        self.opt = optcore.SGD.load(path, params, **needed)
        self.trees, self.bound, self.own, self.lends, self.snapshots = trees, [], [], False, []
        self.twin = self.twin.of(self.opt)
        self.twin.norm, self.twin.nonfinite = None, []
        self.groups = [
            {name: value if callable(value) else plain(value) for name, value in group.items()}
            for group in self.groups
        ]
        self.defaults = dict(self.groups[0]) if self.whole else DEFAULTS

    def copied(self):
        """Go on with a copy; the original stays as it was."""
        together = self.opt, self.trees, self.bound, self.own
        protocol = self.one_of(2, 3, 4, 5, None)
        made = copy.deepcopy(together) if protocol is None else (
            pickle.loads(pickle.dumps(together, protocol)))
        before, original = self.seen(), (self.opt, self.trees, self.bound, self.own)
        groups = self.groups
        self.opt, self.trees, self.bound, self.own = made
        self.twin = self.twin.of(self.opt)
        self.twin.norm, self.twin.nonfinite = None, []
        self.groups = [
            {name: value for name, value in group.items() if name in expected}
            for group, expected in zip(self.opt.param_groups, groups, strict=True)
        ]
        for group, expected in zip(self.groups, groups, strict=True):
            agree(all(group[name] == expected[name] for name in expected), "options of a copy")
        self.check()
        self.step()
        copies = self.opt, self.trees, self.bound, self.own
        self.opt, self.trees, self.bound, self.own = original
        agree(self.seen() == before, "a copy has stepped what it was copied from")
        self.opt, self.trees, self.bound, self.own = copies

    def load(self):
        """Go on in another optimizer: names in another order, some gone, some new, one convention
        turned into the other."""
        saved, names = self.snapshot(), self.names()
        old = self.opt
        trees, groups = copy.deepcopy(self.trees), [dict(group) for group in self.groups]
        flips = [self.chance(0.25) for _ in groups]
        for group, flip in zip(groups, flips, strict=True):
            if flip and not callable(group["dampening"]) and group["dampening"] == 0:
                group["lr_in_velocity"] = not group["lr_in_velocity"]
        if self.chance():
            for tree, group in zip(trees, groups, strict=True):
                group |= {name: value for name, value in self.storage(tree).items()
                          if name in LASTING}
        sources = list(range(len(groups)))
        if self.named:
            trees = [self.shuffled(tree) for tree in trees]
            order = sources[::-1]
            if len(order) > 1 and self.chance(0.3):
                order = order[1:]
            trees, groups, sources = ([part[k] for k in order] for part in (trees, groups, sources))
            if self.chance(0.2):
                self.n_names += 1
                name = type_name(leaves(trees[0])[0])
                trees[0][f"p{self.n_names}"] = np.array(self.values((5,), name))
        refusal = self.refusal_of_load(saved, trees, groups, sources, names)
        new = optcore.SGD(
            [{"params": tree, **group} for tree, group in zip(trees, groups, strict=True)],
            lr=0.1, **self.settings)
        before = (self.opt, self.trees, self.bound, self.own, self.groups, self.twin)
        self.opt, self.trees, self.bound, self.own, self.groups = new, trees, [], [], groups
        self.twin = Twin(new)
        self.twin.norm, self.twin.nonfinite = None, []
        found = self.attempt([refusal], lambda: new.load_state_dict(
            saved["state"], by_name=self.named))
        if refusal:
            self.opt, self.trees, self.bound, self.own, self.groups, self.twin = before
            return
        self.whole, self.lends, self.snapshots = False, False, []
        self.defaults = {**DEFAULTS, "lr": 0.1}
        own_names = self.names()
        if self.named:
            agree(found.missing == [name for name in own_names if name not in names]
                  and found.unexpected == [name for name in names if name not in own_names]
                  and found.groups == [], "what was not found")
        else:
            agree(not any(found), "what was not found")
        self.groups = [
            {name: group[name] if callable(saved["groups"][k][name]) else saved["values"][k][name]
             for name in group} | {name: group[name] for name in LASTING}
            for group, k in zip(groups, sources, strict=True)
        ]
        at = iter(range(len(own_names)))
        old_groups = [g for g, group in enumerate(old.param_groups) for _ in group["params"]]
        for g in range(len(groups)):
            for _ in new.param_groups[g]["params"]:
                i = next(at)
                if self.named and own_names[i] not in names:
                    continue
                k = names.index(own_names[i]) if self.named else i
                if saved["state"]["state"][k]["velocity"] is not None:
                    self.twin.velocities[i] = self.converted(
                        saved["velocities"][k], saved["groups"][old_groups[k]], groups[g],
                        saved["counts"][0], type_name(self.twin.velocities[i]))
                self.twin.take_master(i, saved["params"][k] if saved["masters"][k] else None)
                self.twin.started[i] = saved["started"][k]
                if self.settings["ema_decay"] is not None:
                    self.twin.averages[i] = saved["averages"][k]
        self.twin.count, self.twin.skipped = saved["counts"]

    def converted(self, v, old, new, count, name=None):
        """A velocity in the other convention, where that is the new one, and in a type."""
        v = widened(v)
        if bool(old["lr_in_velocity"]) != bool(new["lr_in_velocity"]):
            lr = old["lr"](count) if callable(old["lr"]) else float(old["lr"])
            factor = v.dtype.type(-lr)
            v = np.asarray(v * factor if new["lr_in_velocity"] else v / factor)
        return v if name is None else rounded(v, name)

    def refusal_of_load(self, saved, trees, groups, sources, names):
        """What the conversion of velocities, or the options together, are refused with."""
        starts = np.cumsum([0, *(len(group["params"]) for group in self.opt.param_groups)])
        for tree, group, k in zip(trees, groups, sources, strict=True):
            old = saved["groups"][k]
            becomes = {**{name: old[name] if callable(old[name]) else saved["values"][k][name]
                          for name in old}, **{name: group[name] for name in LASTING}}
            refusal = group_refusal(becomes, types_of(leaves(tree)),
                                    self.settings["max_norm"])
            if refusal:
                return refusal
            if bool(old["lr_in_velocity"]) == bool(group["lr_in_velocity"]):
                continue
            lr = old["lr"](saved["counts"][0]) if callable(old["lr"]) else float(old["lr"])
            if lr == 0:
                return ValueError
            for i in range(starts[k], starts[k + 1]):
                v = widened(saved["velocities"][i])
                if saved["state"]["state"][i]["velocity"] is None:
                    continue
                w = self.converted(v, old, group, saved["counts"][0])
                normal = np.abs(v) >= np.finfo(v.dtype).tiny
                if not np.array_equal(np.isfinite(v), np.isfinite(w)) or (
                    normal & (w == 0)
                ).any():
                    return ValueError
        return None

    # The other entries

    def function(self):
        """A step of the functional API over arrays of its own."""
        rule, p = self.one_of(*LINEAR), self.array()
        beside = ["float64"] if p.dtype == np.float64 else IN_FLOAT32
        g, *states = (self.laid(self.values(p.shape, self.one_of(*beside)), p, "as p")
                      for _ in ("g", *rule.states))
        how = {}
        if types_of([p, *states]) & {*FRACTION_BITS}:
            how = self.one_of({"rounding": "nearest"}, {
                "rounding": "stochastic", "noise_key": self.random.randrange(2**64)})
        drawn = self.options()
        options = {name: value(0) if callable(value) else value for name, value in drawn.items()}
        options = {name: options[name] for name in OPTIONS}
        options["dampening"] = 0.0 if not rule.dampens or rule.lr_in_velocity else (
            self.one_of(0.0, 0.3))
        options["momentum"] = self.one_of(0.0, 0.9) if rule.has_momentum else 0.0
        if not rule.states:
            options["flush_subnormals"] = options["dampen_first"] = False
        if not rule.dampens or rule.lr_in_velocity:
            options["dampen_first"] = False
        o = Options(**{name: value if value is None or isinstance(value, (bool, np.bool_))
                       else float(value) for name, value in options.items()},
                    grad_scale=self.one_of(1.0, 0.25), first_step=bool(options["dampening"])
                    and self.chance())
        arrays = [p, g, *states]
        expected = rule.reference(p.copy("K"), g, states, o, **how)
        if self.chance(0.2):
            self.function_badly(rule, arrays, o, how)
        if not p.ndim and type_name(g) != "bfloat16" and self.chance(0.3):
            arrays[1] = g[()]
        rule.entry(*arrays, **rule.keywords(o), **how)
        agree(alike(p, expected[0]) and all(map(alike, states, expected[1])), rule.id)

    def function_badly(self, rule, arrays, o, how):
        k, refusal = self.random.randrange(len(arrays)), None
        keywords = {**rule.keywords(o), **how}
        changed, p = list(arrays), arrays[0]
        if p.size and self.chance(0.7):
            changed[k], refusal = self.one_of(
                (p.astype(np.uint16), TypeError), (np.ma.masked_array(p.copy(), True), TypeError),
                (misaligned(p), ValueError), (p.astype(p.dtype.newbyteorder()), TypeError),
                (p.tolist(), TypeError), (arrays[k - 1], ValueError))
        else:
            name = self.one_of("lr", "weight_decay", "grad_scale", *rule.scalars)
            keywords[name], refusal = self.one_of(
                (-1, ValueError), (math.nan, ValueError), (True, TypeError), ("1", TypeError),
                (None, TypeError), (np.ones(3), TypeError))
        self.attempt([refusal], lambda: rule.entry(*changed, **keywords), arrays)

    def machine(self):
        """Another SIMD level; another number of threads, where this life has any."""
        self.level = self.one_of(*LEVELS)
        if self.n_threads > 1:
            self.n_threads = self.one_of(2, 3, 4)
            optcore.set_num_threads(self.n_threads)
        for wrong, refusal in ((0, ValueError), (1025, ValueError), ("2", TypeError),
                               (True, TypeError), (1.5, TypeError)):
            self.attempt([refusal], lambda wrong=wrong: optcore.set_num_threads(wrong))
        agree(optcore.get_num_threads() == self.n_threads, "the number of threads")

    # A life

    def operate(self, k):
        """The k-th operation, which what was done before does not choose; return its name."""
        self.random.seed(f"life {self.seed} operation {k}")
        call, = self.random.choices([*CALLS], [*CALLS.values()])
        with simd(self.level), (
            always_threaded() if self.n_threads > 1 else contextlib.nullcontext()
        ):
            done = call(self)
            self.check()
        return call.__name__, done is not NOTHING


# By how often they come
CALLS = {
    Life.step: 24, Life.step_bound: 10, Life.step_replicas: 6, Life.step_shared: 2,
    Life.outer_step: 5, Life.stepping: 5, Life.accumulating: 5, Life.collecting: 5,
    Life.accumulate: 5, Life.zero_grad: 2, Life.catch_up: 4, Life.rows_badly: 3, Life.grow: 2,
    Life.set_option: 6, Life.edit_group: 6,
    Life.edit_groups_badly: 2, Life.schedule_badly: 2, Life.change_in_place: 1,
    Life.set_setting: 4, Life.read: 2, Life.write: 2, Life.spoil_memory: 2, Life.replace_array: 2,
    Life.remember: 2, Life.recall: 2, Life.recall_badly: 3, Life.save: 1, Life.copied: 1,
    Life.load: 1, Life.function: 6, Life.machine: 1,
}


class LifeError(Exception):
    """A life that went wrong: at which operation, and how."""

    def __init__(self, seed, at, error):
        super().__init__(f"life {seed}, operation {at}: {error!r}")
        self.seed, self.at, self.error = seed, at, error


def live(seed, operations, folder=None, count=None, trace=False):
    """Live a life of the operations named; raise `LifeError` where it goes wrong."""
    at = "construction"
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("error")
            life = Life(seed, folder)
            life.check()
            for at in operations:
                name, done = life.operate(at)
                if trace:
                    print(f"{at:4} {name}{'' if done else ', with nothing to do'}")
                if count is not None and done:
                    count.update((name, "operations"))
            if count is not None:
                count["refusals"] += life.n_refused
    except Exception as error:
        raise LifeError(seed, at, error) from error
    finally:
        optcore.set_num_threads(None)


def shortened(failure, operations, folder=None):
    """Leave out operations for as long as the life still goes wrong at the same one."""
    if failure.at == "construction":
        return []
    kept = [k for k in operations if k < failure.at]
    size = len(kept)
    while size:
        for start in range(0, len(kept), size):
            fewer = kept[:start] + kept[start + size :]
            try:
                live(failure.seed, [*fewer, failure.at], folder)
            except LifeError as again:
                if again.at == failure.at and type(again.error) is type(failure.error):
                    kept = fewer
                    break
        else:
            size = min(size // 2, len(kept))
    return [*kept, failure.at]


def fuzz(seed, n_operations, length, folder, most_failures=5):
    """Live lives until so many operations are done; return the counts and the failures."""
    count, failures = collections.Counter(), []
    while count["operations"] < n_operations and len(failures) < most_failures:
        try:
            # Files are synced, which is slow: they have their lives.
            live(seed, range(length), folder if seed % 8 == 0 else None, count)
        except LifeError as failure:
            failures.append(failure)
        count["lives"] += 1
        seed += 1
    return count, failures


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--operations", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first life")
    parser.add_argument("--length", type=int, default=60, help="operations of a life")
    parser.add_argument("--life", type=int, help="run this one alone, and say what it does")
    parser.add_argument("--only", help="of that life: operations, separated by commas")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if asked.life is not None:
            operations = range(asked.length) if asked.only is None else [
                int(k) for k in asked.only.split(",") if k]
            live(asked.life, operations, folder if asked.life % 8 == 0 else None, trace=True)
            return
        begin = time.monotonic()
        count, failures = fuzz(asked.seed, asked.operations, asked.length, folder)
        print(f"seed {asked.seed}: {count['lives']} lives, {count['operations']} operations, "
              f"{count['refusals']} of them refused calls, {len(failures)} mismatches; "
              f"{time.monotonic() - begin:.0f} s")
        names = sorted((call.__name__ for call in CALLS), key=lambda name: -count[name])
        print(", ".join(f"{name} {count[name]}" for name in names))
        for failure in failures:
            print(f"\n{failure}")
            traceback.print_exception(failure.error)
            only = shortened(failure, range(asked.length),
                             folder if failure.seed % 8 == 0 else None)
            print(f"again: python tests/fuzz.py --life {failure.seed} "
                  f"--only {','.join(map(str, only)) or ','}")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
