"""The optimizer: groups, structure and state around the compiled plan."""
from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from numbers import Real
from typing import Any, TypeVar

import numpy as np

from optcore import checkpoint
from optcore.arrays import is_array
from optcore.plan import GROUP_KEYS, GROUP_OPTIONS, Plan, checked_lr

STATE_VERSION = 1

Schedule = Callable[[int], float]
_Self = TypeVar("_Self", bound="SGD")


def _named_arrays(params: Any, what: str) -> tuple[tuple[Any, ...], tuple[Any, ...] | None]:
    """Return the arrays of one group and, from a mapping, their names."""
    if isinstance(params, Mapping):
        return tuple(params.values()), tuple(params)
    if is_array(params):
        return (params,), None
    # by its type: isinstance would believe a proxy's __class__
    if issubclass(type(params), Iterable) and not isinstance(params, (str, set, frozenset)):
        return tuple(params), None
    raise TypeError(
        f"{what} must be an array, a sequence or a mapping of arrays, or a list of group "
        f"dictionaries, got {type(params).__name__}"
    )


def _given_groups(params: Any) -> tuple[list[Any], bool]:
    """Return the groups as they were given, or one of bare parameters, and which it was."""
    if isinstance(params, Iterator):    # of arrays or of groups: model.parameters() is one
        params = list(params)
    if isinstance(params, (list, tuple)) and any(isinstance(p, Mapping) for p in params):
        return list(params), True
    return [{"params": params}], False


def _read_groups(params: Any, defaults: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """Return complete group dictionaries, and the structure in which gradients will come."""
    given, grouped = _given_groups(params)
    groups = []
    for i, options in enumerate(given):
        if not isinstance(options, Mapping):
            raise TypeError(
                f"params[{i}] must be a group dictionary as its neighbours are, "
                f"got {type(options).__name__}"
            )
        if "params" not in options:
            raise ValueError(f"params[{i}] must have a key 'params', got {list(options)!r}")
        where = f"param_groups[{i}]['params']" if grouped else "params"
        arrays, names = _named_arrays(options["params"], where)
        if names is None and options.get("param_names") is not None:
            names = tuple(options["param_names"])
            if len(names) != len(arrays):
                raise ValueError(
                    f"param_groups[{i}]['param_names'] must name {len(arrays)} parameters, "
                    f"got {len(names)}"
                )
        group = {**defaults, **options, "params": arrays, "param_names": names}
        if group["lr"] is None:
            where = f" for param_groups[{i}]" if grouped else ""
            raise TypeError(f"lr must be given{where}, got None")
        groups.append(group)
    all_names = [name for group in groups for name in group["param_names"] or ()]
    twice = [name for name, count in Counter(all_names).items() if count > 1]
    if twice:
        raise ValueError(f"params must have names of their own, got {twice!r} twice")
    if None in all_names:
        raise ValueError("params must have names of their own, got None")
    if all(isinstance(options["params"], Mapping) for options in given):
        structure = "mapping"
    else:
        structure = "array" if is_array(params) else "sequence"
    return groups, structure


class SGD(Plan):
    """SGD, SGD with momentum, or Nesterov momentum, over a whole model in place.

    Parameters
    ----------
    params : array, sequence or mapping of arrays, or list of group dictionaries
        float32 or float64 arrays of any shape, C- or Fortran-contiguous, updated in place.
        Besides NumPy's: PyTorch's CPU tensors, and whatever lends its memory by DLPack or the
        buffer protocol, which is kept alive.
        A group dictionary holds ``"params"`` and any of the options below that bear a star,
        as PyTorch's do.
    lr : float >= 0, or callable
        Learning rate α*. A callable is given the count of steps taken so far.
    momentum : float in [0, 1), default 0
        ρ*. 0 is plain SGD, without a velocity.
    dampening : float in [0, 1), default 0
        τ*: ``v = momentum * v + (1 - dampening) * d``, undampened on a parameter's first step.
    weight_decay : float >= 0, default 0
        λ*: added to the gradient as λ·param.
    nesterov : bool, default False
        Nesterov momentum*; needs ``momentum > 0`` and no dampening.
    maximize : bool, default False
        Follow the gradient upwards*.
    decoupled_weight_decay : bool, default False
        Multiply the parameter by (1 - lr * weight_decay) instead*.
    lr_in_velocity : bool, default False
        The velocity convention*. False: ``v = ρ·v + d; x = x - α·v`` (PyTorch, optax). True:
        ``v = ρ·v - α·d; x = x + v`` (Keras, scikit-learn).
    clip_value : float >= 0, optional
        Clip every element of the scaled gradient to [-clip_value, clip_value]*.
    max_norm : float >= 0, optional
        Clip by the norm of all gradients together, as ``torch.nn.utils.clip_grad_norm_``.
        Excludes `clip_value`.
    skip_nonfinite : bool, default False
        Skip a step whose gradients hold a NaN or an infinity.
    track_grad_norm : bool, default False
        Measure `grad_norm` also without `max_norm`.
    ema_decay : float in [0, 1) or callable, optional
        Keep an exponential moving average of the parameters,
        ``e = ema_decay * e + (1 - ema_decay) * x`` after each step, starting from the
        parameters as they are now; see `ema`. A callable is given the count of steps so far.
    grads : in the structure of `params`, optional
        Gradient arrays that stay in place; `step` then needs no argument, which is the
        fastest way to step.

    Attributes
    ----------
    param_groups : list of dict
        One dictionary a group; options may be edited between steps and are checked when they
        change. ``"params"`` is a tuple and stays as it is: NumPy arrays, which for parameters
        of other libraries are views of their memory.
    step_count : int
        Steps applied.
    skipped : int
        Steps skipped.

    Raises
    ------
    TypeError, ValueError
        For arrays and hyper-parameters that are not as they must be, naming them.

    Notes
    -----
    The rules are those of CS231n (2017), lecture 7; PyTorch's documentation of
    ``torch.optim.SGD`` gives dampening, weight decay and maximize.

    With groups, gradients are given as one flat sequence over all groups in their order, or as
    one mapping where every group names its parameters.

    Examples
    --------
    >>> import numpy as np, optcore
    >>> params = {"w": np.ones((2, 2), np.float32), "b": np.zeros(2, np.float32)}
    >>> opt = optcore.SGD(params, lr=0.5, momentum=0.9)
    >>> opt.step({"w": np.ones((2, 2), np.float32), "b": np.ones(2, np.float32)})
    True
    >>> params["b"]
    array([-0.5, -0.5], dtype=float32)
    """

    def __init__(
        self,
        params: Any,
        lr: float | Schedule | None = None,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
        lr_in_velocity: bool = False,
        clip_value: float | None = None,
        max_norm: float | None = None,
        skip_nonfinite: bool = False,
        track_grad_norm: bool = False,
        ema_decay: float | Schedule | None = None,
        grads: Any = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "decoupled_weight_decay": decoupled_weight_decay,
            "lr_in_velocity": lr_in_velocity,
            "clip_value": clip_value,
        }
        groups, self._structure = _read_groups(params, defaults)
        self._build(
            groups,
            single=self._structure == "array",
            by_name=self._structure == "mapping",
            max_norm=max_norm,
            skip_nonfinite=skip_nonfinite,
            track_grad_norm=track_grad_norm,
            ema_decay=ema_decay,
            grads=grads,
        )

    def __repr__(self) -> str:
        """Return the options of every group, and how many parameters it holds."""
        lines = []
        for i, group in enumerate(self.param_groups):
            size = sum(array.size for array in group["params"])
            options = ", ".join(
                f"{key}={group.get(key)!r}" for key in ("lr", *GROUP_OPTIONS)
            )
            lines.append(
                f"  group {i}: {len(group['params'])} arrays, {size} elements, {options}"
            )
        return "\n".join([f"{type(self).__name__}(", *lines, ")"])

    @property
    def ema(self) -> Any:
        """The averages, in the structure of `params`; None where none are kept.

        Live arrays, updated by every step: copy what must stay. Flat where `params` is a list
        of groups. A parameter left out of a step, its gradient being None, does not move its
        average either.
        """
        averages = [average for _, average, _ in self._state]
        return None if averages[0] is None else self._structured(averages)

    def _structured(self, arrays: list[Any]) -> Any:
        """Return one array a parameter in the structure of `params`."""
        if self._structure == "array":
            return arrays[0]
        if self._structure == "mapping":
            return dict(zip(self._names, arrays, strict=True))
        return arrays

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

    @property
    def _sweep_options(self) -> dict[str, Any]:
        """The options that no group holds."""
        return {
            "max_norm": self.max_norm,
            "skip_nonfinite": self.skip_nonfinite,
            "track_grad_norm": self.track_grad_norm,
            "ema_decay": self.ema_decay,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what a later run needs to go on with the same bits.

        The parameters themselves, `max_norm`, `skip_nonfinite`, `track_grad_norm` and
        `ema_decay` are not in it: give them when building the optimizer that loads it.

        Returns
        -------
        dict
            ``"state"`` maps each parameter's index to its ``"velocity"`` (a copy, or None), its
            ``"ema"`` (a copy, or None) and ``"first_step"``. ``"param_groups"`` holds each
            group's options, with indices for ``"params"``; a callable lr is None. Then
            ``"step_count"``, ``"skipped"`` and ``"version"``. Plain arrays and numbers
            throughout.

        Raises
        ------
        KeyError, TypeError, ValueError
            For `param_groups` that a step would refuse.
        RuntimeError
            While a step is under way in another thread.
        """
        state = {
            i: {"velocity": velocity, "ema": average, "first_step": first_step}
            for i, (velocity, average, first_step) in enumerate(self._snapshot())
        }
        groups = []
        at = 0
        for group in self.param_groups:
            names = group["param_names"]
            saved = {key: _plain(value) for key, value in group.items()}
            saved["params"] = list(range(at, at + len(group["params"])))
            saved["param_names"] = None if names is None else list(names)
            at += len(group["params"])
            groups.append(saved)
        return {
            "version": STATE_VERSION,
            "step_count": self.step_count,
            "skipped": self.skipped,
            "param_groups": groups,
            "state": state,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state that `state_dict` returned.

        Options in the state replace those of the groups, but for two: where the state was
        saved with a callable lr, this optimizer's own callable stays; and `lr_in_velocity`
        stays as this optimizer was built, velocities of the other convention being converted
        by the factor -lr (v_right = -α·v_left), rounded once.

        Parameters
        ----------
        state_dict : mapping
            Arrays are copied, and must have the dtype and shape of their parameters.

        Raises
        ------
        KeyError, TypeError, ValueError
            For a state that does not fit, saying where; for a conversion with lr = 0, or one
            that would overflow. Nothing has changed then.
        """
        _State(self, state_dict).apply()

    def save(self, path: str | os.PathLike[str], *, include_params: bool = False) -> None:
        """Write all that a later run needs to go on with the same bits, in safetensors.

        The file is written beside `path`, synced and renamed: whoever is killed meanwhile
        leaves the old file or the new one.

        Parameters
        ----------
        path : path
            Its folder must exist.
        include_params : bool, default False
            Save the parameters as well, so that they cannot part from the state; `restore`
            and `load` then write them into the arrays.

        Raises
        ------
        ImportError
            Where safetensors is missing.
        OSError, TypeError
            Where the file cannot be written, or names or options are not plain numbers and
            strings. The old file stays.
        """
        checkpoint.write(path, self._contents(include_params))

    def _contents(self, include_params: bool) -> dict[str, Any]:
        """Return the state dictionary with all else that a checkpoint holds."""
        state = self.state_dict()
        if include_params:
            for entry, param in zip(state["state"].values(), self._whole_params, strict=True):
                entry["param"] = param.copy()
        options = self._sweep_options
        if callable(options["ema_decay"]):
            options["ema_decay"] = None
        return {**state, "options": options}

    def restore(self, path: str | os.PathLike[str]) -> None:
        """Go on from a file that `save` wrote, as `load_state_dict` does.

        Options of the whole optimizer (`max_norm`, `skip_nonfinite`, `track_grad_norm`,
        `ema_decay`) come from the file too; where the decay was saved as a callable, this
        optimizer's own stays. Parameters are written where the file holds them.

        Raises
        ------
        CheckpointError
            For a file that is damaged, foreign, or does not fit. Nothing has changed then.
        ImportError, OSError
            Where safetensors is missing, or the file.
        """
        self._resume(path, checkpoint.read(path))

    def _resume(self, path: str | os.PathLike[str], contents: Mapping[str, Any]) -> None:
        with checkpoint.refusing(path):
            self.load_state_dict(contents)

    @classmethod
    def load(
        cls: type[_Self],
        path: str | os.PathLike[str],
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
            names count, and their lr where a schedule was saved.
        lr, ema_decay : callable
            The schedules, where the saved optimizer had them: a file holds none.
        **more
            Passed to the constructor: ``grads``.

        Raises
        ------
        CheckpointError
            For a file that is damaged, foreign, or does not fit.
        ValueError
            For a schedule that is missing, or one given where a number was saved.
        ImportError, OSError, TypeError
            As `restore`, and as the constructor.
        """
        contents = cls._read(path, more)
        with checkpoint.refusing(path):
            saved = [{key: group[key] for key in ("lr", *GROUP_OPTIONS)}
                     for group in contents["param_groups"]]
            options = dict(contents["options"])
            averages = any(entry["ema"] is not None for entry in contents["state"].values())
        groups, grouped = _given_groups(params)
        if len(groups) != len(saved):
            raise checkpoint.CheckpointError(
                f"{path} does not fit: it holds {len(saved)} groups, params {len(groups)}"
            )
        for given, group in zip(groups, saved, strict=True):
            if group["lr"] is None:
                group["lr"] = lr if given.get("lr") is None else given["lr"]
                if not callable(group["lr"]):
                    raise ValueError(f"{path} was saved with a callable lr: give it again as lr=")
        if lr is not None and all(group["lr"] is not lr for group in saved):
            raise ValueError(f"lr must be left out, since {path} holds it, got {lr!r}")
        if averages and options["ema_decay"] is None:
            if not callable(ema_decay):
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
    def _read(cls, path: str | os.PathLike[str], more: Mapping[str, Any]) -> dict[str, Any]:
        """Read a checkpoint for an optimizer whose constructor will be given `more`."""
        return checkpoint.read(path)

class _State:
    """A state read and checked whole, before anything is taken over."""

    def __init__(self, opt: SGD, state_dict: Mapping[str, Any]) -> None:
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must be a mapping, got {type(state_dict).__name__}")
        for key in ("version", "step_count", "skipped", "param_groups", "state"):
            if key not in state_dict:
                raise KeyError(f"state_dict must have a key {key!r}, got {list(state_dict)!r}")
        if state_dict["version"] != STATE_VERSION:
            raise ValueError(
                f"state_dict['version'] must be {STATE_VERSION}, got {state_dict['version']!r}"
            )
        self.opt = opt
        self.counts = [_count(state_dict, key) for key in ("step_count", "skipped")]
        saved_groups = state_dict["param_groups"]
        if not isinstance(saved_groups, (list, tuple)) or not isinstance(
            state_dict["state"], Mapping
        ):
            raise TypeError(
                "state_dict must hold a list 'param_groups' and a mapping 'state', got "
                f"{type(saved_groups).__name__} and {type(state_dict['state']).__name__}"
            )
        if len(saved_groups) != len(opt.param_groups):
            raise ValueError(
                f"state_dict['param_groups'] must hold {len(opt.param_groups)} groups, "
                f"got {len(saved_groups)}"
            )
        self.options = {**opt._sweep_options, **_given(state_dict.get("options", {}))}
        self.groups: list[dict[str, Any]] = []
        self.params: list[np.ndarray | None] = []
        self.velocities: list[np.ndarray | None] = []
        self.averages: list[np.ndarray | None] = []
        self.first_steps: list[bool] = []
        params = iter(opt._whole_params)
        for g, (group, saved) in enumerate(zip(opt.param_groups, saved_groups, strict=True)):
            self._read_group(f"state_dict['param_groups'][{g}]", group, saved)
            factor = self._conversion(f"state_dict['param_groups'][{g}]", group, saved)
            for _ in group["params"]:
                self._read_param(state_dict["state"], next(params), factor)
        unknown = set(state_dict["state"]) - set(range(len(self.velocities)))
        if unknown:
            raise ValueError(
                f"state_dict['state'] must hold {len(self.velocities)} parameters, "
                f"got unknown {sorted(unknown, key=repr)!r}"
            )

    def _read_group(self, where: str, group: dict[str, Any], saved: Mapping[str, Any]) -> None:
        if not isinstance(saved, Mapping):
            raise TypeError(f"{where} must be a mapping, got {type(saved).__name__}")
        missing = [key for key in GROUP_KEYS if key not in saved]
        if missing:
            raise KeyError(f"{where} must have all options, got none named {missing!r}")
        first = len(self.velocities)
        expected = list(range(first, first + len(group["params"])))
        if saved["params"] != expected:
            raise ValueError(
                f"{where}['params'] must be {expected!r}, the parameters of this optimizer's "
                f"group, got {saved['params']!r}"
            )
        names = saved["param_names"]
        if names is not None and group["param_names"] is not None and (
            tuple(names) != group["param_names"]
        ):
            raise ValueError(
                f"{where}['param_names'] must be {list(group['param_names'])!r}, "
                f"got {list(names)!r}"
            )
        if saved["lr"] is None and not callable(group["lr"]):
            raise ValueError(
                f"{where} was saved with a callable lr: build the optimizer with one, "
                f"got lr={group['lr']!r}"
            )
        kept = {key: group[key] for key in ("params", "param_names", "lr_in_velocity")}
        if saved["lr"] is None:
            kept["lr"] = group["lr"]
        self.groups.append({**saved, **kept})

    def _conversion(
        self, where: str, group: dict[str, Any], saved: Mapping[str, Any]
    ) -> Callable[[np.ndarray], np.ndarray] | None:
        """Return how to turn the saved velocities into this optimizer's convention, if need be."""
        if bool(saved["lr_in_velocity"]) == bool(group["lr_in_velocity"]):
            return None
        lr = self.groups[-1]["lr"]
        if callable(lr):
            lr = lr(self.counts[0])
        lr = checked_lr(lr, f"{where}['lr']")
        if lr == 0:
            raise ValueError(
                f"{where} has lr_in_velocity={saved['lr_in_velocity']!r} and lr=0: its velocities "
                f"cannot be converted to lr_in_velocity={group['lr_in_velocity']!r}, which takes "
                "a factor of -lr"
            )
        to_right = bool(group["lr_in_velocity"])

        def convert(velocity: np.ndarray) -> np.ndarray:
            factor = velocity.dtype.type(-lr)
            with np.errstate(all="ignore"):
                converted: np.ndarray = velocity * factor if to_right else velocity / factor
            # A subnormal may vanish, as it would have in steps of the other convention.
            normal = np.abs(velocity) >= np.finfo(velocity.dtype).tiny
            if not np.array_equal(np.isfinite(converted), np.isfinite(velocity)) or np.any(
                normal & (converted == 0)
            ):
                raise ValueError(
                    f"{where}: a velocity overflows or vanishes when converted to "
                    f"lr_in_velocity={to_right!r} with lr={lr!r}"
                )
            return converted

        return convert

    def _read_param(self, states: Mapping[Any, Any], param: np.ndarray, convert: Any) -> None:
        i = len(self.velocities)
        if i not in states:
            raise KeyError(
                f"state_dict['state'] must hold parameter {i} under that integer, "
                f"got keys {list(states)[:5]!r}"
            )
        saved = states[i]
        where = f"state_dict['state'][{i}]"
        for key in ("velocity", "ema", "first_step"):
            if key not in saved:
                raise KeyError(f"{where} must have a key {key!r}, got {list(saved)!r}")
        if not isinstance(saved["first_step"], (bool, np.bool_)):
            raise TypeError(
                f"{where}['first_step'] must be True or False, got {saved['first_step']!r}"
            )
        velocity = _array_like(saved["velocity"], param, f"{where}['velocity']")
        average = _array_like(saved["ema"], param, f"{where}['ema']")
        if (average is not None) != (self.opt.ema_decay is not None):
            raise ValueError(
                f"{where}['ema'] must be {'None' if average is not None else 'an array'}, "
                f"got {'an array' if average is not None else 'None'}: build the optimizer "
                f"{'with' if average is not None else 'without'} ema_decay"
            )
        if velocity is not None and convert is not None:
            velocity = convert(velocity)
        self.params.append(_array_like(saved.get("param"), param, f"{where}['param']"))
        if self.params[-1] is not None and not param.flags.writeable:
            raise ValueError(f"{where}['param'] cannot be restored: its parameter is read-only")
        self.velocities.append(velocity)
        self.averages.append(average)
        self.first_steps.append(bool(saved["first_step"]))

    def apply(self) -> None:
        opt = self.opt
        step_count, skipped = self.counts
        opt._restore(
            self.groups, opt._own_part(self.velocities), opt._own_part(self.averages),
            self.first_steps, step_count, skipped, self.options,
        )
        for param, saved in zip(opt._whole_params, self.params, strict=True):
            if saved is not None:
                param[...] = saved


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the saved options of the whole optimizer, without a decay that was a callable."""
    return {key: value for key, value in options.items()
            if key != "ema_decay" or value is not None}


def _plain(value: Any) -> Any:
    """Return a number of any kind as Python's own, and None for a callable."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, Real) and not isinstance(value, (int, float)):
        return float(value)
    return None if callable(value) else value


def _count(state_dict: Mapping[str, Any], key: str) -> int:
    value = state_dict[key]
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not (
        0 <= value < sys.maxsize
    ):
        raise ValueError(
            f"state_dict[{key!r}] must be a whole number in [0, {sys.maxsize}), got {value!r}"
        )
    return int(value)


def _array_like(array: Any, param: np.ndarray, where: str) -> np.ndarray | None:
    """Check a saved array against its parameter; float32 state stays float32, or is refused."""
    if array is None:
        return None
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{where} must be a NumPy array or None, got {type(array).__name__}")
    if array.dtype != param.dtype:
        raise TypeError(f"{where} has dtype {array.dtype}; its parameter has {param.dtype}")
    if array.shape != param.shape:
        raise ValueError(f"{where} has shape {array.shape}; its parameter has {param.shape}")
    return array
