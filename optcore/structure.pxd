"""The user's containers: how arrays nest in them, and what they held when last read."""

cdef bint same_items(dict mapping, tuple seen) noexcept


cdef class Nest:
    cdef readonly object kind       # dict, list or tuple: what `arranged` makes
    cdef readonly tuple keys        # of a mapping; None for a sequence
    cdef readonly tuple entries     # of each key or place: an index, or a Nest
    cdef bint _in_order             # entries are 0, 1, 2, … and nothing else
    cdef int take(self, object given, str what, list into, Watch watch) except -1
    cdef tuple listed(self, object given, str what, Py_ssize_t n)
    cdef int _refuse_kind(self, object given, str what) except -1
    cdef int _check_length(self, Py_ssize_t n, str what) except -1


cdef class Watch:
    cdef list _containers
    cdef list _held                 # of each: its entries, or its keys and values in turn
    cdef int note(self, object container) except -1
    cdef bint changed(self) except -1


cdef class Roots:
    cdef list given                 # (container, its nest or None for one array, first index)
    cdef str _what
    cdef Watch watch                # over what they held when that was last taken over
    cdef Roots grown(self, object container, Nest nest, Py_ssize_t first)
    cdef tuple read(self, Py_ssize_t n, Watch watch)
    cdef list _taken(self, Py_ssize_t n, Watch watch)
    cdef bint changed(self) except -1
