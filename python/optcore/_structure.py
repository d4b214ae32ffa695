"""What users give as parameters: an array, a nest of sequences and mappings, or groups of those."""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from optcore.arrays import in_one_place, is_array
from optcore.options import GROUP_OPTIONS
from optcore.structure import Nest, abridged, is_sequence


class Group(NamedTuple):
    """One group as the plan takes it."""

    options: dict[str, Any]     # complete; "params" is a tuple, "param_names" one or None
    params: Any                 # the container that the user keeps
    nest: Nest | None           # None: one array
    given: Any                  # the user's own dictionary of options, or None


def unnested(params: Any, what: str, first: int) -> tuple[list[Any], list[Any] | None, Nest | None]:
    """Return the arrays of one group, their names if it has any, and how they nest.

    Arrays are numbered from `first`. A flat mapping's keys are names as they are; in a deeper nest
    keys and places are joined by dots.
    """
    if is_array(params):
        return [params], None, None
    if isinstance(params, Mapping):
        options = options_in(params)
        if "params" in params and options:
            raise TypeError(
                f"{what} must be arrays, got a group dictionary with {options!r}: groups come in "
                "a list, [{'params': …}]"
            )
    elif not is_sequence(params):
        raise TypeError(
            f"{what} must be an array, a sequence or a mapping of arrays, or a list of group "
            f"dictionaries, got {type(params).__name__}"
        )
    arrays: list[Any] = []
    names: list[Any] = []
    nest = _nest(params, what, arrays, names, (), first, ())
    deep = any(isinstance(entry, Nest) for entry in nest.entries)
    if deep:
        return arrays, [".".join(map(str, path)) for path in names], nest
    return arrays, None if nest.keys is None else [path[0] for path in names], nest


def _nest(
    container: Any, what: str, arrays: list[Any], names: list[Any], path: tuple[Any, ...],
    first: int, around: tuple[Any, ...],
) -> Nest:
    if any(container is other for other in around):
        raise ValueError(f"{what} must not hold itself")
    if isinstance(container, Iterator):
        raise TypeError(
            f"{what} must be an array, a sequence or a mapping, got {type(container).__name__}"
        )
    mapping = isinstance(container, Mapping)
    keys = tuple(container) if mapping else None
    held = [container[key] for key in keys] if keys is not None else list(container)
    if type(container) not in (dict, list, tuple):
        again = [container[key] for key in keys] if keys is not None else list(container)
        for key, one, other in zip(keys or range(len(held)), held, again, strict=True):
            if one is not other and is_array(one) and not in_one_place(one, other):
                raise ValueError(
                    f"{what} must give the same array at each access, got "
                    f"{type(container).__name__}, which makes {key!r} anew, so that updates would "
                    "be lost: "
                    + (f"keep dict({what})" if mapping else f"keep list({what})")
                )
    entries: list[int | Nest] = []
    for key, entry in zip(keys or range(len(held)), held, strict=True):
        if not is_array(entry) and (isinstance(entry, Mapping) or is_sequence(entry)):
            entries.append(_nest(
                entry, f"{what}[{key!r}]", arrays, names, (*path, key), first, (*around, container)
            ))
            continue
        entries.append(first + len(arrays))
        arrays.append(entry)
        names.append((*path, key))
    return Nest(tuple if isinstance(container, tuple) else list, keys, tuple(entries))


def given_groups(params: Any) -> tuple[list[Any], bool]:
    """Return the groups as they were given, or one of bare parameters, and which it was."""
    if isinstance(params, Iterator):    # of arrays or of groups: model.parameters() is one
        params = list(params)
    if isinstance(params, (list, tuple)) and any(
        isinstance(p, Mapping) and ("params" in p or options_in(p)) for p in params
    ):
        return list(params), True
    return [{"params": params}], False


def options_in(params: Mapping[Any, Any]) -> list[str]:
    """Return the options among the keys of what should be parameters by name."""
    known = dict.fromkeys(key for options in GROUP_OPTIONS.values() for key in options)
    return [key for key in known if key in params and not is_array(params[key])]


def read_groups(params: Any, defaults: dict[str, Any]) -> tuple[list[Group], Nest | None]:
    """Return the groups, and the structure in which gradients will come; None for one array."""
    given, grouped = given_groups(params)
    groups: list[Group] = []
    for options in given:
        groups.append(read_group(options, defaults, groups, grouped))
    return groups, structure_of(groups)


def read_group(
    options: Any, defaults: dict[str, Any], before: list[Group], grouped: bool = True,
    what: str | None = None,
) -> Group:
    """Return one group, complete, whose parameters follow on those of the groups before."""
    i = len(before)
    where = f"param_groups[{i}]"
    if not isinstance(options, Mapping):
        raise TypeError(
            f"{what or f'params[{i}]'} must be a group dictionary"
            f"{'' if what else ' as its neighbours are'}, got {type(options).__name__}"
        )
    if "params" not in options:
        raise ValueError(
            f"{what or f'params[{i}]'} must have a key 'params', got {list(options)!r}"
        )
    params = options["params"]
    if isinstance(params, Iterator):
        params = list(params)
    arrays, names, nest = unnested(
        params, f"{where}['params']" if grouped else "params",
        sum(len(group.options["params"]) for group in before),
    )
    if options.get("param_names") is not None:
        given = options["param_names"]
        if isinstance(given, str) or not isinstance(given, Iterable):
            raise TypeError(
                f"{where}['param_names'] must be a sequence of names, got {type(given).__name__}"
            )
        given = list(given)
        if len(given) != len(arrays):
            raise ValueError(
                f"{where}['param_names'] must name {len(arrays)} parameters, got {len(given)}"
            )
        if names is not None and given != names:
            raise ValueError(
                f"{where}['param_names'] must be left out where params have names, "
                f"{abridged(names)}, got {abridged(given)}"
            )
        names = given
    complete = {
        **defaults, **options, "params": tuple(arrays),
        "param_names": None if names is None else tuple(names),
    }
    if complete["lr"] is None:
        raise TypeError(f"lr must be given{f' for {where}' if grouped else ''}, got None")
    all_names = [name for group in before for name in group.options["param_names"] or ()]
    all_names += names or ()
    twice = [name for name, count in Counter(all_names).items() if count > 1]
    if twice:
        raise ValueError(f"params must have names of their own, got {abridged(twice)} twice")
    if None in all_names:
        raise ValueError("params must have names of their own, got None")
    return Group(complete, params, nest, options if grouped else None)


def structure_of(groups: list[Group]) -> Nest | None:
    """Return the structure of all groups together: one mapping where all are, else a sequence."""
    nests = [group.nest for group in groups]
    if len(nests) == 1 and groups[0].given is None:
        return nests[0]
    if all(nest is not None and nest.keys is not None for nest in nests):
        return _merged(nests, "params")
    return Nest(list, None, tuple(range(sum(len(group.options["params"]) for group in groups))))


def _merged(nests: list[Any], what: str) -> Nest:
    """Return one mapping of several that share no array; the mappings within are merged too."""
    entries: dict[Any, Any] = {}
    for nest in nests:
        for key, entry in zip(nest.keys, nest.entries, strict=True):
            entries.setdefault(key, []).append(entry)
    for key, found in entries.items():
        if len(found) > 1 and not all(isinstance(nest, Nest) and nest.keys is not None
                                      for nest in found):
            raise ValueError(
                f"{what}[{key!r}] must be a mapping in every group that has it, got another in one"
            )
        entries[key] = _merged(found, f"{what}[{key!r}]") if len(found) > 1 else found[0]
    return Nest(list, tuple(entries), tuple(entries.values()))
