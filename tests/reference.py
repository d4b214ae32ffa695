"""The executable specification: each rule as the NumPy expression it is, and the table of rules.

Every function returns new arrays. Scalars are combined in float64 and rounded once to the
arrays' dtype; expressions are evaluated left to right, as NumPy does. A rule that is not in
`RULES` does not exist: the tests and the benchmarks take their cases from there.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
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


def sgd(x, g, v, o):
    real = x.dtype.type
    d = direction(x, g, o)
    x = shrunk(x, o)
    x = x - real(o.lr) * d
    return x, v


def momentum(x, g, v, o):
    real = x.dtype.type
    d = direction(x, g, o)
    x = shrunk(x, o)
    if o.dampening == 0:
        v = real(o.momentum) * v + d
    elif o.first_step:
        v = d.copy()
    else:
        v = real(o.momentum) * v + real(1 - o.dampening) * d
    x = x - real(o.lr) * v
    return x, v


def momentum_lr_in_velocity(x, g, v, o):
    real = x.dtype.type
    d = direction(x, g, o)
    x = shrunk(x, o)
    v = real(o.momentum) * v - real(o.lr) * d
    x = x + v
    return x, v


def nesterov(x, g, v, o):
    real = x.dtype.type
    d = direction(x, g, o)
    x = shrunk(x, o)
    v = real(o.momentum) * v + d
    x = x - real(o.lr) * (d + real(o.momentum) * v)
    return x, v


def nesterov_lr_in_velocity(x, g, v, o):
    real = x.dtype.type
    d = direction(x, g, o)
    x = shrunk(x, o)
    v = real(o.momentum) * v - real(o.lr) * d
    x = x + (real(o.momentum) * v - real(o.lr) * d)
    return x, v


@dataclass(frozen=True)
class Rule:
    """One row of the table: a rule in one velocity convention."""

    name: str
    reference: Callable[..., Any]
    entry: Callable[..., Any]
    has_velocity: bool = True
    has_dampening: bool = False
    lr_in_velocity: bool = False
    sgd_options: dict[str, Any] = field(default_factory=dict)   # what optcore.SGD is told

    @property
    def id(self) -> str:
        return self.name + ("_lr_in_velocity" if self.lr_in_velocity else "")

    def step(self, x, g, v, o):
        """Call the functional API as a user would, with the options that differ from defaults."""
        default = Options(lr=None)
        keywords = {
            key: value for key, value in vars(o).items() if value != getattr(default, key)
        }
        if self.has_velocity:
            keywords.setdefault("momentum", 0.0)
            if self.lr_in_velocity:
                keywords["lr_in_velocity"] = True
            self.entry(x, g, v, **keywords)
        else:
            self.entry(x, g, **keywords)


RULES = [
    Rule("sgd", sgd, optcore.sgd_step, has_velocity=False),
    Rule("momentum", momentum, optcore.momentum_step, has_dampening=True),
    Rule(
        "momentum", momentum_lr_in_velocity, optcore.momentum_step,
        lr_in_velocity=True, sgd_options={"lr_in_velocity": True},
    ),
    Rule("nesterov", nesterov, optcore.nesterov_step, sgd_options={"nesterov": True}),
    Rule(
        "nesterov", nesterov_lr_in_velocity, optcore.nesterov_step,
        lr_in_velocity=True, sgd_options={"nesterov": True, "lr_in_velocity": True},
    ),
]


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
