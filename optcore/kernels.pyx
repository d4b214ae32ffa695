"""The C-level entries: one table that hands them out, and every rule's functions by name.

C and C++ (include/optcore.h) fetch the table from the capsule ``_C_API``, Cython (kernels.pxd)
from the exported variable, Numba and others the functions one by one from `functions`. Those
are the header's own, compiled here: a rule in its list is a function without a further line.
"""
from cpython.pycapsule cimport PyCapsule_New
from libc.stdint cimport uintptr_t
from libc.string cimport memcpy

from optcore.arrays cimport UNSTORED, storage_of
from optcore.options cimport FLAG, INTEGER, combine, default_options, resolved, variant_of
from optcore.rules cimport MOST_STATES, N_RULES, RULE_ROWS, Scalars
from optcore.storage cimport (
    BFLOAT16,
    COPIED_BFLOAT16,
    COPIED_FLOAT16,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    SPLIT_BFLOAT16,
    Storage,
    Stream,
    arithmetic_of,
)
from optcore.sweep cimport STEP, Tensor, one_tensor, round_streams, sweep_in_use

import ctypes

import numpy as np

from optcore._version import __version__
from optcore.arrays import name_of_dtype
from optcore.options import KERNEL_OPTIONS

cdef extern from *:
    """
    #define OPTCORE_F32_0(rule) (void *)optcore_##rule##_f32,
    #define OPTCORE_F32_1(rule, s) OPTCORE_F32_0(rule)
    #define OPTCORE_F32_2(rule, s, t) OPTCORE_F32_0(rule)
    #define OPTCORE_F32_3(rule, s, t, u) OPTCORE_F32_0(rule)
    #define OPTCORE_F64_0(rule) (void *)optcore_##rule##_f64,
    #define OPTCORE_F64_1(rule, s) OPTCORE_F64_0(rule)
    #define OPTCORE_F64_2(rule, s, t) OPTCORE_F64_0(rule)
    #define OPTCORE_F64_3(rule, s, t, u) OPTCORE_F64_0(rule)
    static void *const optcore_functions_f32[] = {
        OPTCORE_RULES(OPTCORE_F32_0, OPTCORE_F32_1, OPTCORE_F32_2, OPTCORE_F32_3)
    };
    static void *const optcore_functions_f64[] = {
        OPTCORE_RULES(OPTCORE_F64_0, OPTCORE_F64_1, OPTCORE_F64_2, OPTCORE_F64_3)
    };
    """
    void *optcore_functions_f32[]
    void *optcore_functions_f64[]
    const optcore_api *optcore_table

cdef extern from "Python.h":
    void Py_FatalError(const char *) nogil      # prints, and needs no GIL

cdef optcore_options DEFAULTS = default_options().kernel
# Of the first optcore_options that had a size
cdef size_t LEAST_SIZE = <const char *>(&DEFAULTS.first_step + 1) - <const char *>&DEFAULTS


cdef void defaults(optcore_options *options, size_t size) noexcept nogil:
    """Fill as much of the options as the caller was compiled with."""
    cdef optcore_options o = DEFAULTS
    o.size = min(size, sizeof(o))
    memcpy(options, &o, o.size)


cdef void step(
    int rule, const optcore_array *arrays, Py_ssize_t n, const optcore_options *options
) noexcept nogil:
    cdef optcore_options o = DEFAULTS
    cdef Scalars scalars
    cdef Stream gradient
    cdef Tensor t
    cdef int k
    if rule < 0 or rule >= N_RULES:
        Py_FatalError("optcore: there is no rule of this number")
    if options.size < LEAST_SIZE or options.size > sizeof(o):
        Py_FatalError("optcore: options must be made by optcore_defaults() or make_options()")
    memcpy(&o, options, options.size)   # a caller compiled with fewer has the defaults of the rest
    rule = resolved(rule, &o)
    scalars = combine(&o)
    gradient = stream_in(&arrays[1])
    t = one_tensor(stream_in(&arrays[0]), n, &gradient, &scalars)
    for k in range(RULE_ROWS[rule].n_states):
        t.states[k] = stream_in(&arrays[2 + k])
    t.rule = rule
    t.variant = variant_of(rule, &o, o.first_step)
    t.key, t.first = o.noise_key, <Py_ssize_t>o.first_element
    round_streams(&t, o.stochastic)
    sweep_in_use()(STEP, &t, 0, n)


cdef inline Stream stream_in(const optcore_array *array) noexcept nogil:
    return Stream(array.data, array.rest, <Storage>array.storage, False)


cdef void step_pointers(
    int rule, Storage storage, void *param, const void *grad, void **states, Py_ssize_t n,
    const optcore_options *options,
) noexcept nogil:
    cdef optcore_array[2 + MOST_STATES] arrays
    cdef int k
    arrays[0] = optcore_array(param, NULL, storage)
    arrays[1] = optcore_array(<void *>grad, NULL, storage)
    for k in range(RULE_ROWS[rule].n_states if 0 <= rule < N_RULES else 0):
        arrays[2 + k] = optcore_array(states[k], NULL, storage)
    step(rule, arrays, n, options)


cdef void step_f32(
    int rule, float *param, const float *grad, float **states, Py_ssize_t n,
    const optcore_options *options,
) noexcept nogil:
    step_pointers(rule, FLOAT32, param, grad, <void **>states, n, options)


cdef void step_f64(
    int rule, double *param, const double *grad, double **states, Py_ssize_t n,
    const optcore_options *options,
) noexcept nogil:
    step_pointers(rule, FLOAT64, param, grad, <void **>states, n, options)


cdef bytes version = __version__.encode()
cdef optcore_api table
table.abi_version = OPTCORE_ABI_VERSION
table.api_size = sizeof(optcore_api)
table.options_size = sizeof(optcore_options)
table.version = version
table.n_rules = N_RULES
table.defaults = defaults
table.step_f32 = step_f32
table.step_f64 = step_f64
table.step = step

optcore_table = optcore_abi_2 = &table
_C_API = PyCapsule_New(&table, "optcore.kernels._C_API", NULL)

ABI_VERSION = OPTCORE_ABI_VERSION

# By the names of the step functions, what `optcore_step` takes for a rule.
RULES = {RULE_ROWS[rule].name.decode(): rule for rule in range(N_RULES)}

# An optcore_array.
array_dtype = np.dtype([(name, np.uintp) for name in ("data", "rest", "storage")])

# One element is an optcore_options, laid out as the C compiler did.
options_dtype = np.dtype({
    "names": ["size", *KERNEL_OPTIONS],
    "formats": [np.uintp, *[{FLAG: np.intc, INTEGER: np.uint64}.get(row.range, np.double)
                            for row in KERNEL_OPTIONS.values()]],
    "offsets": [0, *[row.offset for row in KERNEL_OPTIONS.values()]],
    "itemsize": sizeof(optcore_options),
})


def make_options(**fields):
    """Return an options struct for the C functions, as an array that owns its memory.

    Parameters
    ----------
    **fields : float or bool
        What differs from the defaults, by the names in `options_dtype`; its ``"size"`` is set
        already. As with the C struct, values are not checked.

    Returns
    -------
    numpy.ndarray of `options_dtype`, shape (1,)
        Its address is the ``const optcore_options *`` that a step function takes. Fields may be
        set between steps, from compiled code too: ``options[0]["lr"] = 0.01``.

    Raises
    ------
    TypeError
        For a name that is no option.

    Examples
    --------
    >>> from optcore.kernels import make_options
    >>> options = make_options(lr=0.1, momentum=0.9)
    >>> float(options[0]["momentum"]), float(options[0]["grad_scale"])
    (0.9, 1.0)
    """
    cdef const char *start = <const char *>&DEFAULTS
    options = np.frombuffer(start[:sizeof(DEFAULTS)], dtype=options_dtype).copy()
    for name, value in fields.items():
        if name not in KERNEL_OPTIONS:
            raise TypeError(
                f"make_options() takes the options in options_dtype "
                f"({', '.join(KERNEL_OPTIONS)}), got {name!r}"
            )
        options[name] = value
    return options


def make_arrays(param, grad, *states, rest=None):
    """Return what the generic ``optcore_step`` takes for arrays, each of its own storage.

    Parameters
    ----------
    param, grad, *states : numpy.ndarray of float32, float64, bfloat16 or float16
        float64 where `param` is, else any of the others; states in the order of ``optcore.h``. The
        result has their addresses and keeps none of them alive. But for the dtypes nothing is
        checked, as in the step itself.
    rest : numpy.ndarray, optional
        The master of a half `param`, zeros at first: of uint16 the low 16 bits (bfloat16 alone), of
        float32 the copy that is stepped.

    Returns
    -------
    numpy.ndarray of `array_dtype`, shape (2 + len(states),)

    Raises
    ------
    TypeError
        For another dtype, or float64 beside one of the others.
    """
    cdef int storage
    cdef dict masters = {(BFLOAT16, np.uint16): SPLIT_BFLOAT16,
                         (BFLOAT16, np.float32): COPIED_BFLOAT16,
                         (FLOAT16, np.float32): COPIED_FLOAT16}
    result = np.zeros(2 + len(states), array_dtype)
    for row, array in zip(result, (param, grad, *states)):
        storage = storage_of(array)
        if storage == UNSTORED:
            raise TypeError(
                "arrays must have dtype float32, float64, bfloat16 or float16, got "
                f"{array.dtype}"
            )
        if arithmetic_of(<Storage>storage) != arithmetic_of(<Storage>storage_of(param)):
            raise TypeError(
                f"arrays must all be float64 or none, got {name_of_dtype(array)} beside "
                f"{name_of_dtype(param)}"
            )
        row["data"], row["storage"] = array.ctypes.data, storage
    if rest is not None:
        kind = result[0]["storage"], rest.dtype.type
        if kind not in masters:
            raise TypeError(
                "rest must be uint16 beside bfloat16, or float32 beside a half type, got "
                f"{rest.dtype} beside {name_of_dtype(param)}"
            )
        result[0]["rest"], result[0]["storage"] = rest.ctypes.data, masters[kind]
    return result


def addresses():
    """Return the addresses of the step functions by name.

    Returns
    -------
    dict of str to int
        ``"optcore_momentum_f32"`` and so on, one for each rule and dtype, and ``"optcore_step"``.
        They stay valid, and the same, until the process ends. The signatures are those of
        ``optcore.h``.
    """
    found = {"optcore_step": <uintptr_t>table.step}
    for name, rule in RULES.items():
        found[f"optcore_{name}_f32"] = <uintptr_t>optcore_functions_f32[rule]
        found[f"optcore_{name}_f64"] = <uintptr_t>optcore_functions_f64[rule]
    return found


def functions():
    """Return the step functions by name, as ctypes functions that Numba's compiled code can call.

    Numba calls the address itself: no Python object, no GIL, nothing to release. It checks the
    arrays' dtype against the signature when it compiles.

    Returns
    -------
    dict of str to ctypes function
        ``(param, grad, *states, n, options)``: none for SGD, the velocity for the others. In
        compiled code arrays are passed as ``array.ctypes``, the options too, which are an array
        that `make_options` returned. ``"optcore_step"`` takes
        ``(RULES[name], arrays, n, options)`` with arrays that `make_arrays` returned.

    Notes
    -----
    Nothing is checked at run time: arrays must be contiguous, of `n` elements, and must not
    overlap.
    """
    arrays = {"32": ctypes.POINTER(ctypes.c_float), "64": ctypes.POINTER(ctypes.c_double)}
    found = {}
    for name, address in addresses().items():
        if name == "optcore_step":
            found[name] = ctypes.CFUNCTYPE(
                None, ctypes.c_int, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_void_p
            )(address)
            continue
        n_arrays = 2 + RULE_ROWS[<int>RULES[name[len("optcore_") : -len("_f32")]]].n_states
        signature = ctypes.CFUNCTYPE(
            None, *n_arrays * [arrays[name[-2:]]], ctypes.c_ssize_t, ctypes.c_void_p
        )
        found[name] = signature(address)
    return found
