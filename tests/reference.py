"""The executable specification: each rule as the NumPy expression it is, and the table of rules.

Scalars are combined in float64 and rounded once to the arrays' dtype; expressions are evaluated
left to right, as NumPy does. A rule that is not in `RULES` does not exist: the tests and the
benchmarks take their cases from there.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import optcore


@dataclass(frozen=True)
class Options:
    """Hyper-parameters by the names of the public API, with its defaults."""

    lr: float = 0.1
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    decoupled_weight_decay: bool = False
    maximize: bool = False
    grad_scale: float = 1.0
    clip_value: float | None = None
    first_step: bool = False
    dampen_first: bool = False          # a first step is then damped as any other
    flush_subnormals: bool = False


def direction(x, g, o):
    """Return the gradient after scale, maximize, clip and coupled decay."""
    real = x.dtype.type
    d = g
    if o.grad_scale != 1:
        d = real(o.grad_scale) * d
    if o.maximize:
        d = -d
    if o.clip_value is not None:
        m = real(o.clip_value)
        d = np.where(d < -m, -m, d)
        d = np.where(d > m, m, d)
    if o.weight_decay and not o.decoupled_weight_decay:
        d = d + real(o.weight_decay) * x
    return d


def shrunk(x, o):
    """Return the parameter after decoupled decay."""
    if o.weight_decay and o.decoupled_weight_decay:
        x = x * x.dtype.type(1 - o.lr * o.weight_decay)
    return x


@dataclass(frozen=True)
class Rule:
    """One row of the table: a rule in one velocity convention."""

    name: str
    equation: Callable[..., Any]
    label: str                              # what reports print
    states: tuple[str, ...] = ()            # its arrays besides parameter and gradient
    scalars: tuple[str, ...] = ()           # the options that it cannot do without
    dampens: bool = False
    lr_in_velocity: bool = False
    sgd_options: dict[str, Any] | None = None   # how optcore.SGD is told, if it can be

    @property
    def id(self) -> str:
        return self.name + ("_lr_in_velocity" if self.lr_in_velocity else "")

    @property
    def has_momentum(self) -> bool:
        return "momentum" in self.scalars

    def reference(self, x, g, states, o):
        """Return the parameter and the list of states after a step, all new arrays."""
        with np.errstate(all="ignore"):     # the engine does not warn either
            results = self.equation(shrunk(x, o), direction(x, g, o), *states, o)
        x, *states = (np.array(result) for result in results)
        if o.flush_subnormals:
            states = [flushed(state) for state in states]
        return x, states

    @property
    def entry(self) -> Callable[..., None]:
        """The rule in the functional API."""
        return getattr(optcore, f"{self.name}_step")

    def keywords(self, o) -> dict[str, Any]:
        """Return what a user writes: what differs from defaults, and what the rule needs."""
        default = Options(lr=None)
        keywords = {
            key: value for key, value in vars(o).items()
            if value != getattr(default, key) or key in self.scalars
        }
        if o.dampening and not o.dampen_first:
            keywords["first_step"] = o.first_step       # must be said
        return keywords | ({"lr_in_velocity": True} if self.lr_in_velocity else {})

    def step(self, x, g, states, o):
        """Call the functional API as a user would."""
        self.entry(x, g, *states, **self.keywords(o))

    def optimizer(self, params, *arguments, base=optcore.SGD, **options):
        """Build the whole-model optimizer, of the class `base`."""
        if self.sgd_options is None:
            base = type(base.__name__, (base,), {"_rule": self.name})
        return base(params, *arguments, **(self.sgd_options or {}), **options)


RULES: list[Rule] = []
RULES_BY_ID: dict[str, Rule] = {}


def rule(name, *, label=None, lr_in_velocity=False, **row):
    """Enter the decorated equation in the table; `row` is what else a `Rule` has.

    It is given the parameter, already shrunk, the direction, one array a state and the options,
    and returns the parameter and the states.
    """
    label = (label or name.replace("_", " ")) + (", lr in velocity" if lr_in_velocity else "")

    def enter(equation):
        RULES.append(Rule(name, equation, label, lr_in_velocity=lr_in_velocity, **row))
        RULES_BY_ID[RULES[-1].id] = RULES[-1]
        return equation

    return enter


@rule("sgd", label="SGD", sgd_options={})
def sgd(x, d, o):
    real = x.dtype.type
    x = x - real(o.lr) * d
    return (x,)


@rule("momentum", states=("velocity",), scalars=("momentum",), dampens=True, sgd_options={})
def momentum(x, d, v, o):
    real = x.dtype.type
    if o.dampening == 0:
        v = real(o.momentum) * v + d
    elif o.first_step and not o.dampen_first:
        v = d
    else:
        v = real(o.momentum) * v + real(1 - o.dampening) * d
    x = x - real(o.lr) * v
    return x, v


@rule("momentum", states=("velocity",), scalars=("momentum",), lr_in_velocity=True,
      sgd_options={"lr_in_velocity": True})
def momentum_lr_in_velocity(x, d, v, o):
    real = x.dtype.type
    v = real(o.momentum) * v - real(o.lr) * d
    x = x + v
    return x, v


@rule("nesterov", label="Nesterov", states=("velocity",), scalars=("momentum",),
      sgd_options={"nesterov": True})
def nesterov(x, d, v, o):
    real = x.dtype.type
    v = real(o.momentum) * v + d
    x = x - real(o.lr) * (d + real(o.momentum) * v)
    return x, v


@rule("nesterov", label="Nesterov", states=("velocity",), scalars=("momentum",),
      lr_in_velocity=True, sgd_options={"nesterov": True, "lr_in_velocity": True})
def nesterov_lr_in_velocity(x, d, v, o):
    real = x.dtype.type
    v = real(o.momentum) * v - real(o.lr) * d
    x = x + (real(o.momentum) * v - real(o.lr) * d)
    return x, v


def flushed(state):
    """Return a state with 0 in place of what is below the smallest normal number."""
    return np.where(np.abs(state) < np.finfo(state.dtype).tiny, state.dtype.type(0), state)


def weighted(replicas, weights):
    """Return the weighted mean of one gradient of each replica; `grad_scale` follows."""
    real = replicas[0].dtype.type
    total = 0.0
    for w in weights:
        total = total + float(w)
    s = real(float(weights[0]) / total) * replicas[0]
    for w, g in zip(weights[1:], replicas[1:], strict=True):
        s = s + real(float(w) / total) * g
    return s


def averaged(e, x, decay):
    """Return the weight average after a step to x."""
    real = x.dtype.type
    return real(decay) * e + real(1 - decay) * x


def same_bits(a, b):
    """Whether two arrays hold the same bits, any NaN being as good as any other.

    IEEE 754 leaves a NaN's sign and payload open, and NumPy's own loops do not agree on them.
    """
    a, b = np.asarray(a), np.asarray(b)
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    unsigned = f"u{a.dtype.itemsize}"
    equal = np.ascontiguousarray(a).view(unsigned) == np.ascontiguousarray(b).view(unsigned)
    return bool(np.all(equal | (np.isnan(a) & np.isnan(b))))
