"""The executable specification: each rule as the NumPy expression it is, and the table of rules.

Scalars are combined in float64 and rounded once to the arrays' dtype; expressions are evaluated
left to right, as NumPy does. A rule that is not in `RULES` does not exist: the tests and the
benchmarks take their cases from there.
"""
from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

import optcore
from optcore.options import GROUP_OPTIONS

SGD_OPTIONS = GROUP_OPTIONS["sgd"]


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
    eps: float = 1e-8
    eps_in_sqrt: bool = False
    alpha: float = 0.99
    beta1: float = 0.9
    beta2: float = 0.999
    step: int | None = 1                # of this array, this one among them; None: no correction


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
    sgd_options: dict[str, Any] | None = None   # how the optimizer is told, if it can be
    kind: str = "SGD"                           # which that is
    function: str | None = None                 # in the functional API, if not the rule's name
    decouples: bool = False                     # its weight decay is always decoupled

    @property
    def id(self) -> str:
        return self.name + ("_lr_in_velocity" if self.lr_in_velocity else "")

    @property
    def is_adaptive(self) -> bool:
        return "eps" in self.scalars

    @property
    def has_momentum(self) -> bool:
        return "momentum" in self.scalars

    def reference(self, x, g, states, o, rounding=None, noise_key=0):
        """Return the parameter and the list of states after a step, all new arrays.

        Those of half types are widened before it and rounded after it.
        """
        if self.decouples:
            o = replace(o, decoupled_weight_decay=True)
        names, param = [type_name(a) for a in (x, *states)], x
        x, g, *states = map(widened, (x, g, *states))
        with np.errstate(all="ignore"):     # the engine does not warn either
            results = self.equation(shrunk(x, o), direction(x, g, o), *states, o)
        x, *states = (np.array(result) for result in results)
        if o.flush_subnormals:
            states = [flushed(state) for state in states]
        bits = [None] * len(names)
        if rounding == "stochastic":
            bits = noise(noise_key, param, len(names))
        x, *states = (rounded(*each) for each in zip((x, *states), names, bits, strict=True))
        return x, states

    def rows_reference(self, rows, x, g, states, o, rounding=None, noise_key=0):
        """Return the same after a step of these rows alone, each of which has noise of its own."""
        after = [a.copy() for a in (x, *states)]
        for row in rows:
            at = slice(row, row + 1)
            new, states = self.reference(after[0][at], g[at], [a[at] for a in after[1:]], o,
                                         rounding, key_of_row(noise_key, row))
            for a, of_row in zip(after, (new, *states), strict=True):
                a[at] = of_row
        return after[0], after[1:]

    @property
    def entry(self) -> Callable[..., None]:
        """The rule in the functional API."""
        return getattr(optcore, f"{self.function or self.name}_step")

    def keywords(self, o) -> dict[str, Any]:
        """Return what a user writes: what differs from defaults, and what the rule needs."""
        default = Options(lr=None)
        keywords = {
            key: value for key, value in vars(o).items()
            if value != getattr(default, key) or key in self.scalars
        }
        if self.decouples:
            del keywords["decoupled_weight_decay"]
        if o.dampening and not o.dampen_first:
            keywords["first_step"] = o.first_step       # must be said
        if "nesterov" in self.name and self.function:       # which serves several rules
            keywords["nesterov"] = True
        return keywords | ({"lr_in_velocity": True} if self.lr_in_velocity else {})

    def step(self, x, g, states, o, **rounding):
        """Call the functional API as a user would."""
        arrays = dict(zip(self.states, states, strict=True))
        self.entry(x, g, **arrays, **self.keywords(o), **rounding)

    def known(self, options: dict[str, Any]) -> dict[str, Any]:
        """Return the options without SGD's that this rule's optimizer does not have."""
        own = GROUP_OPTIONS[getattr(optcore, self.kind)._family]
        return {name: value for name, value in options.items()
                if (name not in SGD_OPTIONS or name in own)
                and not (self.decouples and name == "decoupled_weight_decay")}

    def optimizer(self, params, *arguments, base=None, **options):
        """Build the whole-model optimizer, of the class `base`."""
        base = base or getattr(optcore, self.kind)
        options = self.known(options)
        if self.sgd_options is None:
            base = type(base.__name__, (base,), {"_rule": self.name})
        return base(params, *arguments, **(self.sgd_options or {}), **options)


RULES: list[Rule] = []
RULES_BY_ID: dict[str, Rule] = {}
LINEAR: list[Rule] = []                 # those of SGD, linear in the gradient


def rule(name, *, label=None, lr_in_velocity=False, **row):
    """Enter the decorated equation in the table; `row` is what else a `Rule` has.

    It is given the parameter, already shrunk, the direction, one array a state and the options,
    and returns the parameter and the states.
    """
    label = (label or name.replace("_", " ")) + (", lr in velocity" if lr_in_velocity else "")

    def enter(equation):
        RULES.append(Rule(name, equation, label, lr_in_velocity=lr_in_velocity, **row))
        RULES_BY_ID[RULES[-1].id] = RULES[-1]
        if not RULES[-1].is_adaptive:
            LINEAR.append(RULES[-1])
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


def denominator(square, o, correction=1.0):
    """Return what adaptive rules divide by: the root of a square that is corrected, and eps."""
    real = square.dtype.type
    if o.eps_in_sqrt:
        return np.sqrt(square + real(o.eps * correction)) * real(1 / math.sqrt(correction))
    return np.sqrt(square) * real(1 / math.sqrt(correction)) + real(o.eps)


@rule("adagrad", label="AdaGrad", states=("square_sum",), kind="AdaGrad", scalars=("eps",))
def adagrad(x, d, square_sum, o):
    real = x.dtype.type
    square_sum = square_sum + d * d
    x = x - real(o.lr) * d / denominator(square_sum, o)
    return x, square_sum


def enter_rmsprop(momentum, right, centered):
    """Enter RMSProp, by itself or with the momentum of another rule."""
    other = RULES_BY_ID.get(f"{momentum}{'_lr_in_velocity' * right}")
    name = "_".join(filter(None, ["rmsprop", centered and "centered", momentum]))
    options = {"centered": True} if centered else {}

    @rule(
        name, label=name.replace("rmsprop", "RMSProp").replace("_", " "), lr_in_velocity=right,
        states=("square_avg", *["velocity"] * (other is not None), *["grad_avg"] * centered),
        scalars=("alpha", "eps", *["momentum"] * (other is not None)), kind="RMSProp",
        function="rmsprop", sgd_options=options | (other.sgd_options if other else {}),
    )
    def rmsprop(x, d, square_avg, *more):
        *states, o = more
        real = x.dtype.type
        square = square_avg = real(o.alpha) * square_avg + real(1 - o.alpha) * d * d
        if centered:
            states[-1] = real(o.alpha) * states[-1] + real(1 - o.alpha) * d
            square = square_avg - states[-1] * states[-1]
            square = np.where(square < 0, real(0), square)
        if other is None:
            x = x - real(o.lr) * d / denominator(square, o)
        else:
            x, states[0] = other.equation(x, d / denominator(square, o), states[0], o)
        return x, square_avg, *states


for centered, momentum_of, right in itertools.product(
    [False, True], [None, "momentum", "nesterov"], [False, True]
):
    if momentum_of or not right:
        enter_rmsprop(momentum_of, right, centered)


def product(beta, n):
    """Return the product of n times beta from left to right."""
    return functools.reduce(operator.mul, [beta] * n, 1.0)


def step_by_adam(x, d, exp_avg, exp_avg_sq, o, maximum=None):
    real = x.dtype.type
    corrections = [1 - (0 if o.step is None else product(beta, o.step))
                   for beta in (o.beta1, o.beta2)]
    exp_avg = real(o.beta1) * exp_avg + real(1 - o.beta1) * d
    square = exp_avg_sq = real(o.beta2) * exp_avg_sq + real(1 - o.beta2) * d * d
    if maximum is not None:
        stays = (exp_avg_sq <= maximum) | np.isnan(maximum)
        square = maximum = np.where(stays, maximum, exp_avg_sq)
    x = x - real(o.lr / corrections[0]) * exp_avg / denominator(square, o, corrections[1])
    return x, exp_avg, exp_avg_sq, maximum


ADAM = {"states": ("exp_avg", "exp_avg_sq"), "scalars": ("beta1", "beta2", "eps", "step")}


@rule("adam", label="Adam", kind="Adam", sgd_options={}, **ADAM)
def adam(x, d, exp_avg, exp_avg_sq, o):
    return step_by_adam(x, d, exp_avg, exp_avg_sq, o)[:3]


@rule("adamw", label="AdamW", kind="AdamW", sgd_options={}, decouples=True,
      **ADAM | {"scalars": (*ADAM["scalars"], "weight_decay", "decoupled_weight_decay")})
def adamw(x, d, exp_avg, exp_avg_sq, o):
    return step_by_adam(x, d, exp_avg, exp_avg_sq, o)[:3]


@rule("amsgrad", label="AMSGrad", kind="Adam", function="adam", sgd_options={"amsgrad": True},
      **ADAM | {"states": (*ADAM["states"], "max_exp_avg_sq")})
def amsgrad(x, d, exp_avg, exp_avg_sq, max_exp_avg_sq, o):
    return step_by_adam(x, d, exp_avg, exp_avg_sq, o, max_exp_avg_sq)


def nonnegative(rule, states):
    """Return states as they can be: of squares there are none below zero."""
    return [np.abs(state) if "sq" in name else state
            for name, state in zip(rule.states, states, strict=True)]


def flushed(state):
    """Return a state with 0 in place of what is below the smallest normal number."""
    return np.where(np.abs(state) < np.finfo(state.dtype).tiny, state.dtype.type(0), state)


def weighted(replicas, weights):
    """Return the weighted mean of one gradient of each replica; `grad_scale` follows."""
    return added(replicas, shares(weights))


def shares(weights):
    """Return each weight by the sum of all."""
    total = 0.0
    for w in weights:
        total = total + float(w)
    return [float(w) / total for w in weights]


def added(arrays, factors):
    """Return the sum of the arrays, each times its factor, in their order."""
    real = arrays[0].dtype.type
    total = real(factors[0]) * arrays[0]
    for factor, a in zip(factors[1:], arrays[1:], strict=True):
        total = total + real(factor) * a
    return total


def accumulated(rule):
    """Return a rule of momentum for gradients stacked in one array, which the velocity adds up."""

    def equation(x, d, v, o):
        first = o.first_step and not o.dampen_first
        more = replace(o, momentum=1.0, dampening=0.0 if first else o.dampening)
        _, v = rule.equation(x, d[0], v, o)
        for each in d[1:]:
            _, v = rule.equation(x, each, v, more)
        return x + v if rule.lr_in_velocity else x - x.dtype.type(o.lr) * v, v

    return replace(rule, equation=equation)


def summed_rows(indices, values):
    """Return the row numbers as they first occur, and the sum of each row's values in their order.

    They are what a step by ``optcore.Rows(indices, values)`` takes: a gradient that is zero in
    every other row.
    """
    sums = {}
    for i, value in zip(map(int, indices), values, strict=True):
        sums[i] = sums[i] + value if i in sums else value
    shape = len(sums), *values.shape[1:]
    return np.array([*sums], np.intp), np.array([*sums.values()], values.dtype).reshape(shape)


def averaged(e, x, decay):
    """Return the weight average after a step to x."""
    real = x.dtype.type
    return real(decay) * e + real(1 - decay) * x


# Storage: the half types, what is rounded to them, and the noise of stochastic rounding

BFLOAT16 = optcore.bfloat16
FRACTION_BITS = {"bfloat16": 7, "float16": 10}
LEAST_EXPONENT = {"bfloat16": -126, "float16": -14}
GRID = 256


def type_name(a):
    """The name of an array's type, whichever dtype says that it is bfloat16."""
    return "bfloat16" if a.dtype.metadata == BFLOAT16.metadata else str(a.dtype)


def widened(a):
    """Return an array in its arithmetic type, exactly."""
    if type_name(a) == "bfloat16":
        return (a.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(a.shape)
    with np.errstate(all="ignore"):
        return a.astype(np.float32) if a.dtype == np.float16 else a


def rounded(x, name, noise=None):
    """Return float32 numbers in a half type: the nearest, ties to even, or by 16 bits of noise.

    With noise, what lies between two neighbours goes to the upper in magnitude where the noise
    is at least what is missing there, in units of 2**-16 of their distance.
    """
    if name not in FRACTION_BITS:
        return x
    with np.errstate(all="ignore"):
        size = np.abs(x.astype(np.float64))
    exponent = np.frexp(np.where(np.isfinite(size), size, 1))[1] - 1
    unit = np.ldexp(1.0, np.maximum(exponent, LEAST_EXPONENT[name]) - FRACTION_BITS[name])
    with np.errstate(all="ignore"):
        units = size / unit
        units = np.rint(units) if noise is None else (np.floor(units * 65536) + noise) // 65536
        largest = (2 - 2.0 ** -FRACTION_BITS[name]) * 2.0 ** (1 - LEAST_EXPONENT[name])
        values = units * unit
        values = np.where(values > largest, np.inf, values)
        values = np.where(np.isfinite(size), values, size)
        values = np.copysign(values, x).astype(np.float32)
        if name == "float16":
            return values.astype(np.float16)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    bits = np.where(np.isnan(x), np.signbit(x) * 0x8000 + 0x7FC0, bits).astype(np.uint16)
    return bits.view(BFLOAT16)


def split(x):
    """Return float32 numbers as bfloat16, the nearest, ties away from zero, and their low bits."""
    bits = x.view(np.uint32)
    high = np.where(np.isnan(x), (bits >> 16) | 0x40, (bits.astype(np.int64) + 0x8000) >> 16)
    return high.astype(np.uint16).view(BFLOAT16), np.where(np.isnan(x), 0, bits).astype(np.uint16)


def joined(high, low):
    """Return the float32 of which these are the halves, for those that `split` gives.

    Beside an upper half that was set to another zero or infinity than the lower was split from,
    nothing is.
    """
    high, low = high.view(np.uint16).astype(np.uint32) << 16, low.astype(np.uint32)
    size = high & 0x7FFFFFFF
    low = np.where(size == np.where(low >= 0x8000, 0, 0x7F800000), 0, low)
    carried = (low >= 0x8000) & (size <= 0x7F800000)
    return np.asarray(high - carried * 0x10000 | low).astype(np.uint32).view(np.float32)


def hashed(z):
    """SplitMix64: the integer after its increment, mixed."""
    z = (z + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def noise_key(seed, step, index=0):
    return hashed((hashed((hashed(seed) + step) % 2**64) + index) % 2**64)


def key_of_row(key, row):
    """The key of a row's noise where it is stepped for itself, with its table's key."""
    return noise_key(key, int(row))


def noise(key, a, n_arrays):
    """Return 16 random bits for each element of each of the arrays that are shaped as `a`.

    Two arrays share 32 bits, the parameter and its first state; the next two have another key.
    """
    i = np.arange(GRID, dtype=np.uint32)
    found = []
    for word in range(-(-n_arrays // 2)):
        z = np.empty(a.size, np.uint32)
        for run in range(-(-a.size // GRID)):
            start = hashed(((2**64 - 1 - key if word else key) + run * 0x9E3779B97F4A7C15) % 2**64)
            at = np.uint32(start % 2**32) + i * np.uint32(0x9E3779B9)
            at ^= at >> np.uint32(16)
            at *= np.uint32(start >> 32 | 1)
            at ^= at >> np.uint32(15)
            z[run * GRID :][:GRID] = at[: a.size - run * GRID]
        z = z.reshape(a.shape, order="F" if a.flags.fnc else "C")
        found += [z & 0xFFFF, z >> 16]
    return found[:n_arrays]


def master_of(name, master):
    """The master that a parameter of this type has, where the group's option is this."""
    if master == "auto":
        return {"bfloat16": "split", "float16": "float32"}.get(name)
    return master if name in FRACTION_BITS else None


def same_bits(a, b):
    """Whether two arrays hold the same bits, any NaN being as good as any other.

    IEEE 754 leaves a NaN's sign and payload open, and NumPy's own loops do not agree on them.
    """
    a, b = np.asarray(a), np.asarray(b)
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    unsigned = f"u{a.dtype.itemsize}"
    equal = np.ascontiguousarray(a).view(unsigned) == np.ascontiguousarray(b).view(unsigned)
    if type_name(a) == "bfloat16":
        a, b = widened(a), widened(b)
    return bool(np.all(equal | (np.isnan(a) & np.isnan(b))))
