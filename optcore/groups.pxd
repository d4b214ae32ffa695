"""Parameter groups: their options at work."""
from optcore.memory cimport Buffer
from optcore.options cimport Options
from optcore.rules cimport Rule, Scalars

cdef struct Group:
    Options options
    Scalars scalars         # what a sweep is given
    Rule rule
    bint has_float32        # steps in float32: stored so, or as a half type
    bint has_float64
    bint has_bfloat16
    bint has_float16

cdef class Groups:
    cdef Buffer _memory
    cdef Group *at
    cdef Py_ssize_t n
    cdef Rule _rule         # of every group; negative: by momentum and nesterov
    cdef list _params       # of each group
    cdef list _seen         # the keys and values of each group when it was last read
    cdef list _varying      # (group, row, value) of what may be another number at each step
    cdef bint changed(self, object groups) except -1
    cdef tuple check(self, object groups, const Options *own)
    cdef void adopt(self, tuple checked) noexcept
    cdef int follow(self, Py_ssize_t step_count) except -1
    cdef void form_scalars(self, double grad_scale, double ema_decay) noexcept
    cdef str prefix(self, Py_ssize_t g)
    cdef int _read_group(self, Py_ssize_t g, dict given, Group *group, list varying) except -1
    cdef int _check_lasting(self, Py_ssize_t g, const Options *now) except -1
    cdef int _check_storage(self, str prefix, const Group *group) except -1
    cdef int _check_group(self, Py_ssize_t g, Group *group) except -1
