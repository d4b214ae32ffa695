"""A sweep over many tensors, shared out to threads."""
from optcore.sweep cimport Sweep, Tensor

cdef enum:
    # A sweep over fewer elements than this is done before another thread could take the GIL
    # and give it back, and a waiting thread may keep it for milliseconds.
    GIL_HELD_BELOW = 8192

cdef void sweep_all(
    Sweep what, const Tensor *tensors, Py_ssize_t n, Py_ssize_t n_elements
) noexcept nogil
