"""State dictionaries: read and checked whole, before an optimizer takes anything over."""
from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from optcore.arrays import check_saved, name_of_dtype, same_type, widen
from optcore.groups import OWN_KEYS
from optcore.options import (
    CHOICES,
    GROUP_OPTIONS,
    LASTING,
    OPTIMIZER_OPTIONS,
    checked,
    is_schedule,
    plain_number,
)
from optcore.structure import abridged

if TYPE_CHECKING:
    from optcore.optimizer import Optimizer

# 1 knew no schedule but lr's, which it saved as None; in 2 a group names those it has; 3 has the
# options that 2 did not know, 4 those of half types and their masters, 5 that of rows.
STATE_VERSION = 5
NEW_SINCE = {
    "dampen_first": 3, "flush_subnormals": 3, "master": 4, "rounding": 4, "velocity_dtype": 4,
    "lazy": 5,
}
# The counts that a float64 holds
MOST_STEPS = 2**53

Convert = Callable[[np.ndarray], np.ndarray]


def saved_group(
    group: Mapping[str, Any], first: int, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a group as a state dictionary holds it, its parameters being numbered from `first`.

    Numbers are Python's own; a schedule is None and named under ``"schedules"``. `options` are
    those that it has.
    """
    saved = {key: checked(key, value, key) if key in CHOICES else _plain(value)
             for key, value in group.items()}
    names = group["param_names"]
    saved["params"] = list(range(first, first + len(group["params"])))
    saved["param_names"] = None if names is None else list(names)
    saved["schedules"] = [key for key in options if is_schedule(group[key])]
    return saved


def schedules_of(saved: Mapping[str, Any]) -> list[str]:
    """Return the names of the options that were schedules when a group was saved."""
    schedules: list[str] = saved.get("schedules", ["lr"] if saved["lr"] is None else [])
    return schedules


def completed(saved: Mapping[str, Any], version: Any) -> dict[str, Any]:
    """Return a saved group with the defaults of options that its version did not know."""
    added = {key: GROUP_OPTIONS["sgd"][key] for key, since in NEW_SINCE.items() if version < since}
    return {**added, **saved}


class NotFound(NamedTuple):
    """What a load by names did not find; see `optcore.SGD.load_state_dict`."""

    missing: list[Any]
    unexpected: list[Any]
    groups: list[int]


class State:
    """A state read and checked whole, before anything is taken over."""

    def __init__(
        self, opt: Optimizer, state_dict: Mapping[str, Any], by_name: bool = False
    ) -> None:
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
        self.counts = [
            saved_count(state_dict, key, "state_dict") for key in ("step_count", "skipped")
        ]
        saved_groups = state_dict["param_groups"]
        if not isinstance(saved_groups, (list, tuple)) or not isinstance(
            state_dict["state"], Mapping
        ):
            raise TypeError(
                "state_dict must hold a list 'param_groups' and a mapping 'state', got "
                f"{type(saved_groups).__name__} and {type(state_dict['state']).__name__}"
            )
        for g, saved in enumerate(saved_groups):
            if not isinstance(saved, Mapping):
                raise TypeError(
                    f"state_dict['param_groups'][{g}] must be a mapping, got {type(saved).__name__}"
                )
        if not by_name and len(saved_groups) != len(opt.param_groups):
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
        self.has_master, self.writes_masters = opt._has_master, False
        saved_groups = [completed(saved, version) for saved in saved_groups]
        self.not_found = NotFound([], [], [])
        places = self._places_by_name(saved_groups) if by_name else None
        params = iter(opt._whole_params)
        for g, group in enumerate(opt.param_groups):
            first = len(self.entries)
            own = range(first, first + len(group["params"]))
            found = [(g, i) for i in own] if places is None else [places[i] for i in own]
            origins = {g} if places is None else {place[0] for place in found if place}
            converts = {}
            for origin in sorted(origins):
                where = f"state_dict['param_groups'][{origin}]"
                options = self._read_group(where, group, saved_groups[origin], own, by_name)
                converts[origin] = self._conversion(where, group, saved_groups[origin], options)
            if len(origins) == 1:
                self.groups.append(options)
            else:
                self.groups.append(dict(group))
                self.not_found.groups.append(g)
            for place in found:
                param = next(params)
                if place is None:
                    self.params.append(None)
                    self.entries.append({})
                else:
                    self._read_param(state_dict["state"], place[1], param, converts[place[0]])
        unknown = set(state_dict["state"]) - set(range(len(self.entries)))
        if unknown and not by_name:
            raise ValueError(
                f"state_dict['state'] must hold {len(self.entries)} parameters, "
                f"got unknown {sorted(unknown, key=repr)!r}"
            )

    def _places_by_name(self, saved_groups: list[Any]) -> list[tuple[int, int] | None]:
        """Return of each parameter the saved group and the number under its name; None for none."""
        places: dict[Any, tuple[int, int]] = {}
        for g, saved in enumerate(saved_groups):
            names, numbers = saved.get("param_names"), saved.get("params")
            if names is None or not isinstance(numbers, list) or len(numbers) != len(names):
                raise ValueError(
                    f"state_dict['param_groups'][{g}] must name its parameters to be loaded by "
                    f"name, got param_names={names!r}"
                )
            for name, i in zip(names, numbers, strict=True):
                if not isinstance(name, Hashable):
                    raise TypeError(
                        f"state_dict['param_groups'][{g}]['param_names'] must be names, "
                        f"got {name!r}"
                    )
                if name in places:
                    raise ValueError(f"state_dict must have each name once, got {name!r} twice")
                places[name] = g, i
        own = self.opt._names
        if None in own:
            raise ValueError(
                "by_name needs parameters with names: give params as a mapping, or param_names"
            )
        found = [places.get(name) for name in own]
        self.not_found.missing.extend(name for name in own if name not in places)
        self.not_found.unexpected.extend(name for name in places if name not in own)
        if not any(found):
            raise ValueError(
                f"state_dict must hold some of the parameters {abridged(own)}, "
                f"got {abridged(places)}"
            )
        return found

    def _read_group(
        self, where: str, group: dict[str, Any], saved: Mapping[str, Any], own: range, by_name: bool
    ) -> dict[str, Any]:
        """Return the options that a group takes over, after checking its parameters."""
        options = self.opt._group_options
        missing = [key for key in (*OWN_KEYS, *options) if key not in saved]
        if missing:
            raise KeyError(f"{where} must have all options, got none named {missing!r}")
        expected = list(own)
        if not by_name and saved["params"] != expected:
            raise ValueError(
                f"{where}['params'] must be {expected!r}, the parameters of this optimizer's "
                f"group, got {saved['params']!r}"
            )
        names = saved["param_names"]
        if not isinstance(names, (list, tuple, type(None))):
            raise TypeError(f"{where}['param_names'] must be a list or None, got {names!r}")
        right = saved.get("lr_in_velocity", False)
        if not isinstance(right, (bool, np.bool_)):
            raise TypeError(f"{where}['lr_in_velocity'] must be True or False, got {right!r}")
        for key in CHOICES.keys() & options.keys():
            checked(key, saved[key], f"{where}[{key!r}]")
        if not by_name and names is not None and group["param_names"] is not None and (
            tuple(names) != group["param_names"]
        ):
            raise ValueError(
                f"{where}['param_names'] must be {abridged(group['param_names'])}, "
                f"got {abridged(names)}: load_state_dict(..., by_name=True) matches by names"
            )
        kept = {key: group[key] for key in (*OWN_KEYS, *LASTING) if key in group}
        schedules = schedules_of(saved)
        if not isinstance(schedules, (list, tuple)) or not set(schedules) <= set(options):
            raise ValueError(f"{where}['schedules'] must name options, got {schedules!r}")
        for key in schedules:
            if not is_schedule(group[key]):
                raise ValueError(
                    f"{where} was saved with a callable {key}: build the optimizer with one, "
                    f"got {key}={group[key]!r}"
                )
            kept[key] = group[key]
        taken = {key: value for key, value in saved.items() if key != "schedules"}
        return {**taken, **kept, **self.opt._always}

    def _conversion(
        self, where: str, group: dict[str, Any], saved: Mapping[str, Any], options: dict[str, Any]
    ) -> Convert | None:
        """Return how to turn the saved velocities into this optimizer's convention, if need be."""
        if bool(saved.get("lr_in_velocity")) == bool(group.get("lr_in_velocity")):
            return None
        lr = options["lr"]
        lr = checked("lr", lr(self.counts[0]) if is_schedule(lr) else lr, f"{where}['lr']")
        if lr == 0:
            raise ValueError(
                f"{where} has lr_in_velocity={saved['lr_in_velocity']!r} and lr=0: its velocities "
                f"cannot be converted to lr_in_velocity={group['lr_in_velocity']!r}, which takes "
                "a factor of -lr"
            )
        to_right = bool(group["lr_in_velocity"])

        def convert(saved: np.ndarray) -> np.ndarray:
            velocity = np.empty_like(saved, np.promote_types(saved.dtype, np.float32))
            widen(saved, velocity)
            factor = velocity.dtype.type(-lr)
            with np.errstate(all="ignore"):
                converted = np.asarray(velocity * factor if to_right else velocity / factor)
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
        self, states: Mapping[Any, Any], i: int, param: np.ndarray, convert: Convert | None
    ) -> None:
        if i not in states:
            raise KeyError(
                f"state_dict['state'] must hold parameter {i} under that integer, "
                f"got keys {list(states)[:5]!r}"
            )
        saved = states[i]
        where = f"state_dict['state'][{i}]"
        entry: dict[str, Any] = {}
        numbers = self.opt._count_names
        keys = (*self.opt._state_names, "ema", "first_step", *numbers)
        unknown = [key for key in saved if key not in (*keys, "param", "master")]
        if unknown:
            raise ValueError(
                f"{where} must have the keys {list(keys)!r}, got unknown {abridged(unknown)}"
            )
        for key in keys:
            if key not in saved:
                raise KeyError(f"{where} must have a key {key!r}, got {list(saved)!r}")
            if key != "first_step" and key not in numbers:
                entry[key] = check_saved(saved[key], param, f"{where}[{key!r}]")
        if not isinstance(saved["first_step"], (bool, np.bool_)):
            raise TypeError(
                f"{where}['first_step'] must be True or False, got {saved['first_step']!r}"
            )
        entry["first_step"] = bool(saved["first_step"])
        for key in numbers:
            entry[key] = saved_number(saved, key, where)
        for key in numbers[1:]:
            if (entry[key] == 1) != (entry["step"] == 0):
                raise ValueError(
                    f"{where}[{key!r}] must be 1 before the first step and only then, got "
                    f"{entry[key]!r} with step={entry['step']!r}"
                )
        for key in self.opt._first_states if numbers else ():
            if entry[key] is None:
                raise ValueError(f"{where}[{key!r}] must be an array, got None")
        average = entry["ema"]
        if (average is not None) != (self.opt.ema_decay is not None):
            raise ValueError(
                f"{where}['ema'] must be {'None' if average is not None else 'an array'}, "
                f"got {'an array' if average is not None else 'None'}: build the optimizer "
                f"{'with' if average is not None else 'without'} ema_decay"
            )
        if convert is not None and entry["velocity"] is not None:
            entry["velocity"] = convert(entry["velocity"])
        self._read_values(saved, param, where, entry)
        self.entries.append(entry)

    def _read_values(
        self, saved: Mapping[str, Any], param: np.ndarray, where: str, entry: dict[str, Any]
    ) -> None:
        """Read what becomes of the parameter and of its master, each a float32 in some states."""
        values = check_saved(saved.get("param"), param, f"{where}['param']")
        master = check_saved(saved.get("master"), param, f"{where}['master']")
        if master is not None and master.dtype != np.float32:
            raise TypeError(
                f"{where}['master'] must have dtype float32, got {name_of_dtype(master)}"
            )
        entry["master"] = master
        if values is not None:
            if not param.flags.writeable:
                raise ValueError(f"{where}['param'] cannot be restored: its parameter is read-only")
            has_master = self.has_master[len(self.entries)]
            if has_master and (master is not None or not same_type(values, param)):
                # masters of the two kinds are not shown alike where a rounding ties
                entry["master"] = values if master is None else master
                entry["writes_master"] = self.writes_masters = True
                values = None
            elif param.dtype == np.float32:
                values = values if master is None else master
            elif not same_type(values, param):
                raise TypeError(
                    f"{where}['param'] has dtype {name_of_dtype(values)}; its parameter has "
                    f"{name_of_dtype(param)} and no master, so that it would be rounded: build "
                    "the optimizer with master='auto'"
                )
        self.params.append(values)

    def apply(self) -> None:
        """Take it all over, or raise and change nothing."""
        opt = self.opt
        arrays = {
            key: opt._own_part([entry.get(key) for entry in self.entries])
            for key in (*opt._state_names, "ema", "master")
        }
        entries = [
            {**entry, **{key: parts[i] for key, parts in arrays.items() if key in entry}}
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


def saved_number(saved: Mapping[str, Any], key: str, where: str) -> float:
    """Return a parameter's count of steps, or a product of as many numbers below 1."""
    if key == "step":
        count = saved_count(saved, key, where)
        if count > MOST_STEPS:
            raise ValueError(f"{where}[{key!r}] must be at most 2**53, got {count!r}")
        return count
    number = plain_number(saved[key])
    if number is None or not 0 <= number <= 1:
        raise ValueError(f"{where}[{key!r}] must be a number in [0, 1], got {saved[key]!r}")
    return number


def saved_count(saved: Mapping[str, Any], key: str, where: str) -> int:
    """Return a count that a state dictionary holds."""
    value = saved[key]
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not (
        0 <= value < sys.maxsize
    ):
        raise ValueError(
            f"{where}[{key!r}] must be a whole number in [0, {sys.maxsize}), got {value!r}"
        )
    return int(value)
