"""The three rules as the gallery steps them: optcore's functional API, and nothing else."""
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
