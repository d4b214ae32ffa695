"""The kernels, for Cython code that holds raw pointers: no Python objects, no GIL.

Each function takes one step of one rule over `n` elements, in place, at the widest SIMD level
the process uses, on the calling thread. Arrays are marked IN or INOUT; they must not overlap,
must be aligned to their dtype, and nothing is checked. Formulas: optcore's README.

Compile with ``include_dirs=[optcore.get_include()]``: the struct is the header's, so that its
layout exists once and code in C that you call can share it. There is nothing to import by hand.
The table's name carries the ABI version; a module compiled for another one gets an ImportError
("does not export expected C variable optcore_abi_1") when it is imported.
"""

cdef extern from "optcore.h":
    enum:
        OPTCORE_ABI_VERSION

    # Start from optcore_defaults() and set what differs.
    ctypedef struct optcore_options:
        double lr                       # 0
        double momentum                 # 0
        double dampening                # 0; ignored by nesterov and where lr_in_velocity
        double weight_decay             # 0
        double grad_scale               # 1
        double clip_value               # infinity: none
        bint maximize                   # 0
        bint decoupled_weight_decay     # 0
        bint lr_in_velocity             # 0; 1: v = momentum * v - lr * d
        bint first_step                 # 0; 1: with dampening, v starts as d

    ctypedef struct optcore_api:
        size_t abi_version
        size_t api_size
        size_t options_size
        const char *version
        optcore_options (*defaults)() noexcept nogil
        void (*sgd_f32)(
            float *, const float *, Py_ssize_t, const optcore_options *) noexcept nogil
        void (*sgd_f64)(
            double *, const double *, Py_ssize_t, const optcore_options *) noexcept nogil
        void (*momentum_f32)(
            float *, const float *, float *, Py_ssize_t, const optcore_options *) noexcept nogil
        void (*momentum_f64)(
            double *, const double *, double *, Py_ssize_t, const optcore_options *) noexcept nogil
        void (*nesterov_f32)(
            float *, const float *, float *, Py_ssize_t, const optcore_options *) noexcept nogil
        void (*nesterov_f64)(
            double *, const double *, double *, Py_ssize_t, const optcore_options *) noexcept nogil

cdef const optcore_api *optcore_abi_1

cdef inline optcore_options optcore_defaults() noexcept nogil:
    return optcore_abi_1.defaults()

cdef inline void optcore_sgd_f32(
    float *param,                       # INOUT
    const float *grad,                  # IN
    Py_ssize_t n,
    const optcore_options *options,     # IN
) noexcept nogil:
    optcore_abi_1.sgd_f32(param, grad, n, options)

cdef inline void optcore_sgd_f64(
    double *param,                      # INOUT
    const double *grad,                 # IN
    Py_ssize_t n,
    const optcore_options *options,     # IN
) noexcept nogil:
    optcore_abi_1.sgd_f64(param, grad, n, options)

cdef inline void optcore_momentum_f32(
    float *param,                       # INOUT
    const float *grad,                  # IN
    float *velocity,                    # INOUT
    Py_ssize_t n,
    const optcore_options *options,     # IN
) noexcept nogil:
    optcore_abi_1.momentum_f32(param, grad, velocity, n, options)

cdef inline void optcore_momentum_f64(
    double *param,                      # INOUT
    const double *grad,                 # IN
    double *velocity,                   # INOUT
    Py_ssize_t n,
    const optcore_options *options,     # IN
) noexcept nogil:
    optcore_abi_1.momentum_f64(param, grad, velocity, n, options)

cdef inline void optcore_nesterov_f32(
    float *param,                       # INOUT
    const float *grad,                  # IN
    float *velocity,                    # INOUT
    Py_ssize_t n,
    const optcore_options *options,     # IN
) noexcept nogil:
    optcore_abi_1.nesterov_f32(param, grad, velocity, n, options)

cdef inline void optcore_nesterov_f64(
    double *param,                      # INOUT
    const double *grad,                 # IN
    double *velocity,                   # INOUT
    Py_ssize_t n,
    const optcore_options *options,     # IN
) noexcept nogil:
    optcore_abi_1.nesterov_f64(param, grad, velocity, n, options)
