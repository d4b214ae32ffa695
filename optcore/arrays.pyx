"""The border: every array of every entry passes here, once for each call.

`check_param` and `check_like` cost a few loads on the way through and turn what they refuse
into an error that names the argument, what was expected and what came. dtypes, masks and
objects that are no arrays raise TypeError; layout, shape and overlap raise ValueError.
Arrays of other libraries come in as NumPy views of their memory, made by `view_of` alone.
"""
from cpython.buffer cimport PyObject_CheckBuffer
from libc.stdlib cimport qsort
from numpy cimport (
    NPY_ARRAY_ALIGNED,
    NPY_ARRAY_C_CONTIGUOUS,
    NPY_ARRAY_F_CONTIGUOUS,
    NPY_ARRAY_WRITEABLE,
    NPY_DOUBLE,
    NPY_FLOAT,
    PyArray_Check,
    PyArray_CheckExact,
    PyArray_CHKFLAGS,
    PyArray_DATA,
    PyArray_DIM,
    PyArray_FLAGS,
    PyArray_ISNOTSWAPPED,
    PyArray_NBYTES,
    PyArray_NDIM,
    PyArray_TYPE,
    import_array,
    ndarray,
)

from optcore.sweep cimport FLOAT32, FLOAT64

import sys

import numpy as np

import_array()

cdef enum:
    DLPACK_CPU = 1


cdef str spell(Label label, object keys):
    cdef str what = label.what.decode()
    if label.index < 0:
        return what
    what = f"{what}[{label.index}]"
    if keys is not None and keys[label.index] is not None:
        what = f"{what} ({keys[label.index]!r})"
    return what


cdef bint is_tensor(object source):
    """Whether it is PyTorch's, which cannot be where nobody has imported PyTorch."""
    return isinstance(source, getattr(sys.modules.get("torch"), "Tensor", ()))


def is_array(source):
    """Whether the border can take it for one array: NumPy's, or a lender of its memory."""
    if isinstance(source, np.generic):      # lends a copy
        return False
    return (
        PyArray_Check(source)
        or is_tensor(source)
        or PyObject_CheckBuffer(source)
        or hasattr(type(source), "__dlpack__")
    )


cdef object view_of(object source, bint written, Label label, object keys):
    """Return a NumPy array over the very memory of `source`, which it keeps alive."""
    if not is_array(source):
        raise TypeError(
            f"{spell(label, keys)} must be a NumPy array, got {type(source).__name__}"
        )
    try:
        if is_tensor(source):
            # not by DLPack: it refuses what requires grad, and old NumPy makes it read-only
            return (source.detach() if source.requires_grad else source).numpy()
        if PyObject_CheckBuffer(source):
            return np.asarray(memoryview(source))
        if source.__dlpack_device__()[0] != DLPACK_CPU:
            raise BufferError(f"it is on DLPack device {source.__dlpack_device__()}")
        view = np.from_dlpack(source)
        # A lender may copy when asked (the standard's copy=None); updates would be lost.
        copied = written and np.from_dlpack(source).ctypes.data != view.ctypes.data
    except Exception as error:     # each library has errors of its own
        raise TypeError(
            f"{spell(label, keys)} must be an array in CPU memory that NumPy can view, "
            f"got {type(source).__name__}: {error}"
        ) from error
    if copied:
        raise ValueError(
            f"{spell(label, keys)} must lend its memory, "
            f"got a copy from {type(source).__name__}.__dlpack__"
        )
    return view


cdef ndarray check_array(object array, bint written, Label label, object keys):
    """Check all that one array can be asked alone; return it, or its NumPy view."""
    cdef ndarray a
    if not PyArray_CheckExact(array):
        if not PyArray_Check(array):        # isinstance would believe a proxy's __class__
            array = view_of(array, written, label, keys)
        if isinstance(array, np.ma.MaskedArray):
            raise TypeError(
                f"{spell(label, keys)} must be an array without a mask, got a masked array"
            )
    a = <ndarray>array
    if PyArray_TYPE(a) != NPY_FLOAT and PyArray_TYPE(a) != NPY_DOUBLE:
        raise TypeError(
            f"{spell(label, keys)} must have dtype float32 or float64, got {array.dtype}"
        )
    if not PyArray_ISNOTSWAPPED(a):
        raise TypeError(
            f"{spell(label, keys)} must have native byte order, got {array.dtype.str!r}"
        )
    if not PyArray_CHKFLAGS(a, NPY_ARRAY_ALIGNED):
        raise ValueError(
            f"{spell(label, keys)} must be aligned to its items, "
            f"got data at address {array.ctypes.data:#x}"
        )
    if written and not PyArray_CHKFLAGS(a, NPY_ARRAY_WRITEABLE):
        raise ValueError(f"{spell(label, keys)} must be writeable, got a read-only array")
    if not PyArray_FLAGS(a) & (NPY_ARRAY_C_CONTIGUOUS | NPY_ARRAY_F_CONTIGUOUS):
        raise ValueError(
            f"{spell(label, keys)} must be contiguous, "
            f"got shape {array.shape} with strides {array.strides}"
        )
    return a


cdef ndarray check_param(object array, Label label, object keys):
    """Check a parameter: a writeable float32 or float64 array in one piece."""
    return check_array(array, True, label, keys)


cdef bint same_shape(ndarray a, ndarray b) noexcept:
    cdef int axis
    if PyArray_NDIM(a) != PyArray_NDIM(b):
        return False
    for axis in range(PyArray_NDIM(a)):
        if PyArray_DIM(a, axis) != PyArray_DIM(b, axis):
            return False
    return True


cdef str order_of(ndarray array):
    return "C" if PyArray_CHKFLAGS(array, NPY_ARRAY_C_CONTIGUOUS) else "Fortran"


cdef ndarray check_like(object array, ndarray param, bint written, Label label, object keys):
    """Check a gradient or a velocity, alone and against its parameter."""
    cdef ndarray a = check_array(array, written, label, keys)
    if PyArray_TYPE(a) != PyArray_TYPE(param):
        raise TypeError(
            f"{spell(label, keys)} has dtype {a.dtype}; its parameter has {param.dtype}"
        )
    if not same_shape(a, param):
        raise ValueError(
            f"{spell(label, keys)} has shape {(<object>a).shape}; "
            f"its parameter has {(<object>param).shape}"
        )
    # One common order is enough: a row or a column is contiguous both ways.
    if not PyArray_FLAGS(a) & PyArray_FLAGS(param) & (
        NPY_ARRAY_C_CONTIGUOUS | NPY_ARRAY_F_CONTIGUOUS
    ):
        raise ValueError(
            f"{spell(label, keys)} is {order_of(a)}-contiguous; "
            f"its parameter is {order_of(param)}-contiguous"
        )
    return a


cdef Dtype dtype_of(ndarray array) noexcept:
    return FLOAT32 if PyArray_TYPE(array) == NPY_FLOAT else FLOAT64


# Overlap. Spans are half-open; an empty array overlaps nothing.

cdef Span span_of(ndarray array, Py_ssize_t owner) noexcept:
    cdef Span span
    span.begin = <const char *>PyArray_DATA(array)
    span.end = span.begin + PyArray_NBYTES(array)
    span.owner = owner
    return span


cdef bint overlap(Span a, Span b) noexcept nogil:
    return a.begin < b.end and b.begin < a.end and a.begin < a.end and b.begin < b.end


cdef int compare_spans(const void *a, const void *b) noexcept nogil:
    cdef const Span *p = <const Span *>a
    cdef const Span *q = <const Span *>b
    if p.begin != q.begin:
        return 1 if p.begin > q.begin else -1
    return (p.end > q.end) - (p.end < q.end)


cdef void sort_spans(Span *spans, Py_ssize_t n) noexcept nogil:
    qsort(spans, n, sizeof(Span), compare_spans)


cdef Py_ssize_t first_overlap(const Span *spans, Py_ssize_t n) noexcept nogil:
    """Index of a span that overlaps its predecessor among sorted non-empty ones, or -1."""
    cdef Py_ssize_t i
    for i in range(1, n):
        if spans[i].begin < spans[i - 1].end:
            return i
    return -1


cdef Py_ssize_t overlapped_by(const Span *spans, Py_ssize_t n, Span span) noexcept nogil:
    """Index of one of the sorted, disjoint, non-empty spans that `span` overlaps, or -1."""
    cdef Py_ssize_t low = 0, high = n, middle
    if span.begin == span.end:
        return -1
    while low < high:               # the first that ends after span begins
        middle = (low + high) // 2
        if spans[middle].end > span.begin:
            high = middle
        else:
            low = middle + 1
    return low if low < n and spans[low].begin < span.end else -1
