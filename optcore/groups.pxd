"""Parameter groups: their options at work."""
from optcore.memory cimport Buffer
from optcore.options cimport Options
from optcore.rules cimport Rule, Scalars

# What a rule's step depends on of a parameter's steps, this one among them
cdef struct Count:
    double step
    double beta1_power, beta2_power     # products of what beta1 and beta2 were

cdef struct Group:
    Options options
    Scalars scalars         # what a sweep is given
    Rule rule
    bint has_float32        # steps in float32: stored so, or as a half type
    bint has_float64
    bint has_bfloat16
    bint has_float16

cdef Rule chosen_rule(Rule family, const Options *o) noexcept

cdef class Groups:
    cdef Buffer _memory
    cdef Group *at
    cdef Py_ssize_t n
    cdef Rule _rule         # of every group; negative: the one of the family that options choose
    cdef Rule _family
    cdef dict _options      # that its groups have, with their defaults
    cdef double _grad_scale, _ema_decay     # of the step under way
    cdef list _params       # of each group
    cdef list _seen         # the keys and values of each group when it was last read
    cdef list _varying      # (group, row, value) of what may be another number at each step
    cdef bint changed(self, object groups) except -1
    cdef tuple check(self, object groups, const Options *own)
    cdef void adopt(self, tuple checked) noexcept
    cdef bint follow(self, Py_ssize_t step_count) except -1
    cdef void form_scalars(self, double grad_scale, double ema_decay) noexcept
    cdef void scalars_at(self, Py_ssize_t g, const Count *count, Scalars *scalars) noexcept
    cdef str prefix(self, Py_ssize_t g)
    cdef int _read_group(self, Py_ssize_t g, dict given, Group *group, list varying) except -1
    cdef int _check_lasting(self, Py_ssize_t g, const Options *now) except -1
    cdef int _check_storage(self, str prefix, const Group *group) except -1
    cdef int _check_group(self, Py_ssize_t g, Group *group) except -1
