"""The whole-model step, for those who take it in pieces."""
from optcore.memory cimport Buffer
from optcore.norm cimport Norm
from optcore.options cimport Options
from optcore.sweep cimport Tensor
from optcore.table cimport Step, Table

# What `_exclusively` runs
ctypedef object (*call_t)(Plan, object, object, object)

cdef class Plan(Table):
    cdef Norm _norm
    cdef Options _own           # the options that no group holds
    cdef object _ema_schedule
    cdef bint _is_built
    cdef long _in_use           # 0: by no call; else 1 + the forks there had been when it began
    cdef object _open           # the step that is under way in pieces, or None
    cdef Buffer _weights        # of replicas
    cdef object _grad_norm
    cdef list _nonfinite
    cdef Py_ssize_t _step_count
    cdef Py_ssize_t _skipped
    cdef object _param_groups
    cdef dict _indices          # of the names in _keys
    cdef tuple _indexed
    # Where others hold the rest of the gradients: takes this plan's sum of squares and the
    # indices of its parameters that are not finite, returns everyone's.
    cdef public object _join_squares

    cdef object _exclusively(self, call_t call, object a=*, object b=*, object c=*)
    cdef int _refuse_inside(self, call_t call, object a) except -1
    cdef int _seize(self) except -1

    # Options
    cdef int _adopt(self, object groups, object options) except -1
    cdef int _replace_groups(self, list groups) except -1
    cdef int _read_groups(self) except -1
    cdef double _checked_ema_decay(self, object value, str name) except -1

    # Stepping
    cdef list _given(self, object grads)
    cdef list _bound_sets(self)
    cdef Step _asked(
        self, object grad_scale, object zero_grad, object weights=*, Py_ssize_t n_sets=*,
        bint asks=*, bint outer=*,
    ) except *
    cdef int _check_some(self, const Step *step, str what) except -1
    cdef list _prepare(self, list sets, tuple names, Step *step, bint gathers=*)
    cdef const double *_weights_of(self, object weights, Py_ssize_t n) except? NULL
    cdef double _current_ema_decay(self) except -1
    cdef void _key_noise(self) noexcept
    cdef void _sweep(self, const Tensor *tensors, Py_ssize_t n, const Step *step) noexcept
    cdef Py_ssize_t _index_of(self, object key) except -1
    cdef bint _step(self, Step *step) except -1
