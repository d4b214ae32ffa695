"""Federated averaging in Flower, where the server's part of a round is a step of `optcore.SGD`.

What clients send is read where it lies, in the messages that brought it. Beside these the server
has its parameters, its velocities and the record that it sends out, and no other copy of the model.
"""
from __future__ import annotations

import io
from collections.abc import Iterable
from fnmatch import fnmatchcase
from logging import INFO, getLogger
from typing import Any, Literal, NamedTuple

try:
    from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
    from flwr.serverapp import Grid
    from flwr.serverapp.strategy import FedAvg
except ImportError as _missing:
    raise ImportError(
        "optcore.flower needs Flower, 1.42 or later: pip install 'optcore[flower]'"
    ) from _missing

import numpy as np
from numpy.lib import format as npy

from optcore.arrays import bfloat16
from optcore.checkpoint import FilePath
from optcore.optimizer import Schedule
from optcore.options import GROUP_OPTIONS, OPTIMIZER_OPTIONS
from optcore.sgd import SGD

__all__ = ["ServerSGD"]

NUMPYS = "numpy.ndarray"        # Flower's name for the bytes that numpy.save writes
# With these options a step ends at the mean.
SGD_OPTIONS = GROUP_OPTIONS["sgd"]
MEAN = {**SGD_OPTIONS, "lr": 1.0}


class _Form(NamedTuple):
    """How an array of a record lies in its bytes."""

    named: str          # its dtype, as Flower has it
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    order: Literal["C", "F"]
    header: bytes

    def __str__(self) -> str:
        return f"{self.named} {self.shape}"

    @property
    def is_counted(self) -> bool:
        """Whether it holds integers, such as counts of batches, whose mean is taken in float64."""
        return self.dtype.kind in "iub" and self.dtype is not bfloat16

    def view(self, data: bytes) -> np.ndarray:
        """Return the array that lies in the bytes: `Array.numpy` would copy it."""
        flat = np.frombuffer(data, self.dtype, offset=len(self.header))
        view = flat.reshape(self.shape, order=self.order)
        return view.astype(np.float64) if self.is_counted else view

    def array(self, param: np.ndarray) -> Array:
        """Return a copy of a parameter as a record holds it."""
        if self.is_counted:
            param = np.rint(param).astype(self.dtype)
        return Array(self.named, self.shape, NUMPYS,
                     b"".join((self.header, param.reshape(-1, order=self.order).data)))


def _form(name: str, array: Array) -> _Form:
    if array.stype != NUMPYS:
        raise TypeError(f"array {name!r} must be serialized as {NUMPYS!r}, got {array.stype!r}")
    file = io.BytesIO(array.data)       # which shares the bytes
    version = npy.read_magic(file)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if array.dtype == "bfloat16":       # ml_dtypes', of which NumPy saves no more than the size
        dtype = bfloat16
    return _Form(array.dtype, shape, dtype, "F" if fortran else "C", array.data[: file.tell()])


def _views(record: ArrayRecord) -> dict[str, np.ndarray]:
    """Return the arrays of a record, by their names."""
    return {name: _form(name, array).view(array.data) for name, array in record.items()}


class ServerSGD(FedAvg):
    """Federated averaging, the server taking a step of `optcore.SGD` in every round.

    Its parameters less the weighted mean of the clients' are the gradient
    (`optcore.SGD.outer_step`). With ``lr=1`` alone this is Flower's ``FedAvg``, with momentum
    its ``FedAvgM``, with `nesterov` the outer step of DiLoCo.

    Parameters
    ----------
    lr : float or callable, default 1.0
        The server's learning rate; a callable is given the count of rounds so far.
    averaged : iterable of str, default ()
        Names of arrays that become the mean, whatever the options say: running statistics,
        which momentum could carry below zero. ``*``, ``?`` and ``[…]`` match as in
        names of files, ``"*.running_*"`` say. Integers always do, rounded to their type. A model
        with such arrays has no `max_norm`, which would count and scale their differences, too.
    ordered_by : str, optional
        A key of the clients' metrics, such as the number of their partition, by which answers
        are put in order before they are added up: the same answers then give the same bits. None:
        as they have arrived.
    checkpoint : path, optional
        Where `save` writes after each round.
    **options
        All other options of `optcore.SGD` (`momentum`, `nesterov`, `weight_decay`, `max_norm`,
        `ema_decay`, …) and of Flower's ``FedAvg`` (``fraction_train``, ``weighted_by_key``, …).

    Attributes
    ----------
    opt : optcore.SGD or None
        What steps; None before the first round. Options may be edited between rounds. Its
        parameters are the server's own copies, those that are averaged in a group of their own.

    Raises
    ------
    TypeError, ValueError
        For options that are not as they must be, naming them.

    Notes
    -----
    A round whose answers do not fit the model raises as `optcore.SGD.outer_step` does, and
    changes nothing.
    """

    opt: SGD | None
    _params: dict[str, np.ndarray]
    _forms: dict[str, _Form]
    _sent: ArrayRecord | None       # what the parameters are a copy of
    _rounds_before: int             # of a run that this one goes on from

    def __init__(
        self,
        lr: float | Schedule = 1.0,
        *,
        averaged: Iterable[str] = (),
        ordered_by: str | None = None,
        checkpoint: FilePath | None = None,
        **options: Any,
    ) -> None:
        if isinstance(averaged, str):
            raise TypeError(f"averaged must be several names, got {averaged!r}: give a list")
        own = {name: options.pop(name) for name in (*SGD_OPTIONS, *OPTIMIZER_OPTIONS)
               if name in options}
        SGD(np.zeros(1, np.float32), lr, **own)     # refuses now what the first round would
        super().__init__(**options)
        self.opt, self._sent, self._rounds_before = None, None, 0
        self._options = {"lr": lr, **own}
        self._averaged = tuple(averaged)
        self.ordered_by = ordered_by
        self.checkpoint = checkpoint

    @property
    def rounds(self) -> int:
        """Rounds that ended in a step or in a skipped one, those before a `restore` included."""
        return 0 if self.opt is None else self.opt.step_count + self.opt.skipped

    @property
    def ema(self) -> ArrayRecord | None:
        """Copies of the averages that `ema_decay` keeps; None where there are none."""
        averages = None if self.opt is None else self.opt.ema
        if averages is None:
            return None
        return ArrayRecord({name: Array(averages[name]) for name in self._forms})

    def _built(
        self, arrays: ArrayRecord
    ) -> tuple[SGD, dict[str, np.ndarray], dict[str, _Form]]:
        """Return an optimizer over copies of arrays, these copies, and how records hold them."""
        forms = {name: _form(name, array) for name, array in arrays.items()}
        params = {name: form.view(arrays[name].data).copy(order="K")
                  for name, form in forms.items()}
        means = [name for name, form in forms.items()
                 if form.is_counted or any(fnmatchcase(name, each) for each in self._averaged)]
        if means and self._options.get("max_norm") is not None:
            raise ValueError(
                f"max_norm must be None where arrays are averaged, as {means[0]!r} is, for it "
                "would count and scale their differences too, got "
                f"{self._options['max_norm']!r}: use clip_value"
            )
        groups: list[dict[str, Any]] = [
            {"params": {name: params[name] for name in forms if name not in means}},
            {"params": {name: params[name] for name in means}, **MEAN},
        ]
        given = [group for group in groups if group["params"]]
        return SGD(given, **self._options), params, forms

    def _take(self, arrays: ArrayRecord) -> None:
        """Go on from these arrays, the others of a round before or anybody's."""
        if self.opt is None:
            self.opt, self._params, self._forms = self._built(arrays)
        elif arrays is not self._sent:
            forms = {name: _form(name, array) for name, array in arrays.items()}
            for name in {**self._forms, **forms}:
                began, now = (str(each.get(name, "nothing")) for each in (self._forms, forms))
                if began != now:
                    raise ValueError(f"array {name!r} must be {began}, as it began, got {now}")
            for name, form in forms.items():
                self._params[name][...] = form.view(arrays[name].data)
        self._sent = arrays

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Begin a round, as Flower's ``FedAvg`` does, at these arrays.

        Parameters
        ----------
        server_round : int
            From 1; clients are told how many rounds it is with those before a `restore`.
        arrays : ArrayRecord
            What `aggregate_train` returned, or anything else to go on from, of the same names,
            dtypes and shapes.
        config : ConfigRecord
            What clients are told; ``"server-round"`` is added.
        grid : Grid
            Where the clients are.

        Returns
        -------
        iterable of Message
            One for each client that was chosen.
        """
        self._take(arrays)
        return super().configure_train(self._rounds_before + server_round, arrays, config, grid)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Begin an evaluation, as Flower's ``FedAvg`` does.

        Parameters
        ----------
        server_round, arrays, config, grid
            As for `configure_train`.

        Returns
        -------
        iterable of Message
            One for each client that was chosen.
        """
        return super().configure_evaluate(self._rounds_before + server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """End a round: one step towards the weighted mean of what clients have sent.

        Parameters
        ----------
        server_round : int
            Not looked at.
        replies : iterable of Message
            Each with one record of arrays and one of metrics, as for ``FedAvg``; those with errors
            are left out.

        Returns
        -------
        arrays : ArrayRecord or None
            The new parameters; None where no client has sent any.
        metrics : MetricRecord or None
            The clients' metrics, aggregated.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            For arrays that do not fit, weights that are negative or all zero, and where there was
            no `configure_train`. Nothing has changed then.
        """
        if self.opt is None:
            raise RuntimeError("aggregate_train() needs a round that configure_train() began")
        valid, _ = self._check_and_log_replies(replies, is_train=True)
        if not valid:
            return None, None
        contents = [message.content for message in valid]
        if self.ordered_by is not None:
            contents.sort(key=lambda content: _metric(content, self.ordered_by))
        metrics = self.train_metrics_aggr_fn(contents, self.weighted_by_key)
        self.opt.outer_step(
            [_views(_only(content.array_records)) for content in contents],
            weights=[_metric(content, self.weighted_by_key) for content in contents],
        )
        self._sent = ArrayRecord(
            {name: form.array(self._params[name]) for name, form in self._forms.items()}
        )
        if self.checkpoint is not None:
            self.save(self.checkpoint)
        return self._sent, metrics

    def save(self, path: FilePath) -> None:
        """Write parameters, velocities and options, as `optcore.SGD.save`.

        Parameters
        ----------
        path : str, bytes or os.PathLike
            As there.

        Raises
        ------
        RuntimeError
            Before the first round.
        OSError, TypeError
            As `optcore.SGD.save`.
        """
        if self.opt is None:
            raise RuntimeError("save() has nothing to write before the first round")
        self.opt.save(path, include_params=True)

    def restore(self, path: FilePath, arrays: ArrayRecord) -> ArrayRecord:
        """Go on from a file that `save` wrote, with the same bits.

        Options come from the file, but for schedules, as in `optcore.SGD.restore`.

        Parameters
        ----------
        path : str, bytes or os.PathLike
            As there.
        arrays : ArrayRecord
            The model, whatever its numbers: names, dtypes and shapes.

        Returns
        -------
        ArrayRecord
            The parameters of the file, for ``start(grid, initial_arrays=…)``, whose rounds go on
            from `rounds`.

        Raises
        ------
        CheckpointError, OSError, MemoryError
            As `optcore.SGD.restore`. Nothing has changed then.
        """
        opt, params, forms = self._built(arrays)
        opt.restore(path)
        self.opt, self._params, self._forms = opt, params, forms
        self._rounds_before = self.rounds
        self._sent = ArrayRecord({name: form.array(params[name]) for name, form in forms.items()})
        return self._sent

    def summary(self) -> None:
        """Log the settings."""
        options = ", ".join(f"{name}={value!r}" for name, value in self._options.items())
        getLogger("flwr").log(INFO, "\t├──> optcore.SGD: %s", options)
        super().summary()


def _only(records: Any) -> Any:
    """Return the one record there is: Flower has checked that."""
    return next(iter(records.values()))


def _metric(content: RecordDict, key: str | None) -> Any:
    metrics = _only(content.metric_records)
    if key not in metrics:
        raise ValueError(f"ordered_by must name a metric of every client, got {key!r}: they send "
                         f"{', '.join(map(repr, metrics))}")
    return metrics[key]
