"""The six rules as the gallery steps them: optcore's functional API, and nothing else."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

import optcore

Step = Callable[[np.ndarray, np.ndarray, np.ndarray, float, float], None]


@dataclass(frozen=True)
class Rule:
    """One rule; ``step(x, g, v, lr, momentum)`` updates x and v in place.

    The velocity carries no learning rate, which is the lecture's convention for momentum.
    Measurements take their rules as an argument, so that a wrong one can be put in.
    """

    name: str
    label: str
    step: Step


def _sgd(x: np.ndarray, g: np.ndarray, v: np.ndarray, lr: float, momentum: float) -> None:
    optcore.sgd_step(x, g, lr=lr)


def _momentum(x: np.ndarray, g: np.ndarray, v: np.ndarray, lr: float, momentum: float) -> None:
    optcore.momentum_step(x, g, v, lr=lr, momentum=momentum)


def _nesterov(x: np.ndarray, g: np.ndarray, v: np.ndarray, lr: float, momentum: float) -> None:
    optcore.nesterov_step(x, g, v, lr=lr, momentum=momentum)


Rules = Mapping[str, Rule]

RULES: Rules = MappingProxyType({
    "sgd": Rule("sgd", "SGD", _sgd),
    "momentum": Rule("momentum", "Momentum", _momentum),
    "nesterov": Rule("nesterov", "Nesterov", _nesterov),
})


@dataclass(frozen=True)
class Constants:
    """What the adaptive rules take, each of them those that it has."""

    lr: float
    decay: float = 0.9         # of RMSProp's average
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-7          # the lecture's
    corrected: bool = True     # Adam's averages, for having begun at zero


Adapt = Callable[[np.ndarray, np.ndarray, np.ndarray, int, Constants], None]


@dataclass(frozen=True)
class Adaptive:
    """One adaptive rule; ``step(x, g, states, t, constants)`` is its t-th, in place.

    The states are two arrays of zeros in one, ``(2, *x.shape)``; only Adam needs both.
    """

    name: str
    label: str
    step: Adapt


def _adagrad(x: np.ndarray, g: np.ndarray, states: np.ndarray, t: int, c: Constants) -> None:
    optcore.adagrad_step(x, g, states[0], lr=c.lr, eps=c.eps)


def _rmsprop(x: np.ndarray, g: np.ndarray, states: np.ndarray, t: int, c: Constants) -> None:
    optcore.rmsprop_step(x, g, states[0], lr=c.lr, alpha=c.decay, eps=c.eps)


def _adam(x: np.ndarray, g: np.ndarray, states: np.ndarray, t: int, c: Constants) -> None:
    optcore.adam_step(x, g, *states, lr=c.lr, step=t if c.corrected else None, beta1=c.beta1,
                      beta2=c.beta2, eps=c.eps)


Adaptives = Mapping[str, Adaptive]

# A table of its own: the theory of the other one, of quadratics, is that of linear rules.
ADAPTIVE: Adaptives = MappingProxyType({
    "adagrad": Adaptive("adagrad", "AdaGrad", _adagrad),
    "rmsprop": Adaptive("rmsprop", "RMSProp", _rmsprop),
    "adam": Adaptive("adam", "Adam", _adam),
})
