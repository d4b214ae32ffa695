"""Memory: buffers that free themselves, spans, and which memory may not overlap which."""
from numpy cimport (
    PyArray_DATA,
    PyArray_DIM,
    PyArray_ITEMSIZE,
    PyArray_NDIM,
    PyArray_STRIDE,
    ndarray,
)

from optcore.arrays cimport size_of

cdef struct Span:               # the memory of one array; half-open, an empty one overlaps nothing
    const char *begin
    const char *end
    Py_ssize_t owner

cdef inline Span span_at(const void *data, Py_ssize_t n_bytes, Py_ssize_t owner) noexcept nogil:
    return Span(<const char *>data, <const char *>data + n_bytes, owner)


cdef inline Span span_of(ndarray array, Py_ssize_t owner) noexcept:
    return span_at(PyArray_DATA(array), size_of(array) * PyArray_ITEMSIZE(array), owner)


cdef inline Span span_over(ndarray array, Py_ssize_t owner) noexcept:
    """From the first byte to the last of an array with any strides."""
    cdef Span span = span_at(PyArray_DATA(array), PyArray_ITEMSIZE(array), owner)
    cdef Py_ssize_t reach
    cdef int axis
    if size_of(array) == 0:
        return span_at(PyArray_DATA(array), 0, owner)
    for axis in range(PyArray_NDIM(array)):
        reach = (PyArray_DIM(array, axis) - 1) * PyArray_STRIDE(array, axis)
        if reach > 0:
            span.end += reach
        else:
            span.begin += reach
    return span


cdef inline bint overlap(Span a, Span b) noexcept nogil:
    return a.begin < b.end and b.begin < a.end and a.begin < a.end and b.begin < b.end


cdef class Buffer:
    cdef void *at
    cdef Py_ssize_t n_bytes
    cdef int grow(self, Py_ssize_t n, size_t itemsize) except -1


cdef Buffer zeroed(Py_ssize_t n, size_t itemsize)


cdef class Spans:
    cdef Buffer _memory
    cdef Py_ssize_t n
    cdef int clear(self, Py_ssize_t most) except -1
    cdef void add(self, Span span) noexcept
    cdef bint sort(self, Py_ssize_t *first, Py_ssize_t *second) noexcept
    cdef Py_ssize_t owner_over(self, Span span) noexcept
