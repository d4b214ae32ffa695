"""The equations, and nothing else.

x is one element of a parameter, d its gradient after scale, clip and coupled
decay, v its velocity; a rule updates x and v. Every operation is rounded to
`real`, left to right as written: these lines are the specification of the
bits. To add a rule, write it here, name it in `Rule` and add its row to
`apply_rule`.
"""
from optcore.simd cimport inlined

# The arithmetic types. Storage types are the sweep's business.
ctypedef fused real:
    float
    double

cdef enum Rule:
    SGD
    MOMENTUM
    MOMENTUM_FIRST
    MOMENTUM_LR_IN_VELOCITY
    NESTEROV
    NESTEROV_LR_IN_VELOCITY


cdef inline inlined sgd(real *x, real d, real lr) noexcept nogil:
    x[0] = x[0] - lr * d


cdef inline inlined momentum(
    real *x, real d, real *v, real lr, real rho, real undamped
) noexcept nogil:
    # undamped is 1 - dampening; a factor of 1 changes no bit
    v[0] = rho * v[0] + undamped * d
    x[0] = x[0] - lr * v[0]


cdef inline inlined momentum_first(real *x, real d, real *v, real lr) noexcept nogil:
    # the first step of a dampened momentum: the velocity starts undampened
    v[0] = d
    x[0] = x[0] - lr * v[0]


cdef inline inlined momentum_lr_in_velocity(
    real *x, real d, real *v, real lr, real rho
) noexcept nogil:
    v[0] = rho * v[0] - lr * d
    x[0] = x[0] + v[0]


cdef inline inlined nesterov(real *x, real d, real *v, real lr, real rho) noexcept nogil:
    v[0] = rho * v[0] + d
    x[0] = x[0] - lr * (d + rho * v[0])


cdef inline inlined nesterov_lr_in_velocity(
    real *x, real d, real *v, real lr, real rho
) noexcept nogil:
    v[0] = rho * v[0] - lr * d
    x[0] = x[0] + (rho * v[0] - lr * d)


cdef inline inlined apply_rule(
    const Rule rule, real *x, real d, real *v, real lr, real rho, real undamped
) noexcept nogil:
    """Apply the rule a compile-time constant names; the other branches vanish."""
    if rule == SGD:
        sgd(x, d, lr)
    elif rule == MOMENTUM:
        momentum(x, d, v, lr, rho, undamped)
    elif rule == MOMENTUM_FIRST:
        momentum_first(x, d, v, lr)
    elif rule == MOMENTUM_LR_IN_VELOCITY:
        momentum_lr_in_velocity(x, d, v, lr, rho)
    elif rule == NESTEROV:
        nesterov(x, d, v, lr, rho)
    elif rule == NESTEROV_LR_IN_VELOCITY:
        nesterov_lr_in_velocity(x, d, v, lr, rho)
