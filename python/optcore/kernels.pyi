from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optcore.options import KERNEL_OPTIONS as KERNEL_OPTIONS

ABI_VERSION: int
RULES: dict[str, int]
array_dtype: np.dtype[np.void]
options_dtype: np.dtype[np.void]

def make_options(
    *,
    lr: float = 0.0,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    grad_scale: float = 1.0,
    clip_value: float = ...,
    maximize: bool = False,
    decoupled_weight_decay: bool = False,
    lr_in_velocity: bool = False,
    first_step: bool = False,
    flush_subnormals: bool = False,
    noise_key: int = 0,
    first_element: int = 0,
    stochastic: bool = False,
    alpha: float = 0.99,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-08,
    beta1_power: float = 0.0,
    beta2_power: float = 0.0,
    eps_in_sqrt: bool = False,
) -> NDArray[np.void]: ...
def make_arrays(
    param: NDArray[Any], grad: NDArray[Any], *states: NDArray[Any], rest: NDArray[Any] | None = None
) -> NDArray[np.void]: ...
def addresses() -> dict[str, int]: ...
def functions() -> dict[str, Callable[..., None]]: ...
