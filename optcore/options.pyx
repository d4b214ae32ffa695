"""Hyper-parameters: a Python object becomes a checked number, or an error that names it."""
from cpython.float cimport PyFloat_AS_DOUBLE, PyFloat_CheckExact
from libc.math cimport INFINITY, isfinite, isinf

from optcore.sweep cimport FLOAT32

from numbers import Real

import numpy as np

RANGES = {
    NONNEGATIVE: "a finite number >= 0",
    POSITIVE: "a finite number > 0",
    FRACTION: "a number in [0, 1)",
}


cdef double number(object value, str name, Range allowed) except? -1:
    """Return `value` as a float64 in the allowed range.

    Raises TypeError for anything but a real number (bool, too, is refused: a flag passed as a
    number is a mistake) and ValueError outside the range.
    """
    cdef double x
    if PyFloat_CheckExact(value):
        x = PyFloat_AS_DOUBLE(value)
    elif isinstance(value, (bool, np.bool_)) or not isinstance(value, Real):
        raise TypeError(
            f"{name} must be {RANGES[allowed]}, got {value!r} of type {type(value).__name__}"
        )
    else:
        try:
            x = float(value)
        except OverflowError:
            x = INFINITY
    if (
        isfinite(x)
        and (x > 0 or (x == 0 and allowed != POSITIVE))
        and (x < 1 or allowed != FRACTION)
    ):
        return x
    raise ValueError(f"{name} must be {RANGES[allowed]}, got {value!r}")


cdef bint flag(object value, str name) except -1:
    if value is False:
        return False
    if value is True:
        return True
    if isinstance(value, np.bool_):
        return bool(value)
    raise TypeError(f"{name} must be True or False, got {value!r} of type {type(value).__name__}")


cdef int check_rounding(str name, double x) except -1:
    """Refuse a number that float32 arithmetic would turn into another kind of number."""
    cdef float rounded = <float>x
    if isinf(rounded) or (rounded == 0 and x != 0):
        raise ValueError(
            f"{name} must keep its kind when rounded to float32, got {x!r}, which becomes "
            f"{rounded!r}"
        )
    return 0


cdef int check_options(
    Family family, const optcore_options *o, Dtype dtype, str prefix=""
) except -1:
    """Check what depends on several options, or on the arithmetic type."""
    cdef double shrink
    if o.dampening != 0 and family == FAMILY_NESTEROV:
        raise ValueError(
            f"{prefix}dampening must be 0 with nesterov, got {o.dampening!r}"
        )
    if o.dampening != 0 and o.lr_in_velocity:
        raise ValueError(
            f"{prefix}dampening must be 0 with lr_in_velocity=True, got {o.dampening!r}"
        )
    if o.decoupled_weight_decay:
        shrink = 1 - o.lr * o.weight_decay
        if not isfinite(shrink) or (dtype == FLOAT32 and isinf(<float>shrink)):
            raise ValueError(
                f"{prefix}lr * weight_decay must be finite, got {o.lr!r} * {o.weight_decay!r}"
            )
    if dtype == FLOAT32:
        check_rounding(prefix + "lr", o.lr)
        check_rounding(prefix + "momentum", o.momentum)
        check_rounding(prefix + "dampening", o.dampening)
        check_rounding(prefix + "weight_decay", o.weight_decay)
        check_rounding(prefix + "grad_scale", o.grad_scale)
        if o.clip_value != INFINITY:
            check_rounding(prefix + "clip_value", o.clip_value)
        if <float>o.momentum == 1:
            raise ValueError(
                f"{prefix}momentum must lie in [0, 1) when rounded to float32, "
                f"got {o.momentum!r}"
            )
    return 0
