"""Every kernel, by name, on raw addresses."""
from libc.stdint cimport uintptr_t

from optcore.kernels cimport (
    optcore_defaults,
    optcore_momentum_f32,
    optcore_momentum_f64,
    optcore_nesterov_f32,
    optcore_nesterov_f64,
    optcore_options,
    optcore_sgd_f32,
    optcore_sgd_f64,
)


def step(str which, uintptr_t x, uintptr_t g, uintptr_t v, Py_ssize_t n, *fields):
    cdef optcore_options o = optcore_defaults()
    (o.lr, o.momentum, o.dampening, o.weight_decay, o.grad_scale, o.clip_value, o.maximize,
     o.decoupled_weight_decay, o.lr_in_velocity, o.first_step) = fields
    if which == "sgd_f32":
        optcore_sgd_f32(<float *>x, <const float *>g, n, &o)
    elif which == "sgd_f64":
        optcore_sgd_f64(<double *>x, <const double *>g, n, &o)
    elif which == "momentum_f32":
        optcore_momentum_f32(<float *>x, <const float *>g, <float *>v, n, &o)
    elif which == "momentum_f64":
        optcore_momentum_f64(<double *>x, <const double *>g, <double *>v, n, &o)
    elif which == "nesterov_f32":
        optcore_nesterov_f32(<float *>x, <const float *>g, <float *>v, n, &o)
    elif which == "nesterov_f64":
        optcore_nesterov_f64(<double *>x, <const double *>g, <double *>v, n, &o)
    else:
        raise KeyError(which)


def defaults():
    cdef optcore_options o = optcore_defaults()
    return (<const char *>&o)[:sizeof(o)]
