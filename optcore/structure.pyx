"""The user's containers: how arrays nest in them, and what they held when last read.

A `Nest` is made once of the parameters (by `_structure.py`) and takes gradients, or whatever
comes in the same structure, apart into their flat order. `Roots` are containers that the user
keeps and may put other arrays into: they are looked at again by the identity of what they hold.
"""
from cython cimport critical_section
from cpython.dict cimport PyDict_CheckExact, PyDict_Copy, PyDict_Next
from cpython.list cimport PyList_CheckExact, PyList_GET_ITEM, PyList_GET_SIZE
from cpython.object cimport PyObject
from cpython.tuple cimport PyTuple_GET_ITEM, PyTuple_GET_SIZE

from collections.abc import Iterable, Iterator, Mapping

from optcore.arrays import in_one_place, is_array

cdef enum:
    MOST_TOLD = 5


def abridged(items):
    """Return a list as an error shows it: the first few, and how many more there are."""
    items = list(items)
    if len(items) <= MOST_TOLD + 1:
        return repr(items)
    return f"{items[:MOST_TOLD]!r} and {len(items) - MOST_TOLD} more"


def is_sequence(given):
    """Whether a container is walked by its places; by its type, for a proxy's __class__ may lie."""
    return isinstance(given, (list, tuple)) or (
        issubclass(type(given), Iterable)
        and not isinstance(given, (str, bytes, set, frozenset, Mapping))
        and not is_array(given)
    )


cdef class Nest:
    """One container's keys or places, and the index of the array in each or the nest there."""

    def __init__(self, kind, keys, entries):
        self.kind = kind
        self.keys = keys
        self.entries = entries
        self._in_order = list(entries) == list(range(len(entries)))

    def __reduce__(self):
        return Nest, (self.kind, self.keys, self.entries)

    cdef tuple listed(self, object given, str what, Py_ssize_t n):
        """The n arrays of what has this structure, in order; None where it has None."""
        cdef list into
        cdef tuple found
        if given is None:       # a function that forgot to return, at the root
            self._refuse_kind(given, what)
        if self._in_order and self.keys is None and isinstance(given, (list, tuple)):
            found = tuple(given)        # whose length is its own, whatever the list says
            self._check_length(len(found), what)
            return found
        into = [None] * n
        self.take(given, what, into, None)
        return tuple(into)

    cdef int take(self, object given, str what, list into, Watch watch) except -1:
        """Put the arrays of a container where they go, noting all containers for a watch."""
        cdef Py_ssize_t k
        cdef tuple found
        if given is None:       # none of its parameters has one
            return 0
        if self.keys is not None:
            if not isinstance(given, Mapping):
                self._refuse_kind(given, what)
            missing = [key for key in self.keys if key not in given]
            if missing or len(given) != len(self.keys):
                unknown = [key for key in given if key not in self.keys]
                raise ValueError(
                    f"{what} must have the names of params, got "
                    + " and ".join(
                        [f"none named {abridged(missing)}"] * bool(missing)
                        + [f"unknown {abridged(unknown)}"] * bool(unknown)
                    )
                )
        elif not is_sequence(given):
            self._refuse_kind(given, what)
        if watch is not None:           # before it is read: what another thread puts in between
            watch.note(given)           # the two is seen as a change
            if PyDict_CheckExact(given):
                given = PyDict_Copy(given)      # as it is at one moment
        if self.keys is not None:
            found = tuple([given[key] for key in self.keys])
        else:
            found = tuple(given)
            self._check_length(len(found), what)
        for k in range(len(found)):
            entry = self.entries[k]
            if isinstance(entry, Nest):
                (<Nest>entry).take(
                    found[k], f"{what}[{k if self.keys is None else self.keys[k]!r}]", into, watch
                )
            else:
                into[entry] = found[k]
        return 0

    cdef int _refuse_kind(self, object given, str what) except -1:
        expected = "a mapping by parameter name" if self.keys is not None else (
            f"a sequence of {len(self.entries)} arrays" if self._in_order
            else f"a sequence of {len(self.entries)}"
        )
        raise TypeError(f"{what} must be {expected}, got {type(given).__name__}")

    cdef int _check_length(self, Py_ssize_t n, str what) except -1:
        if n != len(self.entries):
            raise ValueError(
                f"{what} must have one entry for each of {len(self.entries)} parameters, got {n}"
                if self._in_order else
                f"{what} must have {len(self.entries)} entries, as params have, got {n}"
            )
        return 0

    def arranged(self, arrays):
        """Return one array a parameter in this structure."""
        found = [entry.arranged(arrays) if isinstance(entry, Nest) else arrays[entry]
                 for entry in self.entries]
        if self.keys is not None:
            return dict(zip(self.keys, found, strict=True))
        return tuple(found) if self.kind is tuple else found


cdef bint same_items(dict mapping, tuple seen) noexcept:
    """Whether a dictionary holds the very keys and values seen, in their order."""
    cdef PyObject *key
    cdef PyObject *value
    cdef Py_ssize_t position = 0, k = 0, n = PyTuple_GET_SIZE(seen)
    with critical_section(mapping):
        while PyDict_Next(mapping, &position, &key, &value):
            if (
                k >= n
                or <PyObject *>PyTuple_GET_ITEM(seen, k) != key
                or <PyObject *>PyTuple_GET_ITEM(seen, k + 1) != value
            ):
                return False
            k += 2
    return k == n


cdef bint same_entries(list entries, tuple seen) noexcept:
    cdef Py_ssize_t k, n = PyTuple_GET_SIZE(seen)
    with critical_section(entries):
        if PyList_GET_SIZE(entries) != n:
            return False
        for k in range(n):
            if <PyObject *>PyList_GET_ITEM(entries, k) != <PyObject *>PyTuple_GET_ITEM(seen, k):
                return False
    return True


cdef tuple held_by(object container):
    """What a container holds: its entries, or its keys and values in turn."""
    if PyDict_CheckExact(container):
        container = container.copy()        # another thread may edit it
    if isinstance(container, Mapping):
        return tuple([part for key in container for part in (key, container[key])])
    return tuple(container)


cdef class Watch:
    """Containers of the user's, and what they held."""

    def __cinit__(self):
        self._containers, self._held = [], []

    cdef int note(self, object container) except -1:
        """Remember what a container holds now, where it can come to hold anything else."""
        if type(container) is not tuple and not isinstance(container, Iterator):
            self._containers.append(container)
            self._held.append(held_by(container))
        return 0

    cdef bint changed(self) except -1:
        """Whether any holds another object than when it was noted."""
        cdef Py_ssize_t i, k
        cdef tuple held, now
        for i in range(PyList_GET_SIZE(self._containers)):
            container = <object>PyList_GET_ITEM(self._containers, i)
            held = <tuple>PyList_GET_ITEM(self._held, i)
            if PyList_CheckExact(container):
                if not same_entries(<list>container, held):
                    return True
            elif PyDict_CheckExact(container):
                if not same_items(<dict>container, held):
                    return True
            else:
                now = held_by(container)
                if len(now) != len(held):
                    return True
                for k in range(len(now)):
                    if now[k] is not held[k]:
                        return True
        return False


cdef class Roots:
    """The containers that the user keeps arrays of one kind in."""

    def __cinit__(self, str what):
        self.given = []
        self._what = what
        self.watch = Watch()

    cdef tuple read(self, Py_ssize_t n, Watch watch):
        """The n arrays that are in the containers now, which `watch` notes."""
        cdef list into = self._taken(n, watch)
        # since a moment ago; a dict or a list of Python's was edited by another thread, then
        if watch.changed() and any([type(c) not in (dict, list) for c in watch._containers]):
            for one, other in zip(into, self._taken(n, Watch()), strict=True):
                if one is not other and is_array(one) and not in_one_place(one, other):
                    raise ValueError(
                        f"{self._what} must give the same array at each access, got a container "
                        "that makes them anew: keep a dict or a list of its arrays"
                    )
        return tuple(into)

    cdef list _taken(self, Py_ssize_t n, Watch watch):
        cdef Nest nest
        cdef list into = [None] * n
        for container, nest, first in self.given:
            if nest is None:
                into[first] = container
            elif container is None:
                nest._refuse_kind(container, self._what)
            else:
                nest.take(container, self._what, into, watch)
        return into

    cdef Roots grown(self, object container, Nest nest, Py_ssize_t first):
        """These and one more."""
        cdef Roots roots = Roots(self._what)
        roots.given = [*self.given, (container, nest, first)]
        return roots

    cdef bint changed(self) except -1:
        return self.watch.changed()
