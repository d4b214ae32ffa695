"""What is measured: a step of one job over one workload, and the arrays it works on."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from math import prod
from typing import Any

import numpy as np
from shapes import MODELS, TRAININGS

import optcore
import reference

# Of the adaptive rules the plain ones: their variants add an operation or a state to them.
ADAPTIVE = ("adagrad", "rmsprop", "adam", "adamw")
RULES = {rule.id: rule for rule in reference.LINEAR} | {
    name: reference.RULES_BY_ID[name] for name in ADAPTIVE
}
# What pictures and short tables show: the convention of most libraries.
SHOWN = [job for job, rule in RULES.items() if not rule.lr_in_velocity]

# Chosen so that one step shows in every result beyond rounding: times do not depend on values.
LR = 0.1
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
# The adaptive rules' are the reference's, which are PyTorch's
ALPHA, BETA1, BETA2, EPS = (
    getattr(reference.Options, name) for name in ("alpha", "beta1", "beta2", "eps")
)
MAX_NORM = 1.0
EMA_DECAY = 0.9
SEED = 0
PIPELINE = "pipeline"       # clip by norm, coupled decay, Nesterov, average, zero gradients
OUTER = "outer"             # Nesterov towards the mean of replicas' parameters
OUTER_LR = 0.7              # DiLoCo's
ROWS = "rows"               # momentum on some rows of a table
WIDTH = 64                  # of such a table

# One period of the data. Every tensor repeats it from its start, so that the reference need
# only be worked out for one period; prime, so that no block of a loop coincides with it.
PERIOD = 65_537
# Noise has no period: of what is rounded by it so many stretches are compared, evenly spread.
NOISY_STRETCHES = 16
# What a run of the noise adds to its key in `reference.noise`
NEXT_RUN = 0x9E3779B97F4A7C15

# Where malloc puts a block: from so many bytes on (glibc's M_MMAP_THRESHOLD) in pages of its
# own, behind a header.
MAPPED_BYTES = 128 << 10
PAGE = 4096
BLOCK_HEADER = 16


def count_of(workload: str) -> int:
    """Return the parameters of a workload: a model's name or a length such as "1e6"."""
    return sum(map(prod, shapes_of(workload)))


def shapes_of(workload: str) -> list[tuple[int, ...]]:
    return MODELS[workload] if workload in MODELS else [(length_of(workload),)]


def length_of(workload: str) -> int:
    """Return the elements of a vector or the rows of a table, such as "1e6"."""
    return int(float(workload))


@dataclass(frozen=True)
class Storage:
    """The types that a step's arrays are kept in, by name, and how they are rounded."""

    param: str = "float32"
    grad: str = "float32"
    velocity: str = "float32"
    master: str | None = None
    rounding: str = "stochastic"

    @property
    def same(self) -> str | None:
        """The one type of all arrays, if there is one."""
        alike = self.param == self.grad == self.velocity and self.master is None
        return self.param if alike else None

    @property
    def master_dtype(self) -> str | None:
        """What is kept of a parameter besides itself."""
        return {"split": "uint16", "float32": "float32"}.get(self.master)

    @property
    def options(self) -> dict[str, Any]:
        """How `optcore.SGD` is told."""
        return {
            "master": self.master, "rounding": self.rounding, "velocity_dtype": self.velocity
        }


HALF = "all bfloat16"
# What is measured against float32. Those that name a velocity differ from others by it alone.
STORAGES = {
    "float32": Storage(),
    "bfloat16 velocity": Storage(velocity="bfloat16"),
    "bfloat16 gradients and velocity": Storage(grad="bfloat16", velocity="bfloat16"),
    "split, bfloat16 gradients": Storage("bfloat16", "bfloat16", master="split"),
    "split, bfloat16 gradients and velocity": Storage(*["bfloat16"] * 3, master="split"),
    "float32 master, bfloat16 gradients": Storage("bfloat16", "bfloat16", master="float32"),
    HALF: Storage(*["bfloat16"] * 3),
    f"{HALF}, to the nearest": Storage(*["bfloat16"] * 3, rounding="nearest"),
    "float16, float32 master": Storage("float16", "float16", master="float32"),
    "float16, no master": Storage("float16", "float16"),
}


@dataclass(frozen=True)
class Replicas:
    """Whose mean an outer step goes towards, and whether it writes the new parameters there."""

    n: int
    write_back: bool = False

    @property
    def examples(self) -> list[int]:
        """What each was trained on: the weights of a federated mean, no two alike."""
        return [100 + k for k in range(self.n)]


OUTERS = {
    f"{n} replica{'s' * (n > 1)}{', written back' * back}": Replicas(n, back)
    for n in (1, 4, 10) for back in (False, True)
}


@dataclass(frozen=True)
class Touched:
    """How many row numbers a step has, and whether few rows have most of them."""

    n: int
    zipf: bool = False


TOUCHED = {
    f"{n:,} rows, {'Zipf' if zipf else 'uniform'}": Touched(n, zipf)
    for n in (10, 100, 1_000, 10_000) for zipf in (False, True)
}


@dataclass(frozen=True)
class Case:
    """One group of measurements that may be compared with each other."""

    job: str                # a rule's id, PIPELINE, OUTER or ROWS
    workload: str           # a key of MODELS, or the length of a single vector or of a table
    dtype: str = "float32"
    threads: int = 1
    storage: str | None = None      # a key of STORAGES; None: all arrays are of `dtype`
    outer: str | None = None        # a key of OUTERS, of an outer step
    touched: str | None = None      # a key of TOUCHED, of a step on rows

    @property
    def stored(self) -> Storage:
        """What the arrays are kept in."""
        return STORAGES[self.storage] if self.storage else Storage(*[self.dtype] * 3)

    @property
    def replicas(self) -> Replicas:
        """What takes the gradient's place in an outer step; of others none."""
        return OUTERS[self.outer] if self.outer else Replicas(0)

    @property
    def variant(self) -> str:
        """What reports call it, where job, workload and threads are the same."""
        return self.touched or self.outer or self.storage or self.dtype

    @property
    def noisy(self) -> bool:
        """Whether a step rounds by noise."""
        stored = self.stored
        kept = [*[stored.param] * (stored.master is None), *[stored.velocity] * self.n_states]
        narrow = any(name in reference.FRACTION_BITS for name in kept)
        return narrow and stored.rounding == "stochastic"

    @property
    def rule(self) -> reference.Rule:
        """The row of the table of rules."""
        named = {PIPELINE: "nesterov", OUTER: "nesterov", ROWS: "momentum"}
        return RULES[named.get(self.job, self.job)]

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
        named = {PIPELINE: "full pipeline", OUTER: "outer step", ROWS: "row by row"}
        return named.get(self.job, self.rule.label)

    @property
    def n_states(self) -> int:
        """Arrays that the rule has besides parameter and gradient."""
        return len(self.rule.states)

    @property
    def bytes_each(self) -> int:
        """Bytes that a step must move for each parameter."""
        stored = self.stored
        written = [stored.param, stored.master_dtype, *[stored.velocity] * self.n_states]
        read = [stored.grad]
        if self.outer:
            read *= self.replicas.n * (1 + self.replicas.write_back)
        if self.pipeline:
            # It reads the gradient twice and zeroes it, and updates the average.
            written.append(stored.param)
            read *= 3
        return sum(dtype_of(name).itemsize for name in [*written * 2, *read] if name)

    @property
    def counted(self) -> bool:
        """Whether a step depends on how many were taken before."""
        return "step" in self.rule.scalars

    @property
    def n_bytes(self) -> int:
        """Bytes that a step must move."""
        stepped = TOUCHED[self.touched].n * WIDTH if self.touched else count_of(self.workload)
        return self.bytes_each * stepped

    @property
    def options(self) -> reference.Options:
        """The hyper-parameters of the rule alone, at its first step."""
        return reference.Options(
            lr=OUTER_LR if self.outer else LR,
            momentum=MOMENTUM if self.rule.has_momentum else 0.0,
            weight_decay=WEIGHT_DECAY if self.rule.decouples else 0.0,
        )

    def optimizer(self, params: Any, **more: Any) -> optcore.optimizer.Optimizer:
        """Return the whole-model optimizer."""
        options = {key: getattr(self.options, key) for key in ("lr", *self.rule.scalars)}
        options.pop("step", None)       # it counts them itself
        if self.storage:
            options |= {"seed": SEED, **self.stored.options}
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
    warm_up: int = 1        # calls until all that it works on has been there once
    # One period of the parameters after two steps, where it rounds otherwise than the reference
    expected: np.ndarray | None = None
    close: Callable[[], object] = bool


class Arrays:
    """Parameters and gradients, or replicas' parameters, where a fresh process has them."""

    def __init__(self, case: Case) -> None:
        self.case = case
        shapes = shapes_of(case.workload)
        rng = np.random.default_rng(7)
        types = {"x": case.stored.param, "g": case.stored.grad}
        self.pattern = {
            name: kept_in(dtype, rng.standard_normal(PERIOD)) for name, dtype in types.items()
        }
        self.x, *self.sets = (
            [fresh_empty(shape, dtype_of(dtype)) for shape in shapes]
            for dtype in [types["x"], *[types["g"]] * max(1, case.replicas.n)]
        )
        self.g = self.sets[0]

    def states(self) -> list[list[np.ndarray]]:
        """Return zeros for each state, an array a tensor, as a user allocates them."""
        return [[_filled(0, x) for x in self.x] for _ in self.case.rule.states]

    def copies(self) -> list[np.ndarray]:
        """Return arrays for an average, which starts from the parameters."""
        return [_filled(x, x) for x in self.x]

    def reset(self) -> None:
        """Return to the state before the first step."""
        for x in self.x:
            _repeat(self.pattern["x"], x)
        self.reset_gradients()

    def reset_gradients(self) -> None:
        """Fill the gradients, or replicas, as they are before the first step."""
        for k, arrays in enumerate(self.sets):
            for g in arrays:
                _repeat(np.roll(self.pattern["g"], k), g)

    def _mean(self, weights: Sequence[float] | None) -> np.ndarray:
        """Return one period of the replicas' mean."""
        sets = [np.roll(self.pattern["g"], k) for k in range(len(self.sets))]
        if weights is not None:
            return reference.weighted(sets, weights)
        return sets[0].dtype.type(1 / len(sets)) * reduce(np.add, sets)

    @cached_property
    def expected(self) -> tuple[np.ndarray, np.ndarray | None]:
        """One period of the parameters and averages after two steps."""
        return self.expected_from(0)

    def expected_from(
        self, begin: int, tensor: int = 0, weights: Sequence[float] | None = None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Return as much from an element on, where a run of the noise begins.

        Of an outer step it is what weights of the replicas make of it.
        """
        case, stored = self.case, self.case.stored
        at = np.arange(begin, begin + PERIOD) % PERIOD
        x, g = self.pattern["x"][at], self.pattern["g"][at]
        states = [kept_in(stored.velocity, np.zeros(PERIOD)) for _ in case.rule.states]
        average = x if case.pipeline else None
        if stored.master:
            x = reference.widened(x)
        for count in range(2):
            options, how = replace(case.options, step=count + 1), {}
            if case.noisy:
                key = reference.noise_key(SEED, count, tensor)
                key = (key + begin // reference.GRID * NEXT_RUN) % 2**64
                how = {"rounding": stored.rounding, "noise_key": key}
            if case.pipeline:
                norm = _norm(g, [a.size for a in self.x])
                options = replace(
                    options, weight_decay=WEIGHT_DECAY,
                    grad_scale=min(1.0, MAX_NORM / (norm + 1e-6)),
                )
            if case.outer:
                g = x - self._mean(weights)
            x, states = case.rule.reference(x, g, states, options, **how)
            if case.pipeline:
                average = reference.averaged(average, x, EMA_DECAY)
                g = np.zeros_like(g)
        if stored.master:
            x = reference.split(x)[0] if stored.master == "split" else kept_in(stored.param, x)
        return x, average

    def _stretches(
        self, run: Run, tensor: int, n: int
    ) -> Iterator[tuple[int, tuple[np.ndarray, np.ndarray | None]]]:
        """Yield where the stretches of a tensor begin that are compared, and what is expected."""
        if run.expected is not None or not self.case.noisy:
            expected = self.expected if run.expected is None else (run.expected, None)
            for begin in range(0, n, PERIOD):
                yield begin, expected
            return
        spread = np.linspace(0, max(0, n - PERIOD), min(NOISY_STRETCHES, -(-n // PERIOD)))
        for begin in spread.astype(int):
            begin += -begin % reference.GRID
            yield begin, self.expected_from(int(begin), tensor)

    def check(self, run: Run, *, exact: bool) -> None:
        """Take two steps and compare with the reference: bits, or closeness of a peer.

        Raises
        ------
        AssertionError
            Where they differ; nothing may be timed then.
        """
        run.step()
        if not self.case.pipeline:
            # Some peers (PyTorch's foreach Nesterov) change them, and writing back does
            self.reset_gradients()
        run.step()
        for column, results in enumerate([run.params(), run.averages()]):
            for i, result in enumerate(results):
                flat = np.asarray(result).reshape(-1)
                for begin, expected in self._stretches(run, i, flat.size):
                    same = _compare(flat[begin : begin + PERIOD], expected[column], exact)
                    assert same, f"tensor {i} is not what the reference has"
        if self.case.replicas.write_back:
            for k, arrays in enumerate(self.sets):
                for p, x in zip(arrays, run.params(), strict=True):
                    assert reference.same_bits(p, np.asarray(x)), f"replica {k} is not written"


def dtype_of(name: str) -> np.dtype:
    """Return a dtype by its name; NumPy has none of bfloat16."""
    return reference.BFLOAT16 if name == "bfloat16" else np.dtype(name)


def kept_in(name: str, values: np.ndarray) -> np.ndarray:
    """Return values in a type, the nearest."""
    if name in reference.FRACTION_BITS:
        return reference.rounded(values.astype(np.float32), name)
    return values.astype(name)


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


def _compare(part: np.ndarray, period: np.ndarray, exact: bool) -> bool:
    want = period[: part.size]
    if exact:
        return reference.same_bits(part, want)
    if (name := reference.type_name(want)) in reference.FRACTION_BITS:
        # A step is tens of ulp: two of each value, or of the largest that was added to one.
        part, want = reference.widened(part), reference.widened(want)
        unit = 2.0 ** -reference.FRACTION_BITS[name]
        size = np.abs(want)
        return bool(np.all(np.abs(part - want) <= 2 * unit * np.maximum(size, LR * size.max())))
    # A few ulp at the largest values for those that may round otherwise than the reference.
    tolerance = 16 * np.finfo(period.dtype).eps * np.abs(period).max()
    return np.allclose(part, want, rtol=0, atol=tolerance)
