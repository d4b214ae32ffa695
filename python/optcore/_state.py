"""State dictionaries: read and checked whole, before an optimizer takes anything over."""
from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from optcore.arrays import check_saved
from optcore.groups import GROUP_KEYS
from optcore.options import GROUP_OPTIONS, OPTIMIZER_OPTIONS, checked, is_schedule, plain_number

if TYPE_CHECKING:
    from optcore.sgd import SGD

# 1 knew no schedule but lr's, which it saved as None; in 2 a group names those it has.
STATE_VERSION = 2

Convert = Callable[[np.ndarray], np.ndarray]


def saved_group(group: Mapping[str, Any], first: int) -> dict[str, Any]:
    """Return a group as a state dictionary holds it, its parameters being numbered from `first`.

    Numbers are Python's own; a schedule is None and named under ``"schedules"``.
    """
    saved = {key: _plain(value) for key, value in group.items()}
    names = group["param_names"]
    saved["params"] = list(range(first, first + len(group["params"])))
    saved["param_names"] = None if names is None else list(names)
    saved["schedules"] = [key for key in GROUP_OPTIONS if is_schedule(group[key])]
    return saved


def schedules_of(saved: Mapping[str, Any]) -> list[str]:
    """Return the names of the options that were schedules when a group was saved."""
    schedules: list[str] = saved.get("schedules", ["lr"] if saved["lr"] is None else [])
    return schedules


class State:
    """A state read and checked whole, before anything is taken over."""

    def __init__(self, opt: SGD, state_dict: Mapping[str, Any]) -> None:
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must be a mapping, got {type(state_dict).__name__}")
        for key in ("version", "step_count", "skipped", "param_groups", "state"):
            if key not in state_dict:
                raise KeyError(f"state_dict must have a key {key!r}, got {list(state_dict)!r}")
        version = state_dict["version"]
        if type(version) is not int or not 1 <= version <= STATE_VERSION:
            raise ValueError(
                f"state_dict['version'] must be a number from 1 to {STATE_VERSION}, got {version!r}"
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
        self.options = dict(state_dict.get("options", {}))
        unknown = set(self.options) - set(OPTIMIZER_OPTIONS)
        if unknown:
            raise ValueError(
                f"state_dict['options'] must be among {', '.join(OPTIMIZER_OPTIONS)}, "
                f"got {sorted(unknown, key=repr)!r}"
            )
        self.groups: list[dict[str, Any]] = []
        self.params: list[np.ndarray | None] = []
        self.entries: list[dict[str, Any]] = []
        params = iter(opt._whole_params)
        for g, (group, saved) in enumerate(zip(opt.param_groups, saved_groups, strict=True)):
            where = f"state_dict['param_groups'][{g}]"
            self._read_group(where, group, saved)
            convert = self._conversion(where, group, saved)
            for _ in group["params"]:
                self._read_param(state_dict["state"], next(params), convert)
        unknown = set(state_dict["state"]) - set(range(len(self.entries)))
        if unknown:
            raise ValueError(
                f"state_dict['state'] must hold {len(self.entries)} parameters, "
                f"got unknown {sorted(unknown, key=repr)!r}"
            )

    def _read_group(self, where: str, group: dict[str, Any], saved: Mapping[str, Any]) -> None:
        if not isinstance(saved, Mapping):
            raise TypeError(f"{where} must be a mapping, got {type(saved).__name__}")
        missing = [key for key in GROUP_KEYS if key not in saved]
        if missing:
            raise KeyError(f"{where} must have all options, got none named {missing!r}")
        first = len(self.entries)
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
        kept = {key: group[key] for key in ("params", "param_names", "lr_in_velocity")}
        schedules = schedules_of(saved)
        if not isinstance(schedules, (list, tuple)) or not set(schedules) <= set(GROUP_OPTIONS):
            raise ValueError(f"{where}['schedules'] must name options, got {schedules!r}")
        for key in schedules:
            if not is_schedule(group[key]):
                raise ValueError(
                    f"{where} was saved with a callable {key}: build the optimizer with one, "
                    f"got {key}={group[key]!r}"
                )
            kept[key] = group[key]
        self.groups.append({
            **{key: value for key, value in saved.items() if key != "schedules"}, **kept
        })

    def _conversion(
        self, where: str, group: dict[str, Any], saved: Mapping[str, Any]
    ) -> Convert | None:
        """Return how to turn the saved velocities into this optimizer's convention, if need be."""
        if bool(saved["lr_in_velocity"]) == bool(group["lr_in_velocity"]):
            return None
        lr = self.groups[-1]["lr"]
        lr = checked("lr", lr(self.counts[0]) if is_schedule(lr) else lr, f"{where}['lr']")
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

    def _read_param(
        self, states: Mapping[Any, Any], param: np.ndarray, convert: Convert | None
    ) -> None:
        i = len(self.entries)
        if i not in states:
            raise KeyError(
                f"state_dict['state'] must hold parameter {i} under that integer, "
                f"got keys {list(states)[:5]!r}"
            )
        saved = states[i]
        where = f"state_dict['state'][{i}]"
        entry: dict[str, Any] = {}
        for key in (*self.opt._state_names, "ema", "first_step"):
            if key not in saved:
                raise KeyError(f"{where} must have a key {key!r}, got {list(saved)!r}")
            if key != "first_step":
                entry[key] = check_saved(saved[key], param, f"{where}[{key!r}]")
        if not isinstance(saved["first_step"], (bool, np.bool_)):
            raise TypeError(
                f"{where}['first_step'] must be True or False, got {saved['first_step']!r}"
            )
        entry["first_step"] = bool(saved["first_step"])
        average = entry["ema"]
        if (average is not None) != (self.opt.ema_decay is not None):
            raise ValueError(
                f"{where}['ema'] must be {'None' if average is not None else 'an array'}, "
                f"got {'an array' if average is not None else 'None'}: build the optimizer "
                f"{'with' if average is not None else 'without'} ema_decay"
            )
        if convert is not None and entry["velocity"] is not None:
            entry["velocity"] = convert(entry["velocity"])
        self.params.append(check_saved(saved.get("param"), param, f"{where}['param']"))
        if self.params[-1] is not None and not param.flags.writeable:
            raise ValueError(f"{where}['param'] cannot be restored: its parameter is read-only")
        self.entries.append(entry)

    def apply(self) -> None:
        """Take it all over, or raise and change nothing."""
        opt = self.opt
        arrays = {
            key: opt._own_part([entry[key] for entry in self.entries])
            for key in (*opt._state_names, "ema")
        }
        entries = [
            {**entry, **{key: parts[i] for key, parts in arrays.items()}}
            for i, entry in enumerate(self.entries)
        ]
        pairs = zip(opt._whole_params, self.params, strict=True)
        writes = [(param, saved) for param, saved in pairs if saved is not None]
        opt._restore(self.groups, entries, self.options, self.counts, writes)


def _plain(value: Any) -> Any:
    """Return a number of any kind as Python's own, and None for a schedule."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if is_schedule(value):
        return None
    number = None if type(value) in (int, float) else plain_number(value)
    return value if number is None else number


def _count(state_dict: Mapping[str, Any], key: str) -> int:
    value = state_dict[key]
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not (
        0 <= value < sys.maxsize
    ):
        raise ValueError(
            f"state_dict[{key!r}] must be a whole number in [0, {sys.maxsize}), got {value!r}"
        )
    return int(value)
