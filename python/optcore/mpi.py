"""The step over several machines: gradients averaged over MPI ranks, state on each or split.

Or parameters averaged after some steps of each rank alone, which sends less.

Every rank holds the whole model and calls every method of an optimizer here, in the same order,
as MPI's collective operations ask. Before a step or a load touches anything, all ranks learn
whether all of them can go on and agree on what to do: a rank whose arrays are refused raises
its own error, the others one that names the rank, and nobody waits for somebody who is gone.
"""
from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

try:
    from mpi4py import MPI
    from mpi4py.util import pkl5
except (ImportError, RuntimeError) as _missing:  # RuntimeError: mpi4py without an MPI library
    raise ImportError(
        "optcore.mpi needs mpi4py and an MPI library: pip install 'optcore[mpi]'"
    ) from _missing

from optcore import checkpoint
from optcore._state import NotFound, State
from optcore._structure import Group
from optcore.adaptive import AdaGrad, Adam, AdamW, RMSProp
from optcore.arrays import has_nonzero, name_of_dtype, widen
from optcore.groups import GROUP_NOTES, OWN_KEYS
from optcore.optimizer import Optimizer
from optcore.options import GROUP_OPTIONS, OPTIMIZER_OPTIONS, is_schedule
from optcore.plan import BOUND, RUN
from optcore.rows import Rows
from optcore.sgd import SGD
from optcore.structure import Nest

__all__ = [
    "DataParallelAdaGrad", "DataParallelAdam", "DataParallelAdamW", "DataParallelRMSProp",
    "DataParallelSGD", "LocalSGD", "ShardedAdaGrad", "ShardedAdam", "ShardedAdamW",
    "ShardedRMSProp", "ShardedSGD",
]

# An error of one rank is raised on the others too; elsewhere classes may want other arguments.
OWN_ERRORS = ("builtins", checkpoint.__name__)

# Keys of groups that ranks may have each for themselves, or that are compared otherwise
NO_OPTIONS = (*OWN_KEYS, *GROUP_NOTES)

# Elements that one call hands to MPI. Its counts are C ints; half of what those hold, because
# libraries add counts up in an int themselves.
MAX_COUNT = 1 << 30

# Why there is no outer step over replicas that one rank holds
OUTER = "the ranks are the replicas; LocalSGD(params, comm, ...).sync() takes all ranks' parameters"

# Where LocalSGD takes no gradients, and no steps that its own step() would not count
INNER = "gradients are the inner optimizer's; call opt.inner.{name}()"
ROUND = INNER + ", whose steps step() does not count, and sync() at the end of a round"

T = TypeVar("T")


def _retold(failure: BaseException, rank: int) -> BaseException:
    """Return what other ranks raise: the nearest class to this rank's that a message makes."""
    refused = f"refused on rank {rank}"
    if isinstance(failure, OSError) and failure.errno is not None:
        return OSError(failure.errno, f"{refused}: {failure.strerror}", failure.filename)
    for kind in type(failure).__mro__:
        if kind in (Exception, BaseException):
            break
        if kind.__module__ in OWN_ERRORS:
            with contextlib.suppress(TypeError):    # UnicodeDecodeError wants more
                retold: BaseException = kind(f"{refused}: {failure}")
                return retold
    return RuntimeError(f"{refused}: {failure}")


def _pieces(flat: np.ndarray) -> list[np.ndarray]:
    """Cut a flat array into what one call can take."""
    return [flat[start : start + MAX_COUNT] for start in range(0, flat.size, MAX_COUNT)]


def _bcast_object(comm: MPI.Intracomm, value: T) -> T:
    """Give every rank rank 0's object, of any size: `comm.bcast` ends at 2 GiB."""
    given: T = pkl5.Intracomm(comm).bcast(value)
    return given


def _agree(comm: MPI.Intracomm, check: Callable[[], tuple[T, list[str]]]) -> T:
    """Run `check` on every rank; raise on all of them unless all succeed and say the same.

    `check` returns a result and lines about it. One small reduction decides; what went wrong is
    only told where something did.
    """
    failure: BaseException | None = None
    lines: list[str] = []
    try:
        result, lines = check()
    except BaseException as error:
        failure = error
    said = hashlib.blake2b("\n".join(lines).encode(), digest_size=7)
    number = int.from_bytes(said.digest(), "little")
    votes = np.array([failure is None, number, -number], np.int64)
    comm.Allreduce(MPI.IN_PLACE, votes, MPI.MIN)
    if votes[0] and votes[1] == -votes[2]:
        return result
    retold = comm.allgather(None if failure is None else _retold(failure, comm.rank))
    if failure is not None:
        raise failure
    for refusal in retold:
        if refusal is not None:
            raise refusal
    pairs = itertools.zip_longest(_bcast_object(comm, lines), lines, fillvalue="nothing")
    odd = next(((first, other) for first, other in pairs if first != other), None)
    for rank, pair in enumerate(comm.allgather(odd)):
        if pair is not None:
            raise ValueError(
                f"ranks must agree, got {pair[0]} on rank 0 and {pair[1]} on rank {rank}"
            )
    raise AssertionError("the votes differ, so do the reports")


def _read_on_first(comm: MPI.Intracomm, path: checkpoint.FilePath) -> dict[str, Any]:
    """Read a checkpoint on rank 0 for all: they need no common disk, and see the same file."""
    return _bcast_object(
        comm, _agree(comm, lambda: (checkpoint.read(path) if comm.rank == 0 else {}, []))
    )


def _flattened(array: np.ndarray, param: np.ndarray) -> np.ndarray:
    """Return an array in its parameter's order of memory; a view where it has that order."""
    return array.reshape(-1, order="C" if param.flags.c_contiguous else "F")


def _raw(array: np.ndarray) -> np.ndarray:
    """Return what MPI can take of an array: the bits of half types, which it does not know."""
    return array.view(np.uint16) if array.itemsize == 2 else array


def _join_squares(
    comm: MPI.Intracomm, n_params: int, total: float, found: list[int]
) -> tuple[float, list[int]]:
    """Return the sum of squares, and the parameters that are not finite, of all shards."""
    sums = np.zeros(1 + n_params)
    sums[0] = total
    sums[[1 + i for i in found]] = 1
    comm.Allreduce(MPI.IN_PLACE, sums)
    return float(sums[0]), np.flatnonzero(sums[1:]).tolist()


def _send_shards(comm: MPI.Intracomm, shards: list[np.ndarray]) -> None:
    """Give all ranks each one's shard where one call cannot: pieces of the shards lie apart."""
    for rank, shard in enumerate(shards):
        for piece in _pieces(shard):
            comm.Bcast(piece, root=rank)


def _join(comm: MPI.Intracomm, arrays: list[np.ndarray]) -> list[np.ndarray]:
    """Return each of these flat arrays of one dtype with those of all ranks, in their order."""
    n = len(arrays)
    sizes = np.empty((comm.size, n), np.int64)
    comm.Allgather(np.array([array.size for array in arrays], np.int64), sizes)
    counts = sizes.sum(axis=1)
    whole = np.empty(counts.sum(), arrays[0].dtype)
    shards = np.split(whole, counts.cumsum()[:-1])
    np.concatenate(arrays, out=shards[comm.rank])
    if whole.size <= MAX_COUNT:
        comm.Allgatherv(MPI.IN_PLACE, (whole, counts))
    else:
        _send_shards(comm, shards)
    parts = np.split(whole, sizes.ravel().cumsum()[:-1])
    return [np.concatenate(parts[k::n]) for k in range(n)]


def _places(arrays: list[np.ndarray]) -> set[tuple[int, int]]:
    return {(array.ctypes.data, array.nbytes) for array in arrays}


def _zero(grads: Sequence[Any]) -> None:
    for gradient in grads:
        if gradient is not None:
            gradient[...] = 0


class _Flat:
    """Arrays of one type end to end, each padded, so that all are cut between runs of noise.

    Attributes
    ----------
    places : dict
        Where the array of each index lies.
    whole : ndarray
        The buffer that travels, of the arithmetic type; `bits` is its memory for half types.
    share : int
        Elements of each rank's part.
    """

    def __init__(self, params: list[np.ndarray], name: str, comm: MPI.Intracomm) -> None:
        self.places: dict[int, slice] = {}
        end = 0
        for i, param in enumerate(params):
            if name_of_dtype(param) == name:
                self.places[i] = slice(end, end + param.size)
                end += -(-param.size // RUN) * RUN
        self.share = -(-end // (comm.size * RUN)) * RUN
        self.start = comm.rank * self.share
        size = comm.size * self.share
        self.whole = np.zeros(size, np.float64 if name == "float64" else np.float32)
        self.bits = self.whole.view(np.uint16)[:size]

    def without(self, left_out: Container[int]) -> list[np.ndarray]:
        """Return the buffer but for the places of some arrays."""
        bounds = [*(place.start for place in self.places.values()), self.whole.size]
        runs = itertools.groupby(zip(self.places, bounds, bounds[1:], strict=False),
                                 lambda span: span[0] in left_out)
        kept = [list(run) for out, run in runs if not out]
        return [self.whole[run[0][1] : run[-1][2]] for run in kept]

    def cut(self, i: int) -> tuple[slice, slice]:
        """Return this rank's part of array `i`, often empty, and where in the shard it lies."""
        place = self.places[i]
        low, high = (
            min(max(bound, place.start), place.stop)
            for bound in (self.start, self.start + self.share)
        )
        return (
            slice(low - place.start, high - place.start),
            slice(low - self.start, high - self.start),
        )


def _lay_flat(
    params: list[np.ndarray], comm: MPI.Intracomm
) -> tuple[list[_Flat], list[np.ndarray]]:
    """Return a flat buffer a type of parameters, and in them a place like each parameter."""
    flats = [_Flat(params, name, comm) for name in dict.fromkeys(map(name_of_dtype, params))]
    places = {i: flat.whole[place] for flat in flats for i, place in flat.places.items()}
    return flats, [
        places[i].reshape(param.shape, order="C" if param.flags.c_contiguous else "F")
        for i, param in enumerate(params)
    ]


def _param_lines(groups: list[dict[str, Any]], lent: Sequence[Any] | None) -> list[str]:
    """Describe all parameters, for ranks to agree on."""
    names = [name for group in groups
             for name in group["param_names"] or (None,) * len(group["params"])]
    params = [param for group in groups for param in group["params"]]
    return [
        f"params[{i}]{'' if name is None else f' ({name!r})'} of {name_of_dtype(param)} "
        f"{param.shape} in {'C' if param.flags.c_contiguous else 'Fortran'} order"
        f"{'' if velocity is None else ' with a velocity'}"
        for i, (name, param, velocity) in enumerate(
            zip(names, params, lent or (None,) * len(params), strict=True)
        )
    ]


def _group_lines(groups: list[dict[str, Any]]) -> list[str]:
    return [f"param_groups[{g}] with {name}={group[name]!r}"
            for g, group in enumerate(groups) for name in group if name not in NO_OPTIONS]


def _numbers(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the options of groups for comparison: ranks have different functions as schedules."""
    return [{name: "a schedule" if is_schedule(group[name]) else group[name]
             for name in group if name not in NO_OPTIONS} for group in groups]


def _refused(name: str, why: str) -> Callable[..., Any]:
    """Return what stands for a method that an optimizer here cannot have."""
    why = why.format(name=name)

    def method(self: Optimizer, *arguments: Any, **options: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has no {name}(): {why}")

    method.__name__, method.__doc__ = name, f"Refuse: {why}."
    return method


class _Distributed(Optimizer):
    """What the optimizers share: agreement, the order of a step, and checkpoints."""

    __slots__ = ("_averaged", "_comm", "_flats", "_lags", "_packed")

    _comm: MPI.Intracomm
    _lags: bool                     # whether rows may have steps to catch up, on all ranks alike
    _flats: list[_Flat]
    _packed: list[np.ndarray]       # in those, a place for each gradient
    _averaged: list[np.ndarray]     # where the averaged gradients of this rank's plan appear

    def __init__(self, params: Any, comm: MPI.Intracomm, **options: Any) -> None:
        if not isinstance(comm, MPI.Intracomm):
            raise TypeError(f"comm must be an MPI intracommunicator, got {type(comm).__name__}")
        self._comm, self._lags = comm, False

        def build() -> tuple[None, list[str]]:
            base: Any = super(_Distributed, self)   # the optimizer that this stands before
            base.__init__(params, **options)
            decay = "a schedule" if is_schedule(self.ema_decay) else self.ema_decay
            return None, [*_param_lines(self._checking.param_groups, self._lent),
                          *_group_lines(_numbers(self.param_groups)), *self._own_lines(decay)]

        _agree(comm, build)
        self._start_alike(0)

    def __reduce__(self) -> tuple[Any, ...]:
        """Refuse: a communicator cannot be copied."""
        raise TypeError(
            f"{type(self).__name__} holds a communicator and cannot be copied or pickled: build "
            "one on every rank over the copied parameters and load this one's state_dict()"
        )

    @property
    def comm(self) -> MPI.Intracomm:
        """The ranks that train together."""
        return self._comm

    def _start_alike(self, first: int) -> None:
        """Give all ranks rank 0's parameters and given velocities, from number `first` on."""
        lent = (self._lent or ())[first:]
        self._take_first((*self._whole_params[first:], *lent))
        self._copy_params()
        for entry, param in zip(self._state[first:], self._own_params[first:], strict=True):
            if entry["ema"] is not None:
                widen(param, entry["ema"])
        if any(velocity is not None for velocity in lent):
            # Whether they have started was seen before they came from rank 0.
            started = [{} if velocity is None else {"first_step": not has_nonzero(velocity)}
                       for velocity in lent]
            self._restore(self.param_groups, [*({},) * first, *started], {},
                          (self.step_count, self.skipped))

    def _take_first(self, arrays: Sequence[np.ndarray | None]) -> None:
        """Give all ranks rank 0's values."""
        for array in arrays:
            if array is not None:
                for piece in _pieces(_raw(_flattened(array, array))):
                    self._comm.Bcast(piece)

    @property
    def _own_params(self) -> list[np.ndarray]:
        """What this rank's plan steps."""
        return [param for group in self.param_groups for param in group["params"]]

    def _copy_params(self) -> None:
        """Give `_own_params` the caller's values, where they are not the caller's memory."""

    @property
    def _checking(self) -> Optimizer:
        """The plan over the caller's whole arrays, which knows what gradients must be."""
        raise NotImplementedError

    def _reduce(self, left_out: Container[int] = ()) -> None:
        """Sum the packed gradients over all ranks into `_averaged`, which `step` scales.

        There is nothing in the places of those `left_out`.
        """
        raise NotImplementedError

    def _share_params(self) -> None:
        """Give every rank what the others have stepped."""

    @property
    def state_nbytes(self) -> int:
        """Bytes of states, averages and what masters keep beside parameters, on this rank."""
        arrays = itertools.chain(self._masters, *(entry.values() for entry in self._state))
        return sum(array.nbytes for array in arrays if isinstance(array, np.ndarray))

    def _own_lines(self, decay: Any) -> list[str]:
        options = {name: getattr(self, name) for name in OPTIMIZER_OPTIONS} | {"ema_decay": decay}
        return [f"{name}={value!r}" for name, value in options.items()]

    def _step_lines(self, values: list[dict[str, Any]], decay: float) -> list[str]:
        return [f"step {self.step_count}", *_group_lines(values), *self._own_lines(decay)]

    def step(
        self, grads: Any = BOUND, *, grad_scale: float = 1.0, zero_grad: bool = False
    ) -> bool:
        """Take one step with the mean of all ranks' gradients.

        Parameters and return value are those of `optcore.SGD.step`. `grad_scale` multiplies
        the mean; a gradient of None must be None on every rank, and where one is Rows all are, of
        any number of rows.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            As `optcore.SGD.step`, on all ranks where it is raised on one; ValueError also where
            ranks disagree on options, step count or gradients of None or Rows. Nothing has changed
            then.
        """
        def check() -> tuple[tuple[Any, ...], list[str]]:
            listed, values, decay = self._checking._check_step(grads, grad_scale, zero_grad)
            own = [None if gradient is None else average
                   for gradient, average in zip(listed, self._averaged, strict=True)]
            missing = [i for i, gradient in enumerate(listed) if gradient is None]
            by_rows = [i for i, gradient in enumerate(listed) if type(gradient) is Rows]
            if self._checking is not self:      # schedules are asked once, by the plan that steps
                if by_rows:
                    raise TypeError(
                        f"grads must be arrays, got Rows at {by_rows}: {type(self).__name__} cuts "
                        "parameters within rows; DataParallelSGD and its kin take them"
                    )
                _, values, decay = self._check_step(self._structured(own), grad_scale, False)
            scale = float(grad_scale)
            lags = bool(by_rows) and any(group["lazy"] == "exact" for group in values)
            return (listed, own, lags, scale, decay), [
                f"grad_scale={scale!r}", f"grads that are None at {missing}",
                f"grads that are Rows at {by_rows}", *self._step_lines(values, decay),
            ]

        listed, own, lags, scale, decay = _agree(self.comm, check)
        self._lags |= lags
        left_out = {i for i, gradient in enumerate(listed) if not isinstance(gradient, np.ndarray)}
        for i, packed in enumerate(self._packed):
            if i not in left_out:
                widen(listed[i], packed)
        self._reduce(left_out)
        self._join_rows(listed, own)
        stepped = self._step_as_checked(self._structured(own), scale / self.comm.size, decay)
        if stepped:
            self._share_params()
        if zero_grad:
            _zero(listed)
        return stepped

    def _join_rows(self, listed: Sequence[Any], into: list[Any]) -> None:
        """Put in the place of each Rows those of all ranks, one rank's after the other's."""
        for flat in self._flats:
            there = [i for i in flat.places if type(listed[i]) is Rows]
            if not there:
                continue
            own = [np.empty(listed[i].values.shape, flat.whole.dtype) for i in there]
            for i, values in zip(there, own, strict=True):
                widen(listed[i].values, values)
            of_all = zip(
                there, _join(self.comm, [listed[i].indices.astype(np.int64) for i in there]),
                _join(self.comm, [values.ravel() for values in own]), strict=True
            )
            for i, indices, values in of_all:
                shape = (len(indices), *listed[i].values.shape[1:])
                into[i] = Rows(indices, values.reshape(shape))

    step_replicas = _refused(
        "step_replicas", "the ranks are the replicas; add up gradients with accumulate() and call "
        "step(), where ranks have weights after multiplying each rank's gradients by its weight * "
        "ranks / sum of weights")
    outer_step = _refused("outer_step", OUTER)
    collecting = _refused("collecting", OUTER)
    stepping = _refused(
        "stepping", "ranks agree on a whole step before any of it is written; give step() all "
        "gradients at once")
    accumulating = _refused(
        "accumulating", "velocities take the mean over ranks, not gradients of one; add these up "
        "with accumulate() and call step()")

    def load_state_dict(self, state_dict: Mapping[str, Any], *, by_name: bool = False) -> NotFound:
        """Go on from what `optcore.SGD.state_dict` of any optimizer returned, on all ranks.

        As `optcore.SGD.load_state_dict`; the state is whole, whatever number of ranks it comes
        from. Collective.

        Raises
        ------
        KeyError, TypeError, ValueError
            As there, on all ranks where it is raised on one; also where ranks are given
            different states.
        """
        def check() -> tuple[State, list[str]]:
            self._checking._check_current()
            state = State(self, state_dict, by_name)
            text, tensors = checkpoint.split(state_dict)
            return state, [f"by_name={bool(by_name)}",
                           f"a state with SHA-256 {checkpoint.digest(text, tensors)}"]

        state = _agree(self.comm, check)
        self._apply(state)
        self._settle(state)
        return state.not_found

    def _apply(self, state: State) -> None:
        def apply() -> tuple[None, list[str]]:
            state.apply()
            return None, []

        _agree(self.comm, apply)

    def _settle(self, state: State) -> None:
        """Bring what was loaded to all places where it is kept."""
        if state.writes_masters:    # of which each rank may have a part
            self._share_params()

    def save(self, path: checkpoint.FilePath, *, include_params: bool = False) -> None:
        """Write a checkpoint as `optcore.SGD.save` does, on rank 0. Collective.

        Raises
        ------
        KeyError, MemoryError, OSError, RuntimeError, TypeError, ValueError
            As there, of one class on all ranks; ValueError also where ranks have taken different
            numbers of steps. The old file stays.
        """
        def collect() -> tuple[dict[str, Any], list[str]]:
            contents = self._all_contents(include_params)
            return contents, [f"step {contents['step_count']}"]

        contents = _agree(self.comm, collect)   # before rank 0 replaces an old file

        def write() -> tuple[None, list[str]]:
            if self.comm.rank == 0:
                checkpoint.write(path, contents)
            return None, []

        _agree(self.comm, write)

    def restore(self, path: checkpoint.FilePath, *, by_name: bool = False) -> NotFound:
        """Go on from a checkpoint as `optcore.SGD.restore` does, read by rank 0. Collective.

        Raises
        ------
        CheckpointError, MemoryError, OSError, TypeError
            As there, on all ranks.
        """
        return self._resume(path, _read_on_first(self.comm, path), by_name)

    @classmethod
    def _read(cls, path: checkpoint.FilePath, more: Mapping[str, Any]) -> dict[str, Any]:
        if "comm" not in more:
            raise TypeError(f"{cls.__name__}.load() needs a communicator, comm=")
        return _read_on_first(more["comm"], path)


class _DataParallel(_Distributed):
    """Gradients are averaged over the ranks, the state is whole on every one.

    A step copies the gradients into one flat buffer a dtype, in float32 for half types, sums that
    over the ranks with Allreduce and steps with a scale of 1 / ranks. Ranks hold the same bits
    after every step: MPI gives them identical sums. Up to two ranks they are the bits of
    `optcore.{base}.step_replicas`; beyond, MPI chooses the order of the sum.

    Rows are gathered by their indices: each rank steps those of all, one rank's after the other's.
    While steps have left some behind, ``state_dict`` is collective, as `catch_up` is.
    """

    __slots__ = ()

    def _build(self, groups: list[Group], nest: Nest | None, **options: Any) -> None:
        super()._build(groups, nest, **options)
        self._flats, self._packed = _lay_flat(self._whole_params, self._comm)
        self._averaged = self._packed

    def add_param_group(
        self, param_group: Mapping[str, Any], *, grads: Any = None, velocities: Any = None
    ) -> None:
        """Step more parameters, as `optcore.SGD.add_param_group`. Collective.

        The new parameters take rank 0's values.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            As there, on all ranks where it is raised on one; ValueError also where ranks add
            different groups. Nothing has changed then.
        """
        n = len(self._whole_params)
        self._settle_rows()

        def check() -> tuple[Any, list[str]]:
            groups, nests = self._with_group(param_group)
            grown = self._grown(groups, nests, grads, velocities)
            flats = _lay_flat([param for group in grown.param_groups for param in group["params"]],
                              self._comm)
            return (groups, nests, grown, flats), [
                *_param_lines(grown.param_groups, grown._lent),
                *_group_lines(_numbers(grown.param_groups)),
            ]

        groups, nests, grown, (self._flats, self._packed) = _agree(self._comm, check)
        self._averaged = self._packed
        self._take_grown(grown, lambda: self._note_group(
            groups, nests, param_group, grads, velocities))
        self._start_alike(n)

    @property
    def _checking(self) -> Optimizer:
        return self

    def _reduce(self, left_out: Container[int] = ()) -> None:
        for flat in self._flats:
            for part in flat.without(left_out):
                for piece in _pieces(part):
                    self.comm.Allreduce(MPI.IN_PLACE, piece)

    def catch_up(self, key: Any = None, rows: Any = None) -> None:
        """Bring rows up to date before they are read, as `optcore.SGD.catch_up`. Collective.

        What rounds at another time has other bits: every rank brings up to date what any of them
        names, be it no row.

        Raises
        ------
        KeyError, IndexError, TypeError, ValueError, RuntimeError
            As there, on all ranks where it is raised on one, with the position among all ranks'
            rows; ValueError also where ranks differ in `key`. Nothing has changed then.
        """
        def check() -> tuple[np.ndarray | None, list[str]]:
            self._check_current()
            lines = [f"catch_up({key!r}) of {'all' if rows is None else 'some'} rows"]
            if rows is None:
                return None, lines
            given = np.asarray(rows).ravel()
            # No row, or what it refuses: only checks
            checked = given if given.dtype.kind not in "iu" else given[:0]
            super(_DataParallel, self).catch_up(key, checked)
            return given.astype(np.int64), lines

        mine = _agree(self.comm, check)
        super().catch_up(key, None if mine is None else _join(self.comm, [mine])[0])
        self._lags = self._lags and key is not None

    def _settle_rows(self) -> None:
        """Bring all rows up to date on all ranks, lest one of them does it alone."""
        if self._lags:
            self.catch_up()

    def _snapshot(self, include_params: bool = False, copies: bool = False) -> dict[str, Any]:
        self._settle_rows()
        return super()._snapshot(include_params, copies)


class _Sharded(_Distributed):
    """Gradients are averaged over the ranks, the state is split over them.

    States and averages take 1 / ranks of their memory on each (ZeRO, stage 1; Rajbhandari et
    al., 2020). The parameters are laid end to end, a buffer a dtype, and cut into equal shards,
    between runs of 256 elements of each; a step sums the gradients with Reduce_scatter, steps this
    rank's shard where it lies in the parameters, and collects the shards with Allgather, those of
    half types as they are. Noise is drawn as for whole parameters, and these have the bits of
    `DataParallel{base}` where MPI adds up in the same order and ``max_norm`` does not act: the norm
    is a sum over shards.

    ``param_groups[g]["params"]`` are this rank's parts, one for each parameter, many of them
    empty. `ema`, `save` and ``state_dict`` collect from all ranks, hence are collective.
    """

    __slots__ = ("_sums", "_whole")

    def _build(
        self, groups: list[Group], nest: Nest | None, *, grads: Any = None, velocities: Any = None,
        **options: Any,
    ) -> None:
        if velocities is not None:
            raise TypeError(
                "velocities must be left out, since every rank keeps a part of each, got some: "
                "load_state_dict() of a state that has them"
            )
        self._whole = SGD.__new__(SGD)      # without a velocity: it checks and never steps
        self._whole._build([
            group._replace(options={
                **GROUP_OPTIONS["sgd"], "lr": 0.0, "master": None, "lazy": "rows",
                **{key: group.options[key] for key in ("params", "param_names")},
            }) for group in groups
        ], nest, options={}, grads=grads)
        params = self._whole_params
        self._flats, self._packed = _lay_flat(params, self._comm)
        self._sums = [np.zeros(flat.share, flat.whole.dtype) for flat in self._flats]
        cuts = {i: flat.cut(i) for flat in self._flats for i in flat.places}
        averaged = {
            i: sums[cuts[i][1]]
            for flat, sums in zip(self._flats, self._sums, strict=True) for i in flat.places
        }
        self._averaged = [averaged[i] for i in range(len(params))]
        parts = iter(self._stepped(params))
        super()._build([
            Group({**group.options, "params": tuple(next(parts) for _ in group.options["params"])},
                  None, None, None)
            for group in groups
        ], nest, grads=None, firsts=[cuts[i][0].start for i in range(len(params))], **options)
        self._join_squares = functools.partial(_join_squares, self.comm, len(params))

    add_param_group = _refused(
        "add_param_group", "it would share out all states anew; build one over all parameters and "
        "give it this one's state by load_state_dict(old.state_dict(), by_name=True)")

    catch_up = _refused(
        "catch_up", "it cuts parameters within rows and takes no Rows; DataParallelSGD and kin do")

    @property
    def _checking(self) -> Optimizer:
        return self._whole

    @property
    def _whole_params(self) -> list[np.ndarray]:
        return self._whole._whole_params

    def _own_part(self, arrays: list[Any]) -> list[Any]:
        params = self._whole_params
        parts: list[Any] = [None] * len(arrays)
        for flat in self._flats:
            for i in flat.places:
                if arrays[i] is not None:
                    parts[i] = _flattened(arrays[i], params[i])[flat.cut(i)[0]]
        return parts

    def _stepped(self, params: list[np.ndarray]) -> list[np.ndarray]:
        """Return this rank's parts of the parameters, where they are stepped."""
        return self._own_part(params)

    def _collect(self, parts: Sequence[Any], into: Sequence[Any]) -> None:
        """Write every rank's parts of arrays into whole ones, laid out as the parameters are.

        Both are None for the parameters without such an array.
        """
        for flat, halves in itertools.product(self._flats, (False, True)):
            there = {i: place for i, place in flat.places.items()
                     if parts[i] is not None and (parts[i].itemsize == 2) is halves}
            if not there:
                continue
            whole = flat.bits if halves else flat.whole
            shards = np.split(whole, self.comm.size)
            for i in there:
                shards[self.comm.rank][flat.cut(i)[1]] = _raw(parts[i])
            if whole.size <= MAX_COUNT:
                self.comm.Allgather(MPI.IN_PLACE, whole)
            else:
                _send_shards(self.comm, shards)
            for i, place in there.items():
                _flattened(_raw(into[i]), into[i])[...] = whole[place]

    def _collected(self, parts: Sequence[Any]) -> list[Any]:
        into = [None if part is None else np.empty_like(param, part.dtype, subok=False)
                for part, param in zip(parts, self._whole_params, strict=True)]
        self._collect(parts, into)
        return into

    def _snapshot(self, include_params: bool = False, copies: bool = False) -> dict[str, Any]:
        def check() -> tuple[dict[str, Any], list[str]]:
            copied = super(_Sharded, self)._snapshot(include_params, copies)
            return copied, [f"step {copied['step_count']}", *(
                f"{'no ' if value is None else ''}{key}"
                for key, value in copied["state"][0].items()
            )]

        copied = _agree(self.comm, check)
        for key in (*self._state_names, "ema", "master", "param"):
            whole = self._collected([entry.get(key) for entry in copied["state"]])
            for entry, array in zip(copied["state"], whole, strict=True):
                if array is not None:
                    entry[key] = array
        return copied

    @property
    def ema(self) -> Any:
        """Copies of the averages, in the structure of `params`; None where none are kept.

        Collective.
        """
        averages = [entry["ema"] for entry in self._snapshot()["state"]]
        return None if averages[0] is None else self._structured(averages)

    def accumulate(self, grads: Any) -> None:
        """Add gradients into this rank's bound ones, as `optcore.SGD.accumulate`."""
        self._whole.accumulate(grads)

    def zero_grad(self) -> None:
        """Set this rank's bound gradients to zero, as `optcore.SGD.zero_grad`."""
        self._whole.zero_grad()

    def _reduce(self, left_out: Container[int] = ()) -> None:
        for flat, sums in zip(self._flats, self._sums, strict=True):
            if flat.whole.size <= MAX_COUNT:
                self.comm.Reduce_scatter_block(flat.whole, sums)
                continue
            shards = np.split(flat.whole, self.comm.size)       # as in _collect
            for rank, shard in enumerate(shards):
                for piece, total in zip(_pieces(shard), _pieces(sums), strict=True):
                    self.comm.Reduce(piece, total if rank == self.comm.rank else None, root=rank)

    def _share_params(self) -> None:
        self._collect(self._own_params, self._whole_params)


_PARAMETERS = """
    Parameters
    ----------
    params : array, sequence or mapping of arrays, or list of group dictionaries
        As for `optcore.{base}`, alike on every rank. They take rank 0's values, and so do
        velocities that are given.
    comm : mpi4py.MPI.Intracomm
        The ranks that train together.
    **options
        Those of `optcore.{base}`, alike on every rank.

    Raises
    ------
    TypeError, ValueError
        As `optcore.{base}`, on all ranks where it is raised on one; ValueError also where ranks
        differ in arrays, names or options.
    """


def _document(kind: type[_Distributed]) -> None:
    """Put into a class's text that of what it is made of."""
    way, base = kind.__bases__
    if way.__doc__ and kind.__doc__:        # there is none under python -OO
        text = way.__doc__[way.__doc__.index("\n"):].rstrip(" ") + _PARAMETERS
        kind.__doc__ += text.replace("{base}", base.__name__)


class DataParallelSGD(_DataParallel, SGD):
    """`optcore.SGD` on the mean of all ranks' gradients, the state whole on each."""

    __slots__ = ()


class DataParallelAdaGrad(_DataParallel, AdaGrad):
    """`optcore.AdaGrad` on the mean of all ranks' gradients, the state whole on each."""

    __slots__ = ()


class DataParallelRMSProp(_DataParallel, RMSProp):
    """`optcore.RMSProp` on the mean of all ranks' gradients, the state whole on each."""

    __slots__ = ()


class DataParallelAdam(_DataParallel, Adam):
    """`optcore.Adam` on the mean of all ranks' gradients, the state whole on each."""

    __slots__ = ()


class DataParallelAdamW(_DataParallel, AdamW):
    """`optcore.AdamW` on the mean of all ranks' gradients, the state whole on each."""

    __slots__ = ()


class ShardedSGD(_Sharded, SGD):
    """`optcore.SGD` on the mean of all ranks' gradients, the state split over them."""

    __slots__ = ()


class ShardedAdaGrad(_Sharded, AdaGrad):
    """`optcore.AdaGrad` on the mean of all ranks' gradients, the state split over them."""

    __slots__ = ()


class ShardedRMSProp(_Sharded, RMSProp):
    """`optcore.RMSProp` on the mean of all ranks' gradients, the state split over them."""

    __slots__ = ()


class ShardedAdam(_Sharded, Adam):
    """`optcore.Adam` on the mean of all ranks' gradients, the state split over them."""

    __slots__ = ()


class ShardedAdamW(_Sharded, AdamW):
    """`optcore.AdamW` on the mean of all ranks' gradients, the state split over them."""

    __slots__ = ()


for _way in (_DataParallel, _Sharded):
    for _kind in _way.__subclasses__():
        _document(_kind)


class LocalSGD(ShardedSGD):
    """Steps of each rank alone, then an outer step towards the mean of all ranks' parameters.

    `step` takes a step of `inner` with this rank's gradients, which sends nothing; every
    `sync_every`-th is followed by `sync`, for which the options here are: ``d = x - mean`` takes
    the place of the gradient, where x is what the parameters were after the last one, then comes
    the rule, and its result goes to all ranks. With ``lr=1`` that is averaging (local SGD,
    FedAvg), with momentum SlowMo and FedAvgM, with ``nesterov`` DiLoCo.

    The outer step is split as that of `ShardedSGD` is: x, its velocity, averages and masters take
    1 / ranks of their memory on each. It sums the parameters with Reduce_scatter, in float32 for
    half types, and collects the shards with Allgather. Ranks hold the same bits after it; up to
    two ranks they are those of `optcore.SGD.outer_step` with ``write_back=True``, beyond, MPI
    chooses the order of the sum. ``step_count``, ``state_dict``, `save` and `ema` are of the
    outer steps alone, collective, and as the last of them left it all. ``grad_norm`` is that of d.
    Loading begins a round: parameters that the state does not hold take rank 0's values as they are
    then, and `inner` stays as it is.

    Parameters
    ----------
    params : array, sequence or mapping of arrays, or list of group dictionaries
        As for `optcore.SGD`, alike on every rank. They take rank 0's values; what they are given
        afterwards counts as steps of this rank.
    comm : mpi4py.MPI.Intracomm
        The ranks that train together.
    inner : optimizer of optcore's, optional
        Steps the same arrays with this rank's gradients; it may have options of its own on each
        rank, and its state stays there. Left out where something else steps them between calls of
        `sync`.
    sync_every : int >= 1
        Steps of `inner` to an outer step, skipped ones included. Left out without `inner`.
    **options
        Those of `optcore.SGD` for the outer step, alike on every rank; but for `grads`, which
        `inner` takes, and `velocities`.

    Raises
    ------
    TypeError, ValueError
        As `optcore.SGD`, on all ranks where it is raised on one; ValueError also where `inner`
        steps other arrays, and where ranks differ in arrays, names or options.

    Notes
    -----
    Stich 2019 (local SGD), Wang et al. 2020 (SlowMo), Douillard et al. 2023 (DiLoCo).
    """

    __slots__ = ("_inner", "_inner_steps", "_sync_every")

    def __init__(
        self, params: Any, comm: MPI.Intracomm, *, inner: Optimizer | None = None,
        sync_every: int | None = None, **options: Any,
    ) -> None:
        self._inner, self._sync_every, self._inner_steps = inner, sync_every, 0
        super().__init__(params, comm, **options)

    def _build(
        self, groups: list[Group], nest: Nest | None, *, grads: Any = None, **options: Any
    ) -> None:
        if grads is not None:
            raise TypeError(
                "grads must be left out, since an outer step has none, got some: "
                "inner=optcore.SGD(params, ..., grads=grads)"
            )
        super()._build(groups, nest, **options)
        inner, every = self._inner, self._sync_every
        if inner is None:
            if every is not None:
                raise ValueError(
                    f"sync_every must be left out without inner, got {every!r}: call sync()"
                )
            return
        # Others share out their steps themselves, which step() would pass by.
        if not isinstance(inner, Optimizer) or type(inner).step is not Optimizer.step:
            raise TypeError(
                f"inner must be an optimizer of optcore's, got {type(inner).__name__}: leave it "
                "out, step the parameters and call sync()"
            )
        if isinstance(every, bool) or not isinstance(every, (int, np.integer)) or every < 1:
            raise ValueError(f"sync_every must be a whole number >= 1, got {every!r}")
        self._check_arrays()
        self._catch_up_inner()

    def _check_arrays(self) -> None:
        """Refuse parameters that are other arrays by now, or not those that `inner` steps."""
        self._whole._check_current()
        if self._inner is None:
            return
        self._inner._check_current()
        if _places(self._inner._whole_params) != _places(self._whole_params):
            raise ValueError(
                "inner must step the arrays that are in params and no others, got one over others: "
                "inner=optcore.SGD(params, ...), and where a group is added, both built anew"
            )

    step_replicas = _refused("step_replicas", ROUND)
    stepping = _refused("stepping", ROUND)
    accumulating = _refused("accumulating", ROUND)
    accumulate = _refused("accumulate", INNER)
    zero_grad = _refused("zero_grad", INNER)
    catch_up = _refused("catch_up", INNER)

    @property
    def inner(self) -> Optimizer | None:
        """The optimizer of this rank's own steps."""
        return self._inner

    @property
    def sync_every(self) -> int | None:
        """Steps of `inner` to an outer step."""
        return self._sync_every

    @property
    def inner_steps(self) -> int:
        """Calls of `step` since the ranks' parameters were last alike."""
        return self._inner_steps

    def step(
        self, grads: Any = BOUND, *, grad_scale: float = 1.0, zero_grad: bool = False
    ) -> bool:
        """Take a step of `inner` with this rank's gradients, and every `sync_every`-th time `sync`.

        Collective only then: where a rank's arguments are refused in such a step, all ranks raise,
        and none has taken it. In the others a rank raises alone, and has that step still to take.
        Parameters and return value are those of `optcore.SGD.step`, of `inner`.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            As there, and as `sync`; RuntimeError without `inner`. Nothing has changed then.
        """
        inner = self._inner
        if inner is None or self._sync_every is None:
            raise RuntimeError(
                "step() needs LocalSGD(..., inner=optcore.SGD(params, ...), sync_every=...); "
                "without, step the parameters and call sync()"
            )
        if self._inner_steps + 1 < self._sync_every:
            stepped = inner.step(grads, grad_scale=grad_scale, zero_grad=zero_grad)
            self._inner_steps += 1
            return stepped

        def check() -> tuple[tuple[tuple[Any, ...], float, float], list[str]]:
            listed, _, decay = inner._check_step(grads, grad_scale, zero_grad)
            outer_decay, lines = self._check_sync()
            return (listed, decay, outer_decay), lines

        listed, decay, outer_decay = _agree(self.comm, check)
        stepped = inner._step_as_checked(grads, grad_scale, decay)
        if zero_grad:
            _zero(listed)
        self._sync(outer_decay)
        return stepped

    def sync(self) -> bool:
        """Take the outer step now, whatever the number of steps since the last. Collective.

        Returns
        -------
        bool
            True when applied. Where it was skipped (``skip_nonfinite``), all ranks go on from the
            parameters that the last one left; what they stepped since is lost.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            For options that a step refuses, for parameters that are other arrays by now, that
            moved or that `inner` does not step, and while a step of `inner` is under way; on all
            ranks where it is raised on one; ValueError also where ranks disagree on options or
            on the step count. Nothing has changed then.
        """
        return self._sync(_agree(self.comm, self._check_sync))

    def _check_sync(self) -> tuple[float, list[str]]:
        _, values, decay = self._check_step(self._structured(self._averaged), 1.0, False)
        self._check_arrays()
        return decay, self._step_lines(values, decay)

    def _catch_up_inner(self) -> None:
        """Have the parameters as `inner`'s steps make them, before they are read or written."""
        if self._inner is not None:
            self._inner.catch_up()

    def _apply(self, state: State) -> None:
        def catch_up() -> tuple[None, list[str]]:
            self._catch_up_inner()
            return None, []

        _agree(self.comm, catch_up)
        super()._apply(state)

    def _sync(self, decay: float) -> bool:
        self._catch_up_inner()
        for packed, param in zip(self._packed, self._whole_params, strict=True):
            widen(param, packed)
        self._reduce()
        sums = self._structured(self._averaged)
        stepped = self._step_as_checked(sums, 1.0, decay, 1 / self.comm.size)
        self._share_params()
        self._inner_steps = 0
        return stepped

    def _settle(self, state: State) -> None:
        self._take_first(self._whole_params)
        self._copy_params()
        self._apply(state)      # again, for masters are taken where x shows them
        self._share_params()
        self._inner_steps = 0

    def _own_lines(self, decay: Any) -> list[str]:
        return [*super()._own_lines(decay), f"sync_every={self._sync_every!r}"]

    def _stepped(self, params: list[np.ndarray]) -> list[np.ndarray]:
        return [part.copy() for part in self._own_part(params)]

    def _copy_params(self) -> None:
        for own, part in zip(self._own_params, self._own_part(self._whole_params), strict=True):
            own[...] = part
