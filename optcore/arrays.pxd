"""The border: a Python object becomes a checked array, or an error that names it."""
from numpy cimport (
    NPY_ARRAY_C_CONTIGUOUS,
    NPY_ARRAY_F_CONTIGUOUS,
    NPY_ARRAY_WRITEABLE,
    NPY_DOUBLE,
    NPY_FLOAT,
    PyArray_DATA,
    PyArray_DIM,
    PyArray_FLAGS,
    PyArray_ISNOTSWAPPED,
    PyArray_NDIM,
    PyArray_TYPE,
    ndarray,
)

from optcore.sweep cimport FLOAT32, Dtype

# Which argument an array is, spelled out only when an error needs it: `what` alone,
# what[index], or what[index] ('key').
cdef struct Label:
    const char *what
    Py_ssize_t index

cdef struct Span:               # the memory of one array
    const char *begin
    const char *end
    Py_ssize_t owner


# Asked of every array in every step, and so inline

cdef inline Py_ssize_t size_of(ndarray array) noexcept:
    """PyArray_SIZE without its call."""
    cdef Py_ssize_t size = 1
    cdef int axis
    for axis in range(PyArray_NDIM(array)):
        size *= PyArray_DIM(array, axis)
    return size


cdef inline bint is_dtype(ndarray array, Dtype dtype) noexcept:
    return PyArray_TYPE(array) == (NPY_FLOAT if dtype == FLOAT32 else NPY_DOUBLE)


cdef inline bint is_unmoved(
    ndarray array, const void *data, Py_ssize_t size, Dtype dtype
) noexcept:
    """Whether an array is yet what the border took: so many elements in one piece at `data`."""
    return (
        PyArray_DATA(array) == data
        and size_of(array) == size
        and is_dtype(array, dtype)
        and PyArray_ISNOTSWAPPED(array)
        and PyArray_FLAGS(array) & NPY_ARRAY_WRITEABLE != 0
        and PyArray_FLAGS(array) & (NPY_ARRAY_C_CONTIGUOUS | NPY_ARRAY_F_CONTIGUOUS) != 0
    )


cdef str spell(Label label, object keys)
cdef ndarray check_param(object array, Label label, object keys)
cdef ndarray check_like(object array, ndarray param, bint written, Label label, object keys)
cdef Dtype dtype_of(ndarray array) noexcept
cdef Span span_of(ndarray array, Py_ssize_t owner) noexcept
cdef bint overlap(Span a, Span b) noexcept nogil
cdef void sort_spans(Span *spans, Py_ssize_t n) noexcept nogil
cdef Py_ssize_t first_overlap(const Span *spans, Py_ssize_t n) noexcept nogil
cdef Py_ssize_t overlapped_by(const Span *spans, Py_ssize_t n, Span span) noexcept nogil
