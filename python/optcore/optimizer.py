"""What optimizers are made of: groups, structure and state around the compiled plan."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, ValuesView
from typing import Any, ClassVar, TypeVar

import numpy as np

from optcore import checkpoint
from optcore._state import (
    STATE_VERSION,
    NotFound,
    State,
    completed,
    saved_group,
    schedules_of,
)
from optcore._structure import Group, given_groups, read_group, read_groups, structure_of
from optcore.options import GROUP_OPTIONS, OPTIMIZER_OPTIONS, STORAGE, is_schedule
from optcore.pieces import Accumulating, Collecting, Stepping
from optcore.plan import Plan
from optcore.structure import Nest

Schedule = Callable[[int], float]
_Self = TypeVar("_Self", bound="Optimizer")


class GroupOption:
    """An option of parameter groups as an attribute of the optimizer: read and set over all.

    Reading raises ValueError where the groups have several values. Setting checks the value as
    an edit of the groups is checked, before any has changed.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        """Learn which option it is."""
        self._name = name
        self.__doc__ = f"The option ``{name}`` of all groups, to be read and set."

    def __get__(self, opt: Any, kind: type | None = None) -> Any:
        """Return the value that all groups have."""
        if opt is None:
            return self
        groups = opt.param_groups
        for i, group in enumerate(groups):
            if self._name not in group:
                raise KeyError(f"param_groups[{i}]: option {self._name!r} is missing")
        values = [group[self._name] for group in groups]
        if any(value is not values[0] and value != values[0] for value in values):
            raise ValueError(
                f"{self._name} is not the same in all groups, got {values!r}: "
                f"read opt.param_groups[i][{self._name!r}]"
            )
        return values[0]

    def __set__(self, opt: Any, value: Any) -> None:
        """Set it in all groups."""
        opt._set_in_groups(self._name, value)


class CommonOptions:
    """Options of parameter groups that every optimizer has, as attributes of it."""

    __slots__ = ()

    lr = GroupOption()
    weight_decay = GroupOption()
    maximize = GroupOption()
    decoupled_weight_decay = GroupOption()
    clip_value = GroupOption()
    flush_subnormals = GroupOption()
    master = GroupOption()
    rounding = GroupOption()
    lazy = GroupOption()


class SGDOptions(CommonOptions):
    """Those of `optcore.SGD`."""

    __slots__ = ()

    momentum = GroupOption()
    dampening = GroupOption()
    nesterov = GroupOption()
    lr_in_velocity = GroupOption()
    dampen_first = GroupOption()
    velocity_dtype = GroupOption()


class AdaptiveOptions(CommonOptions):
    """Those of the adaptive rules."""

    __slots__ = ()

    eps = GroupOption()
    eps_in_sqrt = GroupOption()
    state_dtype = GroupOption()


class Optimizer(Plan):
    """What all optimizers do; each class has a family of rules and the options of those."""

    # What is not here cannot be set: an attribute that nobody reads is a mistake.
    __slots__ = ("__weakref__", "_defaults", "_given", "_groups_read", "_structure")

    # The rule that it is named for, by which options of groups are known, and choose others.
    _family = "sgd"
    # Options that no load changes.
    _always: ClassVar[dict[str, Any]] = {}
    # The rule of every group; None: the one that options choose.
    _rule: str | None = None

    def __init__(self, params: Any, **options: Any) -> None:
        raise TypeError("an optimizer is one of optcore's classes, of which this is the base")

    def _construct(self, given: Mapping[str, Any]) -> None:
        """Build from the arguments of the constructor by their names."""
        self._begin(
            given["params"], given["grads"], given.get("velocities"),
            {name: given[name] for name in self._group_options},
            {name: given[name] for name in OPTIMIZER_OPTIONS},
        )

    @property
    def _group_options(self) -> dict[str, Any]:
        """The options of its groups, with the defaults of the table."""
        return GROUP_OPTIONS[self._family]

    def _begin(
        self, params: Any, grads: Any, velocities: Any, defaults: dict[str, Any],
        options: dict[str, Any], now: list[dict[str, Any]] | None = None,
    ) -> None:
        """Build from what was given; `now` are the groups' options, where they changed since."""
        if isinstance(params, (Iterator, ValuesView)):      # which no copy could read again
            params = list(params)
        groups, structure = read_groups(params, defaults)
        for group, changed in zip(groups, now or (), strict=False):
            group.options.update(changed)
        self._build(
            groups, structure, options=options, grads=grads, velocities=velocities,
            family=self._family, rule=self._rule,
            given=params if groups[0].given is not None else None,
        )
        self._groups_read, self._structure, self._defaults = groups, structure, defaults
        if groups[0].given is not None:
            params = [{**group.given, "params": group.params} for group in groups]
        self._given = [(params, grads, velocities)]

    def add_param_group(
        self, param_group: Mapping[str, Any], *, grads: Any = None, velocities: Any = None
    ) -> None:
        """Step more parameters, as if they had been given as one more group from the beginning.

        States, averages and counts of the others stay.

        Parameters
        ----------
        param_group : mapping
            ``"params"``, and options where they differ from those given to the constructor.
        grads : in the structure of ``param_group["params"]``
            Where gradients are bound, those of the new parameters.
        velocities : in the structure of ``param_group["params"]``, optional
            As for the constructor.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            As the constructor and `step`. Nothing has changed then.
        """
        groups, nests = self._with_group(param_group)
        self._grow(groups, nests, grads, velocities, lambda: self._note_group(
            groups, nests, param_group, grads, velocities))

    def _with_group(
        self, param_group: Mapping[str, Any]
    ) -> tuple[list[Group], tuple[Nest | None, Nest | None]]:
        """Return the groups with one more, and the structures of all and of the new one."""
        if not self._built:
            raise RuntimeError("this optimizer was never built")
        before = [group._replace(options=options)
                  for group, options in zip(self._groups_read, self.param_groups, strict=False)]
        own = read_group(param_group, self._defaults, before, what="param_group")
        groups = [*before, own]
        return groups, (structure_of(groups), own.nest)

    def _note_group(
        self, groups: list[Group], nests: tuple[Nest | None, Nest | None],
        param_group: Mapping[str, Any], grads: Any, velocities: Any,
    ) -> None:
        self._groups_read, self._structure = groups, nests[0]
        param_group = {**param_group, "params": groups[-1].params}
        self._given = [*self._given, (param_group, grads, velocities)]

    def stepping(self, *, grad_scale: float = 1.0, zero_grad: bool = False) -> Stepping:
        """Take one step parameter by parameter, as their gradients appear.

        ::

            with opt.stepping() as part:
                part.step("fc2.weight", grad)
                part.step({"fc1.weight": g, "fc1.bias": h})

        A layer is stepped while its gradient is in the caches, and one buffer may serve the
        gradients of all layers. Schedules are asked once, at the beginning. The block is one step:
        what it does not name is left out, as if its gradient were None. After an exception in it,
        what was stepped stays so, and counts. Until it is left, every other call is refused.

        Parameters
        ----------
        grad_scale, zero_grad
            As in `step`.

        Returns
        -------
        optcore.pieces.Stepping
            Its method ``step(key, grad)``.

        Raises
        ------
        ValueError
            On entering where `max_norm`, `skip_nonfinite` or `track_grad_norm` is set, which need
            all gradients; on leaving where none was given. RuntimeError as `step`.
        """
        return Stepping(self, grad_scale, zero_grad)

    def accumulating(self, *, grad_scale: float = 1.0) -> Accumulating:
        """Take one step by the sum of micro-batches' gradients, without an array to add them in.

        ::

            with opt.accumulating(grad_scale=1 / len(batches)) as micro:
                for batch in batches:
                    micro.add(gradients(params, batch))

        Momentum is linear, and so the velocity itself is the sum: ``v = ρ·v + g₁``, then
        ``v = v + gₖ``, and ``x = x - α·v`` at the end of the block. Schedules are asked once, at
        the beginning. Until the block is left, every other call is refused. Gradients that were
        folded before an exception cannot be taken back: the parameters are as they were then, and
        ``opt.accumulating()`` goes on where it was left, or loading a state puts an end to it.

        Parameters
        ----------
        grad_scale : float, > 0, default 1
            Multiplies every gradient first.

        Returns
        -------
        optcore.pieces.Accumulating
            Its method ``add(grads)``.

        Raises
        ------
        ValueError
            On entering for what is not the same in pieces, with the reason: no momentum, Nesterov,
            coupled weight decay, `clip_value`, `flush_subnormals`, narrow velocities, and what
            needs the norm (`max_norm`, `skip_nonfinite`, `track_grad_norm`). On leaving where no
            gradient was given. RuntimeError as `step`.
        """
        return Accumulating.over(self, grad_scale)

    def collecting(self, *, total: float | None = None, grad_scale: float = 1.0) -> Collecting:
        """Take an outer step from replicas that come one by one, of which none is kept.

        ::

            with opt.collecting() as mean:
                for params, n_examples in replies:
                    mean.add(params, n_examples)

        Each is folded into one buffer of the model's size, in the arithmetic type, and the step is
        taken at the end of the block. An exception in it leaves all as it was, and drops what
        came; where taking the step raises, ``with`` on the same object takes it up again.

        Parameters
        ----------
        total : float > 0, optional
            The sum of all weights, where it is known beforehand. The bits are then those of
            ``outer_step(all, weights=weights)`` in the order of arrival.
        grad_scale : float, > 0, default 1
            As in `outer_step`.

        Returns
        -------
        optcore.pieces.Collecting
            Its method ``add(params, weight=None)``; `applied` tells after the block whether the
            step was applied.

        Raises
        ------
        ValueError
            On leaving where no replica came, where all weights are zero, or where they do not add
            up to `total`. TypeError, ValueError, RuntimeError as `outer_step`.

        Notes
        -----
        Without `total` the sum is ``s = p₁; s = s + (wₖ/w₁)·pₖ`` and the mean w₁ / Σw of it, each
        factor formed in float64 and rounded once; w₁ is the first weight that is not zero. Equal
        weights and none have the bits of ``outer_step(all)``, others equal those of
        ``outer_step(all, weights=weights)`` to rounding: there the sum of the weights is known
        before the first product.
        """
        return Collecting(self, total, grad_scale)

    def __reduce__(self) -> tuple[Any, ...]:
        """Return how to build a copy over the arrays, which are copied along."""
        self._check_current()
        copied = self._snapshot(copies=True)
        own = ("params", "param_names")
        state = {
            "given": copied["given"],
            "defaults": self._defaults,
            "groups": [{key: value for key, value in group.items() if key not in own}
                       for group in copied["param_groups"]],
            "copied": {key: copied[key] for key in (
                "state", "options", "step_count", "skipped", "histories")},
            "own": {**getattr(self, "__dict__", {}), **_slots_of(self)},    # a subclass's
        }
        return _unbuilt, (type(self),), state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Build anew and go on from where the copied optimizer was."""
        (params, grads, velocities), *added = state["given"]
        copied, groups = state["copied"], state["groups"]
        moving = groups
        if any(lent is not None for _, _, lent in state["given"]):
            # momentum may have been set to 0 since, with which no velocities are taken
            moving = [{**group, "momentum": 0.5} if group["momentum"] == 0 else group
                      for group in groups]
        self._begin(params, grads, velocities, state["defaults"], copied["options"], moving)
        for param_group, grads, velocities in added:
            changed = {**param_group, **moving[len(self.param_groups)]}
            self.add_param_group(changed, grads=grads, velocities=velocities)
        self._given = state["given"]
        groups = [{**own, **group} for own, group in zip(self.param_groups, groups, strict=True)]
        self._restore(groups, copied["state"], {}, (copied["step_count"], copied["skipped"]))
        if copied["histories"] is not None:
            self._take_histories(copied["histories"])
        for name, value in state["own"].items():
            setattr(self, name, value)

    def __repr__(self) -> str:
        """Return the options of every group, and how many parameters it holds."""
        lines = []
        for i, group in enumerate(self.param_groups):
            size = sum(array.size for array in group["params"])
            options = ", ".join(
                f"{key}={group.get(key)!r}" for key in self._group_options
            )
            lines.append(
                f"  group {i}: {len(group['params'])} arrays, {size} elements, {options}"
            )
        return "\n".join([f"{type(self).__name__}(", *lines, ")"])

    @property
    def ema(self) -> Any:
        """The averages, in the structure of `params`; None where none are kept.

        float64 for float64 parameters, else float32.
        Live arrays, updated by every step: copy what must stay. Flat where `params` is a list
        of groups. A parameter left out of a step, its gradient being None, does not move its
        average either.
        """
        averages = [entry["ema"] for entry in self._state]
        return None if averages[0] is None else self._structured(averages)

    def _structured(self, arrays: list[Any]) -> Any:
        """Return one array a parameter in the structure of `params`."""
        return arrays[0] if self._structure is None else self._structure.arranged(arrays)

    @property
    def _names(self) -> list[Any]:
        return [name for group in self.param_groups
                for name in group["param_names"] or (None,) * len(group["params"])]

    @property
    def _whole_params(self) -> list[np.ndarray]:
        """The caller's arrays, where this optimizer may step but a part of each."""
        return [param for group in self.param_groups for param in group["params"]]

    def _own_part(self, arrays: list[np.ndarray | None]) -> list[np.ndarray | None]:
        """Return what this optimizer holds of one array a parameter."""
        return arrays

    def state_dict(self) -> dict[str, Any]:
        """Return what a later run needs to go on with the same bits.

        The parameters themselves, `max_norm`, `skip_nonfinite`, `track_grad_norm`, `ema_decay`
        and `seed` are not in it: give them when building the optimizer that loads it.

        Returns
        -------
        dict
            ``"state"`` maps each parameter's index to its states by name, ``"velocity"`` say (a
            copy, or None), its ``"ema"`` (a copy, or None), ``"first_step"``, of adaptive rules
            ``"step"`` and of Adam ``"beta1_power"`` and ``"beta2_power"``, and, where one is kept,
            its ``"master"`` (a float32 copy). ``"param_groups"`` holds each group's options, with
            indices for ``"params"``; those that were schedules are None and named in its
            ``"schedules"``. Then ``"step_count"``, ``"skipped"`` and ``"version"``. Plain arrays
            and numbers throughout, of one moment; of bfloat16 as `optcore.bfloat16` declares them.

        Raises
        ------
        KeyError, TypeError, ValueError
            For `param_groups` that a step would refuse.
        RuntimeError
            While a step is under way in another thread.
        """
        state = self._contents(False)
        del state["options"]
        return state

    def _contents(self, include_params: bool) -> dict[str, Any]:
        """Return all that a checkpoint holds: the state dictionary, with "options" and "param"."""
        copied = self._snapshot(include_params)
        del copied["given"], copied["histories"]
        groups: list[dict[str, Any]] = []
        first = 0
        for group in copied["param_groups"]:
            groups.append(saved_group(group, first, self._group_options))
            first += len(group["params"])
        options = {name: None if is_schedule(value) else value
                   for name, value in copied["options"].items()}
        return {
            **copied, "version": STATE_VERSION, "param_groups": groups, "options": options,
            "state": dict(enumerate(copied["state"])),
        }

    def _all_contents(self, include_params: bool) -> dict[str, Any]:
        """Return `_contents`, and what a subclass's `state_dict` has besides."""
        contents = self._contents(include_params)
        if type(self).state_dict is Optimizer.state_dict:
            return contents
        return {**self.state_dict(), **contents}

    def load_state_dict(self, state_dict: Mapping[str, Any], *, by_name: bool = False) -> NotFound:
        """Go on from a state that `state_dict` returned.

        Options in the state replace those of the groups, but for two kinds: where the state
        was saved with a schedule, this optimizer's own stays; and `lr_in_velocity`, `master`,
        `velocity_dtype`, `state_dtype` and `initial_accumulator_value` stay as this optimizer was
        built. Velocities of the other convention are
        converted by the factor -lr (v_right = -α·v_left), rounded once, and again where they are
        kept in bfloat16. A master is gone on from where its parameter shows it.

        Parameters
        ----------
        state_dict : mapping
            Arrays are copied. They must have the shape of their parameters, and a dtype that can be
            stepped together with theirs.
        by_name : bool, default False
            Match parameters by their names, whatever their order and groups, not by their places.
            What is not found stays as it is. A group takes over the options of the saved group
            that its parameters come from, where that is one.

        Returns
        -------
        NotFound
            ``missing``: names of parameters that the state does not have. ``unexpected``: names in
            the state that no parameter has. ``groups``: indices of groups whose options stayed,
            for their parameters come from no saved group or from several. All empty without
            `by_name`.

        Raises
        ------
        KeyError, TypeError, ValueError
            For a state that does not fit, saying where; for a conversion with lr = 0, or one
            that would overflow; with `by_name` for parameters without names, or where none is
            found. Nothing has changed then.
        """
        if not isinstance(by_name, (bool, np.bool_)):
            raise TypeError(f"by_name must be True or False, got {by_name!r}")
        state = State(self, state_dict, bool(by_name))
        state.apply()
        return state.not_found

    def save(self, path: checkpoint.FilePath, *, include_params: bool = False) -> None:
        """Write all that a later run needs to go on with the same bits, in safetensors.

        The file is written beside `path`, synced and renamed: whoever is killed meanwhile
        leaves the old file or the new one.

        Parameters
        ----------
        path : str, bytes or os.PathLike
            Its folder must exist. Links are followed; a file that is replaced keeps its mode
            and, where possible, its owner.
        include_params : bool, default False
            Save the parameters as well, so that they cannot part from the state; `restore`
            and `load` then write them into the arrays.

        Raises
        ------
        OSError
            With errno and filename, where the file cannot be written, or where `path` is
            something else than a file that may be written. The old file stays.
        TypeError
            For names or options that are not plain numbers and strings, and for a `path` that
            is none.
        KeyError, ValueError, RuntimeError
            As `state_dict`.
        """
        checkpoint.write(path, self._all_contents(include_params))

    def restore(self, path: checkpoint.FilePath, *, by_name: bool = False) -> NotFound:
        """Go on from a file that `save` wrote, as `load_state_dict` does.

        Options of the whole optimizer (`max_norm`, `skip_nonfinite`, `track_grad_norm`,
        `ema_decay`, `seed`) come from the file too; where the decay was saved as a callable, this
        optimizer's own stays. Parameters are written where the file holds them, from their masters
        where there are some: nothing is lost between float32 and half types with a master.

        Parameters
        ----------
        path : str, bytes or os.PathLike
            A file that `save` wrote.
        by_name : bool, default False
            As in `load_state_dict`.

        Returns
        -------
        NotFound
            As `load_state_dict`.

        Raises
        ------
        CheckpointError
            For a file that is damaged, foreign, or does not fit, and for what is no file.
        MemoryError
            Where there is no room for what the file holds.
        OSError
            With errno and filename, where there is nothing, or nothing that may be read. Nothing
            has changed, whatever was raised.
        """
        return self._resume(path, checkpoint.read(path), by_name)

    def _resume(
        self, path: checkpoint.FilePath, contents: Mapping[str, Any], by_name: bool = False
    ) -> NotFound:
        with checkpoint.refusing(path):
            return self.load_state_dict(contents, **({"by_name": True} if by_name else {}))

    @classmethod
    def load(
        cls: type[_Self],
        path: checkpoint.FilePath,
        params: Any,
        *,
        lr: Schedule | None = None,
        ema_decay: Schedule | None = None,
        **more: Any,
    ) -> _Self:
        """Build an optimizer over `params` as the one that was saved, and `restore` it.

        Parameters
        ----------
        path : path
            A file that `save` wrote.
        params
            In the structure the saved optimizer was given; of groups only their arrays and
            names count, and their options where a schedule was saved.
        lr, ema_decay : callable
            The schedules, where the saved optimizer had them: a file holds none.
        **more
            The schedules of other options, likewise; ``master``, ``velocity_dtype`` and
            ``state_dtype``, where other ones are wanted than were saved; ``grads``, and what else
            the constructor takes, are passed to it.

        Raises
        ------
        CheckpointError
            For a file that is damaged, foreign, or does not fit, and for what is no file.
        ValueError
            For a schedule that is missing, or one given where a number was saved.
        MemoryError, OSError, TypeError
            As `restore`, and as the constructor.
        """
        path = checkpoint.as_text(path)
        contents = cls._read(path, more)
        storage = {name: more.pop(name) for name in STORAGE if name in more}
        known = GROUP_OPTIONS[cls._family]
        schedules = {name: more.pop(name) for name in known if name in more}
        if lr is not None:
            schedules["lr"] = lr
        with checkpoint.refusing(path):
            saved = [completed(group, contents["version"]) for group in contents["param_groups"]]
            missing = [key for key in known for group in saved if key not in group]
            if missing:
                raise ValueError(f"its groups have no option {missing[0]!r}, as of another class")
            saved = [{**{key: group[key] for key in known}, **storage, **cls._always}
                     for group in saved]
            scheduled = [schedules_of(group) for group in contents["param_groups"]]
            options = dict(contents["options"])
            averages = any(entry["ema"] is not None for entry in contents["state"].values())
        groups, grouped = given_groups(params)
        if len(groups) != len(saved):
            raise checkpoint.CheckpointError(
                f"{path} does not fit: it holds {len(saved)} groups, params {len(groups)}"
            )
        for given, group, names in zip(groups, saved, scheduled, strict=True):
            for name in names:
                own = given.get(name)
                group[name] = schedules.get(name) if own is None else own
                if not is_schedule(group[name]):
                    raise ValueError(
                        f"{path} was saved with a callable {name}: give it again as {name}="
                    )
        for name, value in schedules.items():
            if all(group[name] is not value for group in saved):
                raise ValueError(f"{name} must be left out, since {path} holds it, got {value!r}")
        if averages and options["ema_decay"] is None:
            if not is_schedule(ema_decay):
                raise ValueError(
                    f"{path} was saved with a callable ema_decay: give it again as ema_decay="
                )
            options["ema_decay"] = ema_decay
        elif ema_decay is not None:
            raise ValueError(f"ema_decay must be left out, {path} says it, got {ema_decay!r}")
        if grouped:
            merged = [{**given, **group} for given, group in zip(groups, saved, strict=True)]
            opt = cls(merged, **options, **more)
        else:
            opt = cls(groups[0]["params"], **saved[0], **options, **more)
        opt._resume(path, contents)
        return opt

    @classmethod
    def _read(cls, path: checkpoint.FilePath, more: Mapping[str, Any]) -> dict[str, Any]:
        """Read a checkpoint for an optimizer whose constructor will be given `more`."""
        return checkpoint.read(path)


def _slots_of(opt: Optimizer) -> dict[str, Any]:
    """Return what stands in the slots that a subclass has added."""
    added = type(opt).__mro__[: type(opt).__mro__.index(Optimizer)]
    names = [name for kind in added for name in vars(kind).get("__slots__", ())]
    return {name: getattr(opt, name) for name in names if hasattr(opt, name)}


def _unbuilt(cls: type[Optimizer]) -> Optimizer:
    return cls.__new__(cls)
