"""A sweep over many tensors, shared out to threads."""
from optcore.sweep cimport Sweep, Tensor

cdef void sweep_all(
    Sweep what, const Tensor *tensors, Py_ssize_t n, Py_ssize_t n_elements, Py_ssize_t work=*
) noexcept
