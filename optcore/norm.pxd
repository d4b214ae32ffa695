"""The norm of all gradients together, and which of them are not finite."""
from libc.math cimport INFINITY

from optcore.memory cimport Buffer
from optcore.options cimport Options
from optcore.sweep cimport Tensor


cdef inline bint measures(const Options *o) noexcept:
    """Whether a step sweeps over the gradients first."""
    return o.max_norm < INFINITY or o.track_grad_norm or o.skip_nonfinite


cdef class Norm:
    cdef Buffer _partials
    cdef list nonfinite         # indices of the parameters whose gradients are not

    cdef inline bint is_prepared(self) noexcept:
        return self._partials is not None

    cdef int prepare(self, Tensor *tensors, Py_ssize_t n) except -1
    cdef double measure(
        self, Tensor *tensors, Py_ssize_t n, Py_ssize_t n_elements, object join
    ) except? -1
    cdef double _sum(
        self, Tensor *tensors, Py_ssize_t n, Py_ssize_t n_elements, double unit, object join
    ) except? -1
