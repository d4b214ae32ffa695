import numpy as np
from numpy.typing import NDArray

# Of bfloat16 what holds the bits; arrays of ml_dtypes have no types.
_Array = NDArray[np.float64] | NDArray[np.float32 | np.float16 | np.uint16]

def sgd_step(
    param: _Array,
    grad: _Array,
    *,
    lr: float,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
    grad_scale: float = 1.0,
    clip_value: float | None = None,
    rounding: str | None = None,
    noise_key: int | None = None,
) -> None: ...
def momentum_step(
    param: _Array,
    grad: _Array,
    velocity: _Array,
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
    rounding: str | None = None,
    noise_key: int | None = None,
) -> None: ...
def nesterov_step(
    param: _Array,
    grad: _Array,
    velocity: _Array,
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
    rounding: str | None = None,
    noise_key: int | None = None,
) -> None: ...
def adagrad_step(
    param: _Array,
    grad: _Array,
    square_sum: _Array,
    *,
    lr: float,
    eps: float = 1e-10,
    eps_in_sqrt: bool = False,
    flush_subnormals: bool = False,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
    grad_scale: float = 1.0,
    clip_value: float | None = None,
    rounding: str | None = None,
    noise_key: int | None = None,
) -> None: ...
def noise_key(seed: int, step: int, index: int = 0) -> int: ...
