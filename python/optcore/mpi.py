"""The step over several machines: gradients averaged over MPI ranks, state on each or split.

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
from collections.abc import Callable, Mapping, Sequence
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
from optcore.arrays import has_nonzero, name_of_dtype, widen
from optcore.options import GROUP_OPTIONS, OPTIMIZER_OPTIONS, is_schedule
from optcore.plan import BOUND, RUN
from optcore.sgd import SGD
from optcore.structure import Nest

__all__ = ["DataParallelSGD", "ShardedSGD"]

# An error of one rank is raised on the others too; elsewhere classes may want other arguments.
OWN_ERRORS = ("builtins", checkpoint.__name__)

# Elements that one call hands to MPI. Its counts are C ints; half of what those hold, because
# libraries add counts up in an int themselves.
MAX_COUNT = 1 << 30

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
            for g, group in enumerate(groups) for name in GROUP_OPTIONS]


def _numbers(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the options of groups for comparison: ranks have different functions as schedules."""
    return [{name: "a schedule" if is_schedule(group[name]) else group[name]
             for name in GROUP_OPTIONS} for group in groups]


class _Distributed(SGD):
    """What both optimizers share: agreement, the order of a step, and checkpoints."""

    __slots__ = ("_averaged", "_comm", "_flats", "_packed")

    _comm: MPI.Intracomm
    _flats: list[_Flat]
    _packed: list[np.ndarray]       # in those, a place for each gradient
    _averaged: list[np.ndarray]     # where the averaged gradients of this rank's plan appear

    def __init__(self, params: Any, comm: MPI.Intracomm, **options: Any) -> None:
        if not isinstance(comm, MPI.Intracomm):
            raise TypeError(f"comm must be an MPI intracommunicator, got {type(comm).__name__}")
        self._comm = comm

        def build() -> tuple[None, list[str]]:
            SGD.__init__(self, params, **options)
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
        for array in (*self._whole_params[first:], *lent):
            if array is not None:
                for piece in _pieces(_raw(_flattened(array, array))):
                    self._comm.Bcast(piece)
        own = [param for group in self.param_groups for param in group["params"]]
        for entry, param in zip(self._state[first:], own[first:], strict=True):
            if entry["ema"] is not None:
                widen(param, entry["ema"])
        if any(velocity is not None for velocity in lent):
            # Whether they have started was seen before they came from rank 0.
            started = [{} if velocity is None else {"first_step": not has_nonzero(velocity)}
                       for velocity in lent]
            self._restore(self.param_groups, [*({},) * first, *started], {},
                          (self.step_count, self.skipped))

    @property
    def _checking(self) -> SGD:
        """The plan over the caller's whole arrays, which knows what gradients must be."""
        raise NotImplementedError

    def _reduce(self) -> None:
        """Sum the packed gradients over all ranks into `_averaged`, which `step` scales."""
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

    def step(
        self, grads: Any = BOUND, *, grad_scale: float = 1.0, zero_grad: bool = False
    ) -> bool:
        """Take one step with the mean of all ranks' gradients.

        Parameters and return value are those of `optcore.SGD.step`. `grad_scale` multiplies
        the mean; a gradient of None must be None on every rank.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            As `optcore.SGD.step`, on all ranks where it is raised on one; ValueError also where
            ranks disagree on options, step count or gradients of None. Nothing has changed then.
        """
        def check() -> tuple[tuple[tuple[Any, ...], Any, float, float], list[str]]:
            listed, values, decay = self._checking._check_step(grads, grad_scale, zero_grad)
            own = self._structured([
                None if gradient is None else average
                for gradient, average in zip(listed, self._averaged, strict=True)
            ])
            if self._checking is not self:      # schedules are asked once, by the plan that steps
                _, values, decay = self._check_step(own, grad_scale, False)
            missing = [i for i, gradient in enumerate(listed) if gradient is None]
            scale = float(grad_scale)
            return (listed, own, scale, decay), [
                f"step {self.step_count}", f"grad_scale={scale!r}",
                f"grads that are None at {missing}", *_group_lines(values), *self._own_lines(decay),
            ]

        listed, own, scale, decay = _agree(self.comm, check)
        for packed, gradient in zip(self._packed, listed, strict=True):
            if gradient is not None:
                widen(gradient, packed)
        self._reduce()
        stepped = self._step_as_checked(own, scale / self.comm.size, decay)
        if stepped:
            self._share_params()
        if zero_grad:
            for gradient in listed:
                if gradient is not None:
                    gradient[...] = 0
        return stepped

    def step_replicas(
        self, replica_grads: Any, *, weights: Any = None, grad_scale: float = 1.0,
        zero_grad: bool = False,
    ) -> bool:
        """Refuse: the ranks are the replicas."""
        raise NotImplementedError(
            "step_replicas() has no meaning here, where the ranks are the replicas: add up "
            "gradients with accumulate() and call step(), where ranks have weights after "
            "multiplying each rank's gradients by its weight * ranks / sum of weights"
        )

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
            state = State(self, state_dict, by_name)
            text, tensors = checkpoint.split(state_dict)
            return state, [f"by_name={bool(by_name)}",
                           f"a state with SHA-256 {checkpoint.digest(text, tensors)}"]

        state = _agree(self.comm, check)

        def apply() -> tuple[None, list[str]]:
            state.apply()
            return None, []

        _agree(self.comm, apply)
        if state.writes_masters:    # of which each rank may have a part
            self._share_params()
        return state.not_found

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


_PARAMETERS = """
    Parameters
    ----------
    params : array, sequence or mapping of arrays, or list of group dictionaries
        As for `optcore.SGD`, alike on every rank. They take rank 0's values, and so do velocities
        that are given.
    comm : mpi4py.MPI.Intracomm
        The ranks that train together.
    **options
        Those of `optcore.SGD`, alike on every rank.

    Raises
    ------
    TypeError, ValueError
        As `optcore.SGD`, on all ranks where it is raised on one; ValueError also where ranks
        differ in arrays, names or options.
    """


class DataParallelSGD(_Distributed):
    """`optcore.SGD` on the mean of all ranks' gradients, with the state whole on every rank.

    A step copies the gradients into one flat buffer a dtype, in float32 for half types, sums that
    over the ranks with Allreduce and steps with a scale of 1 / ranks. Ranks hold the same bits
    after every step: MPI gives them identical sums. Up to two ranks they are the bits of
    `optcore.SGD.step_replicas`; beyond, MPI chooses the order of the sum.
    """

    __slots__ = ()

    if __doc__:
        __doc__ += _PARAMETERS

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
    def _checking(self) -> SGD:
        return self

    def _reduce(self) -> None:
        for flat in self._flats:
            for piece in _pieces(flat.whole):
                self.comm.Allreduce(MPI.IN_PLACE, piece)


class ShardedSGD(_Distributed):
    """`optcore.SGD` on the mean of all ranks' gradients, with the state split over the ranks.

    Velocity and averages take 1 / ranks of their memory on each (ZeRO, stage 1; Rajbhandari et
    al., 2020). The parameters are laid end to end, a buffer a dtype, and cut into equal shards,
    between runs of 256 elements of each; a step sums the gradients with Reduce_scatter, steps this
    rank's shard where it lies in the parameters, and collects the shards with Allgather, those of
    half types as they are. Noise is drawn as for whole parameters, and these have the bits of
    `DataParallelSGD` where MPI adds up in the same order and ``max_norm`` does not act: the norm
    is a sum over shards.

    ``param_groups[g]["params"]`` are this rank's parts, one for each parameter, many of them
    empty. `ema`, `save` and ``state_dict`` collect from all ranks, hence are collective.
    """

    __slots__ = ("_sums", "_whole")

    if __doc__:
        __doc__ += _PARAMETERS

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
                **GROUP_OPTIONS, "lr": 0.0, "master": None,
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
        parts = iter(self._own_part(params))
        super()._build([
            Group({**group.options, "params": tuple(next(parts) for _ in group.options["params"])},
                  None, None, None)
            for group in groups
        ], nest, grads=None, firsts=[cuts[i][0].start for i in range(len(params))], **options)
        self._join_squares = functools.partial(_join_squares, self.comm, len(params))

    def add_param_group(
        self, param_group: Mapping[str, Any], *, grads: Any = None, velocities: Any = None
    ) -> None:
        """Refuse: every rank would have to keep other parts of all."""
        raise NotImplementedError(
            "add_param_group() would share out all states anew, which ShardedSGD does not: build "
            "one over all parameters and give it this one's state by "
            "load_state_dict(old.state_dict(), by_name=True)"
        )

    @property
    def _checking(self) -> SGD:
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
            else:       # pieces of the shards lie apart, and no one call takes those
                for rank, shard in enumerate(shards):
                    for piece in _pieces(shard):
                        self.comm.Bcast(piece, root=rank)
            for i, place in there.items():
                _flattened(_raw(into[i]), into[i])[...] = whole[place]

    def _collected(self, parts: Sequence[Any]) -> list[Any]:
        into = [None if part is None else np.empty_like(param, part.dtype, subok=False)
                for part, param in zip(parts, self._whole_params, strict=True)]
        self._collect(parts, into)
        return into

    def _snapshot(self, include_params: bool = False) -> dict[str, Any]:
        def check() -> tuple[dict[str, Any], list[str]]:
            copied = super(ShardedSGD, self)._snapshot(include_params)
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

    def _reduce(self) -> None:
        for flat, sums in zip(self._flats, self._sums, strict=True):
            if flat.whole.size <= MAX_COUNT:
                self.comm.Reduce_scatter_block(flat.whole, sums)
                continue
            shards = np.split(flat.whole, self.comm.size)       # as in _collect
            for rank, shard in enumerate(shards):
                for piece, total in zip(_pieces(shard), _pieces(sums), strict=True):
                    self.comm.Reduce(piece, total if rank == self.comm.rank else None, root=rank)

    def _share_params(self) -> None:
        params = self._whole_params
        self._collect(self._own_part(params), params)
