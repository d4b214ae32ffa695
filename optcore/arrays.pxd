"""The border: a Python object becomes a checked array, or an error that names it."""
from numpy cimport (
    NPY_ARRAY_ALIGNED,
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

from cpython.object cimport PyObject

from optcore.storage cimport FLOAT32, FLOAT64, Storage, Stream, arithmetic_of, plain, stream_at

# Which argument an array is, spelled out only when an error needs it: `what` alone,
# what[index], or what[index] ('key').
cdef struct Label:
    const char *what
    Py_ssize_t index
    PyObject *keys              # where there is an index: a tuple or None that the maker holds


# Asked of every array in every step, and so inline. What does not pass is told by a call.

cdef enum:
    IN_ONE_PIECE = NPY_ARRAY_C_CONTIGUOUS | NPY_ARRAY_F_CONTIGUOUS


cdef inline Py_ssize_t size_of(ndarray array) noexcept:
    """PyArray_SIZE without its call."""
    cdef Py_ssize_t size = 1
    cdef int axis
    for axis in range(PyArray_NDIM(array)):
        size *= PyArray_DIM(array, axis)
    return size


cdef enum:
    UNSTORED = -1       # no dtype of ours

cdef int storage_of_others(ndarray array) noexcept


cdef inline int storage_of(ndarray array) noexcept:
    """The Storage that an array's dtype names."""
    if PyArray_TYPE(array) == NPY_FLOAT:
        return FLOAT32
    if PyArray_TYPE(array) == NPY_DOUBLE:
        return FLOAT64
    return storage_of_others(array)


cdef inline Stream stream_of(ndarray array) noexcept:
    """An array that the border has checked."""
    return stream_at(PyArray_DATA(array), <Storage>storage_of(array))


cdef inline bint lies_at(ndarray array, const void *data, Py_ssize_t size) noexcept:
    return PyArray_DATA(array) == data and size_of(array) == size


cdef inline bint is_unmoved(
    ndarray array, const void *data, Py_ssize_t size, Storage storage
) noexcept:
    """Whether an array is yet what the border took: so many elements in one piece at `data`."""
    return (
        lies_at(array, data, size)
        and storage_of(array) == plain(storage)
        and PyArray_ISNOTSWAPPED(array)
        and PyArray_FLAGS(array) & NPY_ARRAY_WRITEABLE != 0
        and PyArray_FLAGS(array) & IN_ONE_PIECE != 0
    )


cdef inline bint same_shape(ndarray a, ndarray b) noexcept:
    cdef int axis
    if PyArray_NDIM(a) != PyArray_NDIM(b):
        return False
    for axis in range(PyArray_NDIM(a)):
        if PyArray_DIM(a, axis) != PyArray_DIM(b, axis):
            return False
    return True


cdef inline bint lies_like(ndarray a, ndarray param, bint written) noexcept:
    """Whether a sweep can go through an array as it goes through its parameter.

    One common order is enough: a row or a column is contiguous both ways.
    """
    cdef int needed = NPY_ARRAY_ALIGNED | (NPY_ARRAY_WRITEABLE if written else 0)
    return (
        PyArray_ISNOTSWAPPED(a)
        and PyArray_FLAGS(a) & needed == needed
        and PyArray_FLAGS(a) & PyArray_FLAGS(param) & IN_ONE_PIECE != 0
        and same_shape(a, param)
    )


cdef inline bint may_meet(ndarray a, ndarray param) noexcept:
    """Whether their types can be stepped together: float64 stays with float64."""
    cdef int storage = storage_of(a)
    return storage != UNSTORED and (
        arithmetic_of(<Storage>storage) == arithmetic_of(<Storage>storage_of(param))
    )


cdef inline bint fits(ndarray a, ndarray param, bint written) noexcept:
    """Whether a gradient or a state can be stepped with its parameter."""
    return may_meet(a, param) and lies_like(a, param, written)


cdef str spell(Label label)
cdef bint is_tensor(object source)
cdef ndarray as_ndarray(object array, bint written, Label label)
cdef ndarray check_param(object array, Label label)
cdef int check_but_layout(
    ndarray a, ndarray param, bint written, Label label
) except -1
cdef int refuse_misfit(ndarray a, ndarray param, bint written, Label label) except -1
