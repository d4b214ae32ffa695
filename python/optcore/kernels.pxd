"""The kernels, for Cython code that holds raw pointers: no Python objects, no GIL.

Each function takes one step of one rule over `n` elements, in place, at the widest SIMD level
the process uses, on the calling thread. Arrays are marked IN or INOUT; they must not overlap,
must be aligned to their dtype, and nothing is checked. Formulas: optcore's README.
"""

# Start from optcore_defaults() and set what differs: fields may be added.
cdef struct optcore_options:
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

cdef optcore_options optcore_defaults() noexcept nogil

cdef void optcore_sgd_f32(
    float *param,                       # INOUT
    const float *grad,                  # IN
    Py_ssize_t n,
    const optcore_options *options,     # IN
) noexcept nogil

cdef void optcore_sgd_f64(
    double *param,                      # INOUT
    const double *grad,                 # IN
    Py_ssize_t n,
    const optcore_options *options,     # IN
) noexcept nogil

cdef void optcore_momentum_f32(
    float *param,                       # INOUT
    const float *grad,                  # IN
    float *velocity,                    # INOUT
    Py_ssize_t n,
    const optcore_options *options,     # IN
) noexcept nogil

cdef void optcore_momentum_f64(
    double *param,                      # INOUT
    const double *grad,                 # IN
    double *velocity,                   # INOUT
    Py_ssize_t n,
    const optcore_options *options,     # IN
) noexcept nogil

cdef void optcore_nesterov_f32(
    float *param,                       # INOUT
    const float *grad,                  # IN
    float *velocity,                    # INOUT
    Py_ssize_t n,
    const optcore_options *options,     # IN
) noexcept nogil

cdef void optcore_nesterov_f64(
    double *param,                      # INOUT
    const double *grad,                 # IN
    double *velocity,                   # INOUT
    Py_ssize_t n,
    const optcore_options *options,     # IN
) noexcept nogil
