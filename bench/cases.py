"""What is measured: a step of one job over one workload, and the arrays it works on."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
from shapes import MODELS, TRAININGS

import optcore
import reference

RULES = reference.RULES_BY_ID
# What pictures and short tables show: the convention of most libraries.
SHOWN = [job for job, rule in RULES.items() if not rule.lr_in_velocity]

# Chosen so that one step shows in every result beyond rounding: times do not depend on values.
LR = 0.1
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
MAX_NORM = 1.0
EMA_DECAY = 0.9
PIPELINE = "pipeline"       # clip by norm, coupled decay, Nesterov, average, zero gradients

# One period of the data. Every tensor repeats it from its start, so that the reference need
# only be worked out for one period; prime, so that no block of a loop coincides with it.
PERIOD = 65_537

# Where malloc puts a block: from so many bytes on (glibc's M_MMAP_THRESHOLD) in pages of its
# own, behind a header.
MAPPED_BYTES = 128 << 10
PAGE = 4096
BLOCK_HEADER = 16


def count_of(workload: str) -> int:
    """Return the parameters of a workload: a model's name or a length such as "1e6"."""
    return sum(map(prod, shapes_of(workload)))


def shapes_of(workload: str) -> list[tuple[int, ...]]:
    return MODELS[workload] if workload in MODELS else [(int(float(workload)),)]


@dataclass(frozen=True)
class Case:
    """One group of measurements that may be compared with each other."""

    job: str                # a rule's id, or PIPELINE
    workload: str           # a key of MODELS, or the length of a single vector
    dtype: str = "float32"
    threads: int = 1

    @property
    def rule(self) -> reference.Rule:
        """The row of the table of rules."""
        return RULES["nesterov" if self.job == PIPELINE else self.job]

    @property
    def pipeline(self) -> bool:
        """Whether the whole pipeline is stepped, not the rule alone."""
        return self.job == PIPELINE

    @property
    def training(self) -> bool:
        """Whether a forward and a backward pass come between the steps."""
        return self.workload in TRAININGS

    @property
    def label(self) -> str:
        """What reports call the job."""
        return "full pipeline" if self.pipeline else self.rule.label

    @property
    def streams(self) -> int:
        """Elements read and written for each parameter."""
        # The pipeline reads the gradient twice and zeroes it, and updates the average.
        return 3 + 2 * len(self.rule.states) + (4 if self.pipeline else 0)

    @property
    def n_bytes(self) -> int:
        """Bytes that a step must move."""
        return self.streams * np.dtype(self.dtype).itemsize * count_of(self.workload)

    @property
    def options(self) -> reference.Options:
        """The hyper-parameters of the rule alone."""
        return reference.Options(lr=LR, momentum=MOMENTUM if self.rule.has_momentum else 0.0)

    def optimizer(self, params: Any, **more: Any) -> optcore.SGD:
        """Return the whole-model optimizer."""
        options = {key: getattr(self.options, key) for key in ("lr", *self.rule.scalars)}
        if self.pipeline:
            options |= {
                "weight_decay": WEIGHT_DECAY, "max_norm": MAX_NORM, "ema_decay": EMA_DECAY
            }
        return self.rule.optimizer(params, **options, **more)


@dataclass(frozen=True)
class Run:
    """One implementation, ready to step."""

    step: Callable[[], object]
    params: Callable[[], Sequence[np.ndarray]]
    averages: Callable[[], Sequence[np.ndarray]] = tuple
    calls: int = 1          # steps that one call of `step` takes
    close: Callable[[], object] = bool


class Arrays:
    """Parameters and gradients of a case, where a fresh process has them."""

    def __init__(self, case: Case) -> None:
        self.case = case
        shapes = shapes_of(case.workload)
        rng = np.random.default_rng(7)
        self._pattern = {
            name: rng.standard_normal(PERIOD).astype(case.dtype) for name in ("x", "g")
        }
        self.x = [fresh_empty(shape, case.dtype) for shape in shapes]
        self.g = [fresh_empty(shape, case.dtype) for shape in shapes]

    def states(self) -> list[list[np.ndarray]]:
        """Return zeros for each state, an array a tensor, as a user allocates them."""
        return [[_filled(0, x) for x in self.x] for _ in self.case.rule.states]

    def copies(self) -> list[np.ndarray]:
        """Return arrays for an average, which starts from the parameters."""
        return [_filled(x, x) for x in self.x]

    def reset(self) -> None:
        """Return to the state before the first step."""
        for x in self.x:
            _repeat(self._pattern["x"], x)
        self.reset_gradients()

    def reset_gradients(self) -> None:
        """Fill the gradients as they are before the first step."""
        for g in self.g:
            _repeat(self._pattern["g"], g)

    @cached_property
    def expected(self) -> tuple[np.ndarray, np.ndarray | None]:
        """One period of the parameters and averages after two steps."""
        case = self.case
        x, g = self._pattern["x"], self._pattern["g"]
        states = [np.zeros_like(x) for _ in case.rule.states]
        average = x if case.pipeline else None
        for _ in range(2):
            options = case.options
            if case.pipeline:
                norm = _norm(g, [a.size for a in self.x])
                options = replace(
                    options, weight_decay=WEIGHT_DECAY,
                    grad_scale=min(1.0, MAX_NORM / (norm + 1e-6)),
                )
            x, states = case.rule.reference(x, g, states, options)
            if case.pipeline:
                average = reference.averaged(average, x, EMA_DECAY)
                g = np.zeros_like(g)
        return x, average

    def check(self, run: Run, *, exact: bool) -> None:
        """Take two steps and compare with the reference: bits, or closeness of a peer.

        Raises
        ------
        AssertionError
            Where they differ; nothing may be timed then.
        """
        run.step()
        if not self.case.pipeline:
            self.reset_gradients()      # some peers (PyTorch's foreach Nesterov) change them
        run.step()
        x, average = self.expected
        for results, period in [(run.params(), x), (run.averages(), average)]:
            for i, result in enumerate(results):
                same = _compare(np.asarray(result).reshape(-1), period, exact)
                assert same, f"tensor {i} is not what the reference has"


def fresh_empty(shape: tuple[int, ...], dtype: np.dtype | str) -> np.ndarray:
    """Return what np.empty does in a fresh process.

    glibc maps large blocks one by one, and NumPy's data begins 16 bytes into a page. In a
    process that has freed as many as a benchmark's has, a block may come from the heap
    instead and lie on a cache line by chance, which decides a fifth of some times.
    """
    n_bytes = prod(shape) * np.dtype(dtype).itemsize
    if n_bytes < MAPPED_BYTES:
        return np.empty(shape, dtype)
    memory = np.empty(n_bytes + PAGE, np.uint8)
    start = (BLOCK_HEADER - memory.ctypes.data) % PAGE
    return memory[start : start + n_bytes].view(dtype).reshape(shape)


def _filled(value: Any, like: np.ndarray) -> np.ndarray:
    array = fresh_empty(like.shape, like.dtype)
    array[...] = value
    return array


def _norm(period: np.ndarray, sizes: list[int]) -> float:
    squares = np.square(period, dtype=np.float64)
    total = sum(
        n // PERIOD * squares.sum() + squares[: n % PERIOD].sum() for n in sizes
    )
    return float(np.sqrt(total))


def _repeat(pattern: np.ndarray, out: np.ndarray) -> None:
    flat = out.reshape(-1)
    whole = flat.size // PERIOD * PERIOD
    flat[:whole].reshape(-1, PERIOD)[...] = pattern
    flat[whole:] = pattern[: flat.size - whole]


def _compare(flat: np.ndarray, period: np.ndarray, exact: bool) -> bool:
    # A few ulp at the largest values for those that may round otherwise than the reference.
    tolerance = 16 * np.finfo(period.dtype).eps * np.abs(period).max()
    for start in range(0, flat.size, PERIOD):
        part = flat[start : start + PERIOD]
        want = period[: part.size]
        if exact:
            if not reference.same_bits(part, want):
                return False
        elif not np.allclose(part, want, rtol=0, atol=tolerance):
            return False
    return True
