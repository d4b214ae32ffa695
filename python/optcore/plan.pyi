from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optcore._structure import Group
from optcore.options import OPTIMIZER_OPTIONS as OPTIMIZER_OPTIONS
from optcore.structure import Nest

_Array = NDArray[np.float64] | NDArray[np.float32 | np.float16 | np.uint16]
_Grads = _Array | Iterable[Any] | Mapping[Any, Any]     # arrays, None, and nests of them

BOUND: object
RUN: int

class Plan:
    param_groups: list[dict[str, Any]]
    _join_squares: Callable[[float, list[int]], tuple[float, list[int]]] | None
    @property
    def _has_master(self) -> list[bool]: ...
    @property
    def _masters(self) -> tuple[Any, ...]: ...
    def _lend_masters(self, masters: Iterable[Any]) -> None: ...
    @property
    def _built(self) -> bool: ...
    @property
    def step_count(self) -> int: ...
    @property
    def skipped(self) -> int: ...
    @property
    def grad_norm(self) -> float | None: ...
    @property
    def nonfinite_params(self) -> list[Any]: ...
    @property
    def seed(self) -> int: ...
    @seed.setter
    def seed(self, value: int) -> None: ...
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
        weights: Iterable[float] | None = None,
        grad_scale: float = 1.0,
        zero_grad: bool = False,
    ) -> bool: ...
    def outer_step(
        self,
        replica_params: Sequence[_Grads],
        *,
        weights: Iterable[float] | None = None,
        grad_scale: float = 1.0,
        write_back: bool = False,
    ) -> bool: ...
    def _check_step(
        self, grads: _Grads | object, grad_scale: float, zero_grad: bool
    ) -> tuple[tuple[_Array | None, ...], list[dict[str, Any]], float]: ...
    def _step_as_checked(
        self, grads: _Grads | object, grad_scale: float, ema_decay: float,
        share: float | None = None,
    ) -> bool: ...
    def accumulate(self, grads: _Grads) -> None: ...
    def _build(
        self,
        groups: list[Group],
        nest: Nest | None,
        *,
        options: Mapping[str, Any],
        grads: _Grads | None = None,
        velocities: Any = None,
        rule: str | None = None,
        given: Any = None,
        firsts: Sequence[int] | None = None,
    ) -> None: ...
    def _grow(
        self, groups: list[Group], nests: tuple[Nest | None, Nest | None], grads: Any,
        velocities: Any, note: Callable[[], None],
    ) -> None: ...
    def _grown(
        self, groups: list[Group], nests: tuple[Nest | None, Nest | None], grads: Any,
        velocities: Any,
    ) -> Plan: ...
    def _take_grown(self, grown: Plan, note: Callable[[], None]) -> None: ...
    def _set_in_groups(self, name: str, value: Any) -> None: ...
    def zero_grad(self) -> None: ...
    @property
    def _state_names(self) -> tuple[str, ...]: ...
    @property
    def _lent(self) -> tuple[_Array | None, ...] | None: ...
    @property
    def _state(self) -> list[dict[str, Any]]: ...
    def _check_current(self) -> None: ...
    def _snapshot(self, include_params: bool = False) -> dict[str, Any]: ...
    def _restore(
        self,
        groups: list[dict[str, Any]],
        entries: Sequence[Mapping[str, Any]],
        options: Mapping[str, Any],
        counts: Sequence[int],
        writes: Sequence[tuple[_Array, _Array]] = (),
    ) -> None: ...
