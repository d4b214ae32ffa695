"""The kernels, for Cython code that holds raw pointers: no Python objects, no GIL.

Each function takes one step of one rule over `n` elements, in place, at the widest SIMD level
the process uses, on the calling thread. Arrays are marked IN or INOUT; they must not overlap,
must be aligned to their dtype, and nothing is checked. Formulas: optcore's README.

Compile with ``include_dirs=[optcore.get_include()]``: the structs are the header's, so that
their layout exists once and code in C that you call can share them. There is nothing to import
by hand. The table's name carries the ABI version; a module compiled for another one gets an
ImportError ("does not export expected C variable optcore_abi_2") when it is imported.
"""

from libc.stdint cimport uint64_t

cdef extern from "optcore.h":
    enum:
        OPTCORE_ABI_VERSION
        OPTCORE_RULE_sgd
        OPTCORE_RULE_momentum
        OPTCORE_RULE_nesterov
        OPTCORE_RULE_adagrad
        OPTCORE_RULE_rmsprop
        OPTCORE_RULE_rmsprop_momentum
        OPTCORE_RULE_rmsprop_nesterov
        OPTCORE_RULE_rmsprop_centered
        OPTCORE_RULE_rmsprop_centered_momentum
        OPTCORE_RULE_rmsprop_centered_nesterov
        OPTCORE_RULE_adam
        OPTCORE_RULE_adamw              # adam with decoupled_weight_decay
        OPTCORE_RULE_amsgrad

    # Start from optcore_defaults() and set what differs.
    ctypedef struct optcore_options:
        size_t size                     # of this struct, as the caller was compiled with it
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
        bint flush_subnormals           # 0; 1: states below the smallest normal number become 0
        uint64_t noise_key              # 0; of stochastic rounding: other for each array and step
        uint64_t first_element          # 0; where param[0] is in the whole array, for the noise
        bint stochastic                 # 0; 1: half types are rounded stochastically
        double alpha                    # 0.99; of rmsprop's averages
        double beta1                    # 0.9; of adam's average of the gradient
        double beta2                    # 0.999; of its square's
        double eps                      # 1e-8
        double beta1_power              # 0: no correction; else the product of beta1 over all steps
        double beta2_power              # 0; likewise
        bint eps_in_sqrt                # 0: sqrt(s) + eps; 1: sqrt(s + eps)

    # How an array is stored
    enum:
        OPTCORE_FLOAT32
        OPTCORE_FLOAT64
        OPTCORE_BFLOAT16
        OPTCORE_FLOAT16
        OPTCORE_SPLIT_BFLOAT16          # parameters with the rest of a float32 beside them, zero at
        OPTCORE_COPIED_BFLOAT16         # first: the low 16 bits, or a float copy, which is stepped
        OPTCORE_COPIED_FLOAT16

    ctypedef struct optcore_array:
        void *data
        void *rest
        size_t storage

    ctypedef struct optcore_api:
        size_t abi_version
        size_t api_size
        size_t options_size
        const char *version
        size_t n_rules
        void (*defaults)(optcore_options *, size_t size) noexcept nogil
        void (*step_f32)(
            int, float *, const float *, float **, Py_ssize_t, const optcore_options *
        ) noexcept nogil
        void (*step_f64)(
            int, double *, const double *, double **, Py_ssize_t, const optcore_options *
        ) noexcept nogil
        void (*step)(
            int, const optcore_array *, Py_ssize_t, const optcore_options *
        ) noexcept nogil

cdef const optcore_api *optcore_abi_2

cdef inline optcore_options optcore_defaults() noexcept nogil:
    cdef optcore_options options
    optcore_abi_2.defaults(&options, sizeof(options))
    return options

# Any rule by its number, with one pointer for each of its states in the order of optcore.h's list

cdef inline void optcore_step_f32(
    int rule,
    float *param,                       # INOUT
    const float *grad,                  # IN
    float **states,                     # INOUT
    Py_ssize_t n,
    const optcore_options *options,     # IN
) noexcept nogil:
    optcore_abi_2.step_f32(rule, param, grad, states, n, options)

cdef inline void optcore_step_f64(
    int rule,
    double *param,                      # INOUT
    const double *grad,                 # IN
    double **states,                    # INOUT
    Py_ssize_t n,
    const optcore_options *options,     # IN
) noexcept nogil:
    optcore_abi_2.step_f64(rule, param, grad, states, n, options)

# Arrays of any storage: the parameter, its gradient, and each state

cdef inline void optcore_step(
    int rule,
    const optcore_array *arrays,        # INOUT, but for the gradient: IN
    Py_ssize_t n,
    const optcore_options *options,     # IN
) noexcept nogil:
    optcore_abi_2.step(rule, arrays, n, options)

cdef inline void optcore_sgd_f32(
    float *param,                       # INOUT
    const float *grad,                  # IN
    Py_ssize_t n,
    const optcore_options *options,     # IN
) noexcept nogil:
    optcore_step_f32(OPTCORE_RULE_sgd, param, grad, NULL, n, options)

cdef inline void optcore_sgd_f64(
    double *param,                      # INOUT
    const double *grad,                 # IN
    Py_ssize_t n,
    const optcore_options *options,     # IN
) noexcept nogil:
    optcore_step_f64(OPTCORE_RULE_sgd, param, grad, NULL, n, options)

cdef inline void optcore_momentum_f32(
    float *param,                       # INOUT
    const float *grad,                  # IN
    float *velocity,                    # INOUT
    Py_ssize_t n,
    const optcore_options *options,     # IN
) noexcept nogil:
    optcore_step_f32(OPTCORE_RULE_momentum, param, grad, &velocity, n, options)

cdef inline void optcore_momentum_f64(
    double *param,                      # INOUT
    const double *grad,                 # IN
    double *velocity,                   # INOUT
    Py_ssize_t n,
    const optcore_options *options,     # IN
) noexcept nogil:
    optcore_step_f64(OPTCORE_RULE_momentum, param, grad, &velocity, n, options)

cdef inline void optcore_nesterov_f32(
    float *param,                       # INOUT
    const float *grad,                  # IN
    float *velocity,                    # INOUT
    Py_ssize_t n,
    const optcore_options *options,     # IN
) noexcept nogil:
    optcore_step_f32(OPTCORE_RULE_nesterov, param, grad, &velocity, n, options)

cdef inline void optcore_nesterov_f64(
    double *param,                      # INOUT
    const double *grad,                 # IN
    double *velocity,                   # INOUT
    Py_ssize_t n,
    const optcore_options *options,     # IN
) noexcept nogil:
    optcore_step_f64(OPTCORE_RULE_nesterov, param, grad, &velocity, n, options)
