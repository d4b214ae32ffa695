"""The machine: SIMD level in use and threads. Nothing here knows of arrays."""

cdef enum:
    N_SIMD_LEVELS = 3

cdef int simd_level() noexcept nogil
cdef int threads_for(Py_ssize_t n_elements) noexcept nogil
cdef void tell_of_missing_threads() noexcept
cdef long forks() noexcept nogil
cdef double wall_time() noexcept nogil
cdef double own_time() noexcept nogil
cdef void note_threads(double own, double total) noexcept nogil
