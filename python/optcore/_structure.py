"""What users give as parameters: an array, a sequence, a mapping, or a list of groups."""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from optcore.arrays import is_array


def named_arrays(params: Any, what: str) -> tuple[tuple[Any, ...], tuple[Any, ...] | None]:
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


def given_groups(params: Any) -> tuple[list[Any], bool]:
    """Return the groups as they were given, or one of bare parameters, and which it was."""
    if isinstance(params, Iterator):    # of arrays or of groups: model.parameters() is one
        params = list(params)
    if isinstance(params, (list, tuple)) and any(isinstance(p, Mapping) for p in params):
        return list(params), True
    return [{"params": params}], False


def read_groups(params: Any, defaults: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """Return complete group dictionaries, and the structure in which gradients will come."""
    given, grouped = given_groups(params)
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
        arrays, names = named_arrays(options["params"], where)
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
