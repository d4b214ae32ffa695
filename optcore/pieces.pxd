"""Steps in pieces: contexts that take one step of a plan from what comes one by one."""
from optcore.memory cimport Buffer
from optcore.plan cimport Plan
from optcore.rules cimport Scalars
from optcore.storage cimport Stream
from optcore.sweep cimport Tensor
from optcore.table cimport Step

cdef enum Stage:
    MADE
    ENTERED
    LEFT
    BROKEN              # left by an exception in the middle of a step

cdef class Piece:
    cdef Plan _plan
    cdef Stage _stage
    cdef Step _step
    cdef object _grad_scale, _zero_grad
    cdef bytearray _taken       # of each parameter, whether it has had its share
    cdef Buffer _memory         # of the tensors that are swept
    cdef Buffer _numbers        # and of their scalars

    cdef int _check_entered(self, str call) except -1
    cdef int _open(self) except -1
    cdef int _close(self) except -1
    cdef Tensor *_room(self, Py_ssize_t n) except NULL
    cdef int _book(self) except -1

cdef class Stepping(Piece):
    cdef Buffer _part
    cdef int _take(self, list indices, list grads) except -1

cdef class Accumulating(Piece):
    cdef Stream _nothing
    cdef int _refuse_others(self) except -1
    cdef int _fold(self, object grads) except -1

cdef class Collecting(Piece):
    cdef double _total          # of all weights, known beforehand; 0: it is not
    cdef double _first, _sum    # the first weight that is not 0, and all of them so far
    cdef Py_ssize_t _n
    cdef object _applied
    cdef bint _weighs
    cdef list _sums             # arrays or None
    cdef double _factor_of(self, double w, bint weighs) except? -1
    cdef int _add(self, object params, object weight) except -1
    cdef int _refuse_growth(self, str what) except -1
    cdef int _check_pattern(self, list sums, str what) except -1
