from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optcore.options import OPTIMIZER_OPTIONS as OPTIMIZER_OPTIONS

_Array = NDArray[np.float32] | NDArray[np.float64]
_Grads = _Array | Iterable[_Array | None] | Mapping[Any, _Array | None]

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
    ) -> tuple[tuple[_Array | None, ...], list[dict[str, Any]], float]: ...
    def accumulate(self, grads: _Grads) -> None: ...
    def _build(
        self,
        groups: list[dict[str, Any]],
        *,
        single: bool,
        by_name: bool,
        options: Mapping[str, Any],
        grads: _Grads | None,
        rule: str | None = None,
    ) -> None: ...
    def _bind(self, grads: _Grads) -> None: ...
    def zero_grad(self) -> None: ...
    @property
    def _state_names(self) -> tuple[str, ...]: ...
    @property
    def _state(self) -> list[dict[str, Any]]: ...
    def _snapshot(self, include_params: bool = False) -> dict[str, Any]: ...
    def _restore(
        self,
        groups: list[dict[str, Any]],
        entries: Sequence[Mapping[str, Any]],
        options: Mapping[str, Any],
        counts: Sequence[int],
        writes: Sequence[tuple[_Array, _Array]] = (),
    ) -> None: ...
