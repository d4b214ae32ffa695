"""The C-level entries: one for each rule and dtype, and one table that hands them out.

C and C++ (include/optcore.h) fetch the table from the capsule ``_C_API``, Cython (kernels.pxd)
from the exported variable, Numba and others the functions one by one from `functions`.
"""
from cpython.pycapsule cimport PyCapsule_New
from libc.stdint cimport uintptr_t

from optcore.options cimport (
    FAMILY_MOMENTUM,
    FAMILY_NESTEROV,
    FAMILY_SGD,
    Family,
    choose_rule,
    combine,
    default_options,
)
from optcore.rules cimport Rule
from optcore.sweep cimport FLOAT32, FLOAT64, STEP, Dtype, Scalars, Tensor, one_tensor, sweep_in_use

import ctypes

import numpy as np

from optcore._version import __version__


cdef void step_pointers(
    Family family,
    Dtype dtype,
    void *param,
    const void *grad,
    void *velocity,
    Py_ssize_t n,
    const optcore_options *options,
) noexcept nogil:
    cdef Scalars scalars = combine(options)
    cdef void *grads = <void *>grad
    cdef Rule rule = choose_rule(family, options, options.first_step)
    cdef Tensor t = one_tensor(param, &grads, velocity, n, dtype, rule, &scalars)
    sweep_in_use()(STEP, &t, 0, n)


cdef optcore_options defaults() noexcept nogil:
    return default_options()


cdef void sgd_f32(
    float *param, const float *grad, Py_ssize_t n, const optcore_options *options
) noexcept nogil:
    step_pointers(FAMILY_SGD, FLOAT32, param, grad, NULL, n, options)


cdef void sgd_f64(
    double *param, const double *grad, Py_ssize_t n, const optcore_options *options
) noexcept nogil:
    step_pointers(FAMILY_SGD, FLOAT64, param, grad, NULL, n, options)


cdef void momentum_f32(
    float *param,
    const float *grad,
    float *velocity,
    Py_ssize_t n,
    const optcore_options *options,
) noexcept nogil:
    step_pointers(FAMILY_MOMENTUM, FLOAT32, param, grad, velocity, n, options)


cdef void momentum_f64(
    double *param,
    const double *grad,
    double *velocity,
    Py_ssize_t n,
    const optcore_options *options,
) noexcept nogil:
    step_pointers(FAMILY_MOMENTUM, FLOAT64, param, grad, velocity, n, options)


cdef void nesterov_f32(
    float *param,
    const float *grad,
    float *velocity,
    Py_ssize_t n,
    const optcore_options *options,
) noexcept nogil:
    step_pointers(FAMILY_NESTEROV, FLOAT32, param, grad, velocity, n, options)


cdef void nesterov_f64(
    double *param,
    const double *grad,
    double *velocity,
    Py_ssize_t n,
    const optcore_options *options,
) noexcept nogil:
    step_pointers(FAMILY_NESTEROV, FLOAT64, param, grad, velocity, n, options)


cdef bytes version = __version__.encode()
cdef optcore_api table
table.abi_version = OPTCORE_ABI_VERSION
table.api_size = sizeof(optcore_api)
table.options_size = sizeof(optcore_options)
table.version = version
table.defaults = defaults
table.sgd_f32 = sgd_f32
table.sgd_f64 = sgd_f64
table.momentum_f32 = momentum_f32
table.momentum_f64 = momentum_f64
table.nesterov_f32 = nesterov_f32
table.nesterov_f64 = nesterov_f64

optcore_abi_1 = &table
_C_API = PyCapsule_New(&table, "optcore.kernels._C_API", NULL)

ABI_VERSION = OPTCORE_ABI_VERSION


cdef dict field_offsets():
    cdef optcore_options o
    cdef char *start = <char *>&o
    return {
        "lr": <char *>&o.lr - start,
        "momentum": <char *>&o.momentum - start,
        "dampening": <char *>&o.dampening - start,
        "weight_decay": <char *>&o.weight_decay - start,
        "grad_scale": <char *>&o.grad_scale - start,
        "clip_value": <char *>&o.clip_value - start,
        "maximize": <char *>&o.maximize - start,
        "decoupled_weight_decay": <char *>&o.decoupled_weight_decay - start,
        "lr_in_velocity": <char *>&o.lr_in_velocity - start,
        "first_step": <char *>&o.first_step - start,
    }


# One element is an optcore_options, laid out as the C compiler did.
options_dtype = np.dtype({
    "names": list(field_offsets()),
    "formats": 6 * [np.double] + 4 * [np.intc],
    "offsets": list(field_offsets().values()),
    "itemsize": sizeof(optcore_options),
})


def make_options(**fields):
    """Return an options struct for the C functions, as an array that owns its memory.

    Parameters
    ----------
    **fields : float or bool
        What differs from the defaults, by the names in `options_dtype`. As with the C struct,
        values are not checked.

    Returns
    -------
    numpy.ndarray of `options_dtype`, shape (1,)
        Its address is the ``const optcore_options *`` that a step function takes. Fields may be
        set between steps, from compiled code too: ``options[0]["lr"] = 0.01``.

    Raises
    ------
    TypeError
        For a name that is no field.

    Examples
    --------
    >>> from optcore.kernels import make_options
    >>> options = make_options(lr=0.1, momentum=0.9)
    >>> float(options[0]["momentum"]), float(options[0]["grad_scale"])
    (0.9, 1.0)
    """
    cdef optcore_options o = default_options()
    cdef const char *start = <const char *>&o
    options = np.frombuffer(start[:sizeof(o)], dtype=options_dtype).copy()
    for name, value in fields.items():
        if name not in options_dtype.fields:
            raise TypeError(
                f"make_options() takes the fields of options_dtype "
                f"({', '.join(options_dtype.names)}), got {name!r}"
            )
        options[name] = value
    return options


def addresses():
    """Return the addresses of the step functions by name.

    Returns
    -------
    dict of str to int
        ``"optcore_momentum_f32"`` and so on, one for each rule and dtype. They stay valid, and
        the same, until the process ends. The signatures are those of ``optcore.h``.
    """
    return {
        "optcore_sgd_f32": <uintptr_t>&sgd_f32,
        "optcore_sgd_f64": <uintptr_t>&sgd_f64,
        "optcore_momentum_f32": <uintptr_t>&momentum_f32,
        "optcore_momentum_f64": <uintptr_t>&momentum_f64,
        "optcore_nesterov_f32": <uintptr_t>&nesterov_f32,
        "optcore_nesterov_f64": <uintptr_t>&nesterov_f64,
    }


def functions():
    """Return the step functions by name, as ctypes functions that Numba's compiled code can call.

    Numba calls the address itself: no Python object, no GIL, nothing to release. It checks the
    arrays' dtype against the signature when it compiles.

    Returns
    -------
    dict of str to ctypes function
        For SGD ``(param, grad, n, options)``, for the others ``(param, grad, velocity, n,
        options)``. In compiled code arrays are passed as ``array.ctypes``, the options too,
        which are an array that `make_options` returned.

    Notes
    -----
    Nothing is checked at run time: arrays must be contiguous, of `n` elements, and must not
    overlap.
    """
    arrays = {"32": ctypes.POINTER(ctypes.c_float), "64": ctypes.POINTER(ctypes.c_double)}
    found = {}
    for name, address in addresses().items():
        n_arrays = 2 if "_sgd_" in name else 3
        signature = ctypes.CFUNCTYPE(
            None, *n_arrays * [arrays[name[-2:]]], ctypes.c_ssize_t, ctypes.c_void_p
        )
        found[name] = signature(address)
    return found
