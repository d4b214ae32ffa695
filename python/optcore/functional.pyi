from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

_Real = TypeVar("_Real", np.float32, np.float64)

def sgd_step(
    param: NDArray[_Real],
    grad: NDArray[_Real],
    *,
    lr: float,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
    grad_scale: float = 1.0,
    clip_value: float | None = None,
) -> None: ...
def momentum_step(
    param: NDArray[_Real],
    grad: NDArray[_Real],
    velocity: NDArray[_Real],
    *,
    lr: float,
    momentum: float,
    dampening: float = 0.0,
    first_step: bool | None = None,
    dampen_first: bool = False,
    lr_in_velocity: bool = False,
    flush_subnormals: bool = False,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
    grad_scale: float = 1.0,
    clip_value: float | None = None,
) -> None: ...
def nesterov_step(
    param: NDArray[_Real],
    grad: NDArray[_Real],
    velocity: NDArray[_Real],
    *,
    lr: float,
    momentum: float,
    lr_in_velocity: bool = False,
    flush_subnormals: bool = False,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
    grad_scale: float = 1.0,
    clip_value: float | None = None,
) -> None: ...
