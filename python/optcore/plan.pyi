from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_Array = NDArray[np.float32] | NDArray[np.float64]
_Grads = _Array | Iterable[_Array | None] | Mapping[Any, _Array | None]

GROUP_OPTIONS: dict[str, Any]
GROUP_KEYS: tuple[str, ...]
GROUP_NOTES: tuple[str, ...]
BOUND: object

class Plan:
    param_groups: list[dict[str, Any]]
    _join_squares: Callable[[float, list[int]], tuple[float, list[int]]] | None
    @property
    def step_count(self) -> int: ...
    @property
    def skipped(self) -> int: ...
    @property
    def grad_norm(self) -> float | None: ...
    @property
    def nonfinite_params(self) -> list[Any]: ...
    @property
    def max_norm(self) -> float | None: ...
    @max_norm.setter
    def max_norm(self, value: float | None) -> None: ...
    @property
    def skip_nonfinite(self) -> bool: ...
    @skip_nonfinite.setter
    def skip_nonfinite(self, value: bool) -> None: ...
    @property
    def track_grad_norm(self) -> bool: ...
    @track_grad_norm.setter
    def track_grad_norm(self, value: bool) -> None: ...
    @property
    def ema_decay(self) -> float | Callable[[int], float] | None: ...
    @ema_decay.setter
    def ema_decay(self, value: float | Callable[[int], float] | None) -> None: ...
    def step(
        self, grads: _Grads = ..., *, grad_scale: float = 1.0, zero_grad: bool = False
    ) -> bool: ...
    def step_replicas(
        self,
        replica_grads: Sequence[_Grads],
        *,
        grad_scale: float = 1.0,
        zero_grad: bool = False,
    ) -> bool: ...
    def _check_step(
        self, grads: _Grads | object, grad_scale: float, zero_grad: bool
    ) -> tuple[tuple[_Array | None, ...], list[float], float]: ...
    def accumulate(self, grads: _Grads) -> None: ...
    def _build(
        self,
        groups: list[dict[str, Any]],
        *,
        single: bool,
        by_name: bool,
        max_norm: float | None,
        skip_nonfinite: bool,
        track_grad_norm: bool,
        ema_decay: float | Callable[[int], float] | None,
        grads: _Grads | None,
    ) -> None: ...
    def _bind(self, grads: _Grads) -> None: ...
    def zero_grad(self) -> None: ...
    def _snapshot(self) -> list[tuple[_Array | None, _Array | None, bool]]: ...
    @property
    def _state(self) -> list[tuple[_Array | None, _Array | None, bool]]: ...
    def _restore(
        self,
        groups: list[dict[str, Any]],
        velocities: Sequence[_Array | None],
        averages: Sequence[_Array | None],
        first_steps: Sequence[bool],
        step_count: int,
        skipped: int,
        options: dict[str, Any] | None = None,
    ) -> None: ...

def checked_lr(value: object, name: str) -> float: ...
