"""The border: every array of every entry passes here, once for each call.

An array comes in twice. `as_ndarray` turns it into NumPy's, which may run code of the user's;
`check_param`, `fits` and `is_unmoved`, which cost a few loads, may not. All turn what they
refuse into an error that names the argument, what was expected and what came. dtypes, masks and
objects that are no arrays raise TypeError; layout and shape raise ValueError. Arrays of other
libraries become NumPy views of their memory, made by `view_of` alone.
"""
from cpython.buffer cimport PyObject_CheckBuffer
from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_IsValid
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from numpy cimport PyArray_Check, PyArray_CheckExact, PyArray_CHKFLAGS, import_array

from optcore.storage cimport BFLOAT16, FLOAT16

import sys

import numpy as np

import_array()

cdef extern from "numpy/ndarrayobject.h":
    const int NPY_HALF, NPY_USERDEF, NPY_USHORT
    PyObject *dtype_of "(PyObject *)PyArray_DESCR"(ndarray array) noexcept

cdef enum:
    DLPACK_CPU = 1

# NumPy has no bfloat16. This dtype declares that an array of 16-bit integers holds the bits of
# one, `array.view(optcore.bfloat16)`: NumPy hands it on from array to array, itself, not a copy.
bfloat16 = np.dtype(np.uint16, metadata={"optcore": "bfloat16"})
cdef PyObject *bfloat16_dtype = <PyObject *>bfloat16
# What NumPy calls ml_dtypes' bfloat16 once it has been seen; no other type gets that number.
cdef int number_of_ml_dtypes = UNSTORED


cdef int storage_of_others(ndarray array) noexcept:
    """`storage_of` what is neither float32 nor float64."""
    global number_of_ml_dtypes
    cdef int number = PyArray_TYPE(array)
    if number == NPY_HALF:
        return FLOAT16
    if dtype_of(array) == bfloat16_dtype:
        return BFLOAT16
    # pickles make another dtype of it
    if number == NPY_USHORT and array.dtype.metadata == bfloat16.metadata:
        return BFLOAT16
    if number >= NPY_USERDEF:
        if number != number_of_ml_dtypes and is_bfloat16_of_ml_dtypes(array.dtype):
            number_of_ml_dtypes = number
        if number == number_of_ml_dtypes:
            return BFLOAT16
    return UNSTORED


cdef str DECLARED = "{}.view(optcore.bfloat16) declares it as the bits of bfloat16"


cdef bint is_bits(object dtype):
    """Whether nobody has said what its integers mean."""
    return dtype in (np.uint16, np.int16)


cdef bint is_bfloat16_of_ml_dtypes(object dtype) noexcept:
    """Whether it is the bfloat16 of a package that cannot be where nobody has imported it."""
    return dtype.type is getattr(sys.modules.get("ml_dtypes"), "bfloat16", bfloat16)


cpdef str name_of_dtype(ndarray array):
    """Return what errors call an array's dtype."""
    return "bfloat16" if storage_of(array) == BFLOAT16 else str(array.dtype)


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
            return array_of_tensor(source.detach() if source.requires_grad else source)
        if PyObject_CheckBuffer(source):
            return np.asarray(memoryview(source))
        if source.__dlpack_device__()[0] != DLPACK_CPU:
            raise BufferError(f"it is on DLPack device {source.__dlpack_device__()}")
        view = lent_by(source)
        # A lender may copy when asked (the standard's copy=None); updates would be lost.
        copied = written and lent_by(source).ctypes.data != view.ctypes.data
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


# Of DLPack: a tensor, and the two structs that begin with, or end in, one

cdef struct DLTensor:
    void *data
    int32_t[2] device
    int32_t ndim
    uint8_t code
    uint8_t bits
    uint16_t lanes

cdef struct Versioned:
    uint32_t[2] version
    void *manager
    void (*deleter)(void *) noexcept
    uint64_t flags
    DLTensor tensor

cdef enum:
    DLPACK_UINT = 1
    DLPACK_BFLOAT = 4


cdef class Lender:
    """Another's DLPack, in which bfloat16, which NumPy refuses, is 16-bit integers."""
    cdef object source
    cdef bint was_bfloat16

    def __init__(self, source):
        self.source = source

    def __dlpack_device__(self):
        return self.source.__dlpack_device__()

    def __dlpack__(self, **how):
        cdef object capsule = self.source.__dlpack__(**how)
        cdef DLTensor *tensor
        if PyCapsule_IsValid(capsule, "dltensor_versioned"):
            tensor = &(<Versioned *>PyCapsule_GetPointer(capsule, "dltensor_versioned")).tensor
        else:
            tensor = <DLTensor *>PyCapsule_GetPointer(capsule, "dltensor")
        if tensor.code == DLPACK_BFLOAT and tensor.bits == 16:
            tensor.code = DLPACK_UINT
            self.was_bfloat16 = True
        return capsule


cdef object lent_by(object source):
    cdef Lender lender = Lender(source)
    view = np.from_dlpack(lender)
    return view.view(bfloat16) if lender.was_bfloat16 else view


cdef object array_of_tensor(object tensor):
    """NumPy's view of a tensor; of bfloat16, which NumPy lacks, by its bits."""
    torch = sys.modules["torch"]
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(bfloat16)
    return tensor.numpy()


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
    """Check a parameter: a writeable array of a dtype that is stepped, in one piece."""
    cdef ndarray a = as_ndarray(array, True, label)
    cdef str it = "a" if a is array else "np.asarray(a)"
    array = a                           # as Python sees it, for errors
    if storage_of(a) == UNSTORED:
        raise TypeError(
            f"{spell(label)} must have dtype float32, float64, bfloat16 or float16, got "
            f"{array.dtype}"
            + (f": {DECLARED.format(it)}" if is_bits(array.dtype) else "")
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


def is_bfloat16(ndarray array):
    """Return whether an array holds bfloat16, whichever dtype says so."""
    return storage_of(array) == BFLOAT16


def has_nonzero(ndarray array):
    """Return whether any element is not zero; -0.0 is."""
    return bool(np.any(array.view(np.uint16) & 0x7FFF if is_bfloat16(array) else array))


def widen(ndarray array, ndarray into):
    """Write an array's numbers into another of its shape and arithmetic type, exactly."""
    if is_bfloat16(array):
        np.left_shift(array.view(np.uint16), np.uint32(16), out=into.view(np.uint32))
    else:
        with np.errstate(invalid="ignore"):     # a signalling NaN becomes a quiet one
            np.copyto(into, array)


def same_type(ndarray one, ndarray other):
    """Return whether two arrays are stored in the same type, whatever library's dtype says so."""
    return storage_of(one) == storage_of(other)


cdef str order_of(ndarray array):
    if PyArray_CHKFLAGS(array, NPY_ARRAY_C_CONTIGUOUS):
        return "C-contiguous"
    if PyArray_CHKFLAGS(array, NPY_ARRAY_F_CONTIGUOUS):
        return "Fortran-contiguous"
    return f"strided by {(<object>array).strides}"


cdef int check_fit(ndarray a, ndarray param, str name) except -1:
    cdef tuple shape = (<object>a).shape, wanted = (<object>param).shape
    cdef str it = "v" if name.startswith("velocit") else "g" if "grad" in name else "a"
    if not may_meet(a, param) or not PyArray_ISNOTSWAPPED(a):
        cure = f"{it}.astype(p.dtype) has it"
        if PyArray_TYPE(a) == NPY_USHORT and storage_of(a) == BFLOAT16:
            cure = f"{it}.view(ml_dtypes.bfloat16).astype(p.dtype) has it"
        elif is_bits(a.dtype) and storage_of(param) != FLOAT64:
            cure = DECLARED.format(it)
        elif arithmetic_of(<Storage>storage_of(param)) != storage_of(param):
            cure = f"{it}.astype(np.float32) can be stepped with it"
        raise TypeError(
            f"{name} has dtype {name_of_dtype(a)}; its parameter has {name_of_dtype(param)}: {cure}"
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
    """Return a saved array of a parameter's shape, in any layout; None stays None.

    Its dtype may be any that can be stepped together with the parameter's.
    """
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
