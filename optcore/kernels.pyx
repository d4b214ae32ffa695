"""The C-level entries: one for each rule and dtype. See kernels.pxd."""
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
from optcore.sweep cimport FLOAT32, FLOAT64, STEP, Dtype, Scalars, Tensor, one_tensor, sweep


cdef optcore_options optcore_defaults() noexcept nogil:
    return default_options()


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
    sweep(STEP, &t, 0, n)


cdef void optcore_sgd_f32(
    float *param, const float *grad, Py_ssize_t n, const optcore_options *options
) noexcept nogil:
    step_pointers(FAMILY_SGD, FLOAT32, param, grad, NULL, n, options)


cdef void optcore_sgd_f64(
    double *param, const double *grad, Py_ssize_t n, const optcore_options *options
) noexcept nogil:
    step_pointers(FAMILY_SGD, FLOAT64, param, grad, NULL, n, options)


cdef void optcore_momentum_f32(
    float *param,
    const float *grad,
    float *velocity,
    Py_ssize_t n,
    const optcore_options *options,
) noexcept nogil:
    step_pointers(FAMILY_MOMENTUM, FLOAT32, param, grad, velocity, n, options)


cdef void optcore_momentum_f64(
    double *param,
    const double *grad,
    double *velocity,
    Py_ssize_t n,
    const optcore_options *options,
) noexcept nogil:
    step_pointers(FAMILY_MOMENTUM, FLOAT64, param, grad, velocity, n, options)


cdef void optcore_nesterov_f32(
    float *param,
    const float *grad,
    float *velocity,
    Py_ssize_t n,
    const optcore_options *options,
) noexcept nogil:
    step_pointers(FAMILY_NESTEROV, FLOAT32, param, grad, velocity, n, options)


cdef void optcore_nesterov_f64(
    double *param,
    const double *grad,
    double *velocity,
    Py_ssize_t n,
    const optcore_options *options,
) noexcept nogil:
    step_pointers(FAMILY_NESTEROV, FLOAT64, param, grad, velocity, n, options)
