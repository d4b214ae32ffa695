"""The machine: SIMD level in use and threads. Nothing here knows of arrays."""

cdef enum:
    N_SIMD_LEVELS = 3

cdef int simd_level() noexcept nogil
cdef int threads_for(Py_ssize_t n_elements) noexcept nogil
