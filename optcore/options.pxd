"""Hyper-parameters: from Python objects to checked numbers, and from these to Scalars."""
from libc.math cimport INFINITY

from optcore.kernels cimport optcore_options
from optcore.rules cimport (
    MOMENTUM,
    MOMENTUM_FIRST,
    MOMENTUM_LR_IN_VELOCITY,
    NESTEROV,
    NESTEROV_LR_IN_VELOCITY,
    SGD,
    Rule,
)
from optcore.sweep cimport Dtype, Scalars

# The rules by the names users give them; velocity convention and first step pick the loop.
cdef enum Family:
    FAMILY_SGD
    FAMILY_MOMENTUM
    FAMILY_NESTEROV

cdef enum Range:
    NONNEGATIVE     # finite, >= 0
    POSITIVE        # finite, > 0
    FRACTION        # in [0, 1)


cdef inline Rule choose_rule(
    Family family, const optcore_options *o, bint first_step
) noexcept nogil:
    if family == FAMILY_SGD:
        return SGD
    if family == FAMILY_NESTEROV:
        return NESTEROV_LR_IN_VELOCITY if o.lr_in_velocity else NESTEROV
    if o.lr_in_velocity:
        return MOMENTUM_LR_IN_VELOCITY
    return MOMENTUM_FIRST if first_step and o.dampening != 0 else MOMENTUM


cdef inline optcore_options default_options() noexcept nogil:
    cdef optcore_options o
    o.lr = o.momentum = o.dampening = o.weight_decay = 0
    o.grad_scale = 1
    o.clip_value = INFINITY
    o.maximize = o.decoupled_weight_decay = o.lr_in_velocity = o.first_step = False
    return o


cdef inline Scalars combine(const optcore_options *o) noexcept nogil:
    """Combine the options in float64, once, for every kernel."""
    cdef Scalars s
    s.lr = o.lr
    s.momentum = o.momentum
    s.undamped = 1 - o.dampening
    s.weight_decay = 0 if o.decoupled_weight_decay else o.weight_decay
    s.shrink = 1 - o.lr * o.weight_decay if o.decoupled_weight_decay else 1
    s.scale = -o.grad_scale if o.maximize else o.grad_scale
    s.clip_value = o.clip_value
    s.ema_decay = 0
    s.ema_weight = 1
    return s


cdef double number(object value, str name, Range allowed) except? -1
cdef int check_rounding(str name, double x) except -1
cdef bint flag(object value, str name) except -1
cdef int check_options(
    Family family, const optcore_options *o, Dtype dtype, str prefix=*
) except -1
