"""The border: every array of every entry passes here, once for each call.

An array comes in twice. `as_ndarray` turns it into NumPy's, which may run code of the user's;
`check_param`, `fits` and `is_unmoved`, which cost a few loads, may not. All turn what they
refuse into an error that names the argument, what was expected and what came. dtypes, masks and
objects that are no arrays raise TypeError; layout and shape raise ValueError. Arrays of other
libraries become NumPy views of their memory, made by `view_of` alone.
"""
from cpython.buffer cimport PyObject_CheckBuffer
from numpy cimport PyArray_Check, PyArray_CheckExact, PyArray_CHKFLAGS, import_array

from optcore.storage cimport FLOAT32, FLOAT64

import sys

import numpy as np

import_array()

cdef enum:
    DLPACK_CPU = 1


cdef str spell(Label label):
    cdef str what = label.what.decode()
    if label.index < 0:
        return what
    what = f"{what}[{label.index}]"
    keys = <object>label.keys
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


cdef object view_of(object source, bint written, Label label):
    """Return a NumPy array over the very memory of `source`, which it keeps alive."""
    if not is_array(source):
        raise TypeError(
            f"{spell(label)} must be a NumPy array, got {type(source).__name__}"
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
            f"{spell(label)} must be an array in CPU memory that NumPy can view, "
            f"got {type(source).__name__}: {error}"
        ) from error
    if copied:
        raise ValueError(
            f"{spell(label)} must lend its memory, "
            f"got a copy from {type(source).__name__}.__dlpack__"
        )
    return view


cdef ndarray as_ndarray(object array, bint written, Label label):
    """Return NumPy's array of that memory: the object itself, where it is one.

    A scalar of NumPy's, which reductions return for 0-d arrays, is read but cannot be written.
    """
    if PyArray_CheckExact(array):
        return <ndarray>array
    if isinstance(array, np.generic) and not written:
        array = np.asarray(array)
        array.flags.writeable = False       # a copy: what were written to it would be lost
    elif not PyArray_Check(array):      # isinstance would believe a proxy's __class__
        array = view_of(array, written, label)
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{spell(label)} must be an array without a mask, got a masked array")
    return <ndarray>array


cdef int check_memory(ndarray a, bint written, Label label) except -1:
    """Check what the elements' memory must be in any layout."""
    if not PyArray_CHKFLAGS(a, NPY_ARRAY_ALIGNED):
        raise ValueError(
            f"{spell(label)} must be aligned to its items, "
            f"got data at address {(<object>a).ctypes.data:#x}"
        )
    if written and not PyArray_CHKFLAGS(a, NPY_ARRAY_WRITEABLE):
        raise ValueError(f"{spell(label)} must be writeable, got a read-only array")
    return 0


cdef ndarray check_param(object array, Label label):
    """Check a parameter: a writeable float32 or float64 array in one piece."""
    cdef ndarray a = as_ndarray(array, True, label)
    array = a                           # as Python sees it, for errors
    if PyArray_TYPE(a) != NPY_FLOAT and PyArray_TYPE(a) != NPY_DOUBLE:
        raise TypeError(
            f"{spell(label)} must have dtype float32 or float64, got {array.dtype}"
        )
    if not PyArray_ISNOTSWAPPED(a):
        raise TypeError(
            f"{spell(label)} must have native byte order, got {array.dtype.str!r}"
        )
    check_memory(a, True, label)
    if not PyArray_FLAGS(a) & IN_ONE_PIECE:
        raise ValueError(
            f"{spell(label)} must be contiguous, got shape {array.shape} with strides "
            f"{array.strides}: make it np.ascontiguousarray(…) and keep that in its place"
        )
    return a


def in_one_place(one, other):
    """Return whether two arrays, of any library, are views of the same memory."""
    cdef ndarray a = as_ndarray(one, False, Label(b"one", -1, NULL))
    cdef ndarray b = as_ndarray(other, False, Label(b"other", -1, NULL))
    return PyArray_DATA(a) == PyArray_DATA(b) and same_shape(a, b) and a.dtype == b.dtype


cdef str order_of(ndarray array):
    if PyArray_CHKFLAGS(array, NPY_ARRAY_C_CONTIGUOUS):
        return "C-contiguous"
    if PyArray_CHKFLAGS(array, NPY_ARRAY_F_CONTIGUOUS):
        return "Fortran-contiguous"
    return f"strided by {(<object>array).strides}"


cdef int check_fit(ndarray a, ndarray param, str name) except -1:
    cdef tuple shape = (<object>a).shape, wanted = (<object>param).shape
    cdef str it = "v" if name.startswith("velocit") else "g" if "grad" in name else "a"
    if PyArray_TYPE(a) != PyArray_TYPE(param) or not PyArray_ISNOTSWAPPED(a):
        raise TypeError(
            f"{name} has dtype {a.dtype}; its parameter has {param.dtype}: "
            f"{it}.astype(p.dtype) has it"
        )
    if not same_shape(a, param):
        cure = ""
        if len(shape) > 1 and shape == wanted[::-1]:
            cure = f": {it}.T has it"
        elif size_of(a) == size_of(param):
            cure = f": {it}.reshape(p.shape) has it"
        raise ValueError(f"{name} has shape {shape}; its parameter has {wanted}{cure}")
    return 0


def check_saved(array, ndarray param, str name):
    """Return a saved array of a parameter's dtype and shape, in any layout; None stays None."""
    if array is None:
        return None
    if not isinstance(array, np.ndarray) or isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{name} must be a NumPy array or None, got {type(array).__name__}")
    check_fit(array, param, name)
    return array


cdef int check_but_layout(ndarray a, ndarray param, bint written, Label label) except -1:
    """Check all of a gradient or a state but that it lies as its parameter does."""
    check_fit(a, param, spell(label))
    return check_memory(a, written, label)


cdef int refuse_misfit(ndarray a, ndarray param, bint written, Label label) except -1:
    """Say why a gradient or a state does not fit its parameter."""
    check_but_layout(a, param, written, label)
    cure = "np.ascontiguousarray" if (
        PyArray_CHKFLAGS(param, NPY_ARRAY_C_CONTIGUOUS)
    ) else "np.asfortranarray"
    raise ValueError(
        f"{spell(label)} is {order_of(a)}; its parameter is {order_of(param)}: "
        f"{cure}(…) lies like it"
    )


cdef Storage storage_of(ndarray array) noexcept:
    return FLOAT32 if PyArray_TYPE(array) == NPY_FLOAT else FLOAT64
