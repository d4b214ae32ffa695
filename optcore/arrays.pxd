"""The border: a Python object becomes a checked array, or an error that names it."""
from numpy cimport PyArray_DIM, PyArray_NDIM, ndarray

from optcore.sweep cimport Dtype

# Which argument an array is, spelled out only when an error needs it: `what` alone,
# what[index], or what[index] ('key').
cdef struct Label:
    const char *what
    Py_ssize_t index

cdef struct Span:               # the memory of one array
    const char *begin
    const char *end
    Py_ssize_t owner


cdef inline Py_ssize_t size_of(ndarray array) noexcept:
    """PyArray_SIZE without its call, for what is asked of every array in every step."""
    cdef Py_ssize_t size = 1
    cdef int axis
    for axis in range(PyArray_NDIM(array)):
        size *= PyArray_DIM(array, axis)
    return size


cdef str spell(Label label, object keys)
cdef ndarray check_param(object array, Label label, object keys)
cdef ndarray check_like(object array, ndarray param, bint written, Label label, object keys)
cdef Dtype dtype_of(ndarray array) noexcept
cdef bint is_dtype(ndarray array, Dtype dtype) noexcept
cdef Span span_of(ndarray array, Py_ssize_t owner) noexcept
cdef bint overlap(Span a, Span b) noexcept nogil
cdef void sort_spans(Span *spans, Py_ssize_t n) noexcept nogil
cdef Py_ssize_t first_overlap(const Span *spans, Py_ssize_t n) noexcept nogil
cdef Py_ssize_t overlapped_by(const Span *spans, Py_ssize_t n, Span span) noexcept nogil
