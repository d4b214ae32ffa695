"""The kernels that kernels.pxd names, and every other by its number, on raw addresses."""
from libc.stdint cimport uintptr_t

from optcore.kernels cimport (
    optcore_array,
    optcore_defaults,
    optcore_momentum_f32,
    optcore_momentum_f64,
    optcore_nesterov_f32,
    optcore_nesterov_f64,
    optcore_options,
    optcore_sgd_f32,
    optcore_sgd_f64,
    optcore_step,
    optcore_step_f32,
    optcore_step_f64,
)


def step(
    str which, int rule, uintptr_t x, uintptr_t g, uintptr_t s, uintptr_t t, uintptr_t u,
    Py_ssize_t n, uintptr_t options,
):
    cdef optcore_options o = (<const optcore_options *>options)[0]
    cdef uintptr_t[3] states = [s, t, u]
    if which == "sgd_f32":
        optcore_sgd_f32(<float *>x, <const float *>g, n, &o)
    elif which == "sgd_f64":
        optcore_sgd_f64(<double *>x, <const double *>g, n, &o)
    elif which == "momentum_f32":
        optcore_momentum_f32(<float *>x, <const float *>g, <float *>s, n, &o)
    elif which == "momentum_f64":
        optcore_momentum_f64(<double *>x, <const double *>g, <double *>s, n, &o)
    elif which == "nesterov_f32":
        optcore_nesterov_f32(<float *>x, <const float *>g, <float *>s, n, &o)
    elif which == "nesterov_f64":
        optcore_nesterov_f64(<double *>x, <const double *>g, <double *>s, n, &o)
    elif which.endswith("_f32"):
        optcore_step_f32(rule, <float *>x, <const float *>g, <float **>states, n, &o)
    else:
        optcore_step_f64(rule, <double *>x, <const double *>g, <double **>states, n, &o)


def step_stored(int rule, uintptr_t arrays, Py_ssize_t n, uintptr_t options):
    optcore_step(rule, <const optcore_array *>arrays, n, <const optcore_options *>options)


def defaults():
    cdef optcore_options o = optcore_defaults()
    return (<const char *>&o)[:sizeof(o)]
