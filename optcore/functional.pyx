"""The functional API: one step of one rule on arrays that the caller keeps."""
from libc.math cimport INFINITY
from numpy cimport PyArray_DATA, PyArray_SIZE, import_array, ndarray

from optcore.arrays cimport Label, check_like, check_param, dtype_of, overlap, span_of
from optcore.kernels cimport optcore_options
from optcore.options cimport (
    FAMILY_MOMENTUM,
    FAMILY_NESTEROV,
    FAMILY_SGD,
    FRACTION,
    NONNEGATIVE,
    POSITIVE,
    Family,
    check_options,
    choose_rule,
    combine,
    default_options,
    flag,
    number,
)
from optcore.parallel cimport GIL_HELD_BELOW, sweep_all
from optcore.sweep cimport STEP, Dtype, Scalars, Tensor, one_tensor

import_array()


cdef int refuse_overlap(ndarray a, str name_a, ndarray b, str name_b) except -1:
    if overlap(span_of(a, 0), span_of(b, 0)):
        raise ValueError(f"{name_b} must not share memory with {name_a}, got overlapping arrays")
    return 0


cdef int step_arrays(
    Family family, object param, object grad, object velocity, const optcore_options *o
) except -1:
    """Check everything, then step."""
    cdef ndarray x = check_param(param, Label(b"param", -1), None)
    cdef ndarray g = check_like(grad, x, False, Label(b"grad", -1), None)
    cdef ndarray v
    cdef void *grads = PyArray_DATA(g)
    cdef void *velocities = NULL
    cdef Dtype dtype = dtype_of(x)
    cdef Py_ssize_t size = PyArray_SIZE(x)
    cdef Scalars scalars
    cdef Tensor t
    refuse_overlap(x, "param", g, "grad")
    if family != FAMILY_SGD:
        v = check_like(velocity, x, True, Label(b"velocity", -1), None)
        refuse_overlap(x, "param", v, "velocity")
        refuse_overlap(g, "grad", v, "velocity")
        velocities = PyArray_DATA(v)
    check_options(family, o, dtype)
    scalars = combine(o)
    t = one_tensor(
        PyArray_DATA(x), &grads, velocities, size, dtype,
        choose_rule(family, o, o.first_step), &scalars
    )
    if size < GIL_HELD_BELOW:
        sweep_all(STEP, &t, 1, size)
    else:
        with nogil:
            sweep_all(STEP, &t, 1, size)
    return 0


cdef int read_gradient_options(
    optcore_options *o,
    object lr,
    object weight_decay,
    object decoupled_weight_decay,
    object maximize,
    object grad_scale,
    object clip_value,
) except -1:
    """Read the options that every rule has."""
    o[0] = default_options()
    o.lr = number(lr, "lr", NONNEGATIVE)
    o.weight_decay = number(weight_decay, "weight_decay", NONNEGATIVE)
    o.decoupled_weight_decay = flag(decoupled_weight_decay, "decoupled_weight_decay")
    o.maximize = flag(maximize, "maximize")
    o.grad_scale = number(grad_scale, "grad_scale", POSITIVE)
    o.clip_value = INFINITY if clip_value is None else number(clip_value, "clip_value", NONNEGATIVE)
    return 0


def sgd_step(
    param,
    grad,
    *,
    lr,
    weight_decay=0.0,
    decoupled_weight_decay=False,
    maximize=False,
    grad_scale=1.0,
    clip_value=None,
):
    """Take one step of stochastic gradient descent, in place.

    ``param = param - lr * d``, where d is the gradient after, in this order, `grad_scale`,
    `maximize`, `clip_value` and coupled `weight_decay`. Each operation is rounded to the
    arrays' dtype, left to right, so the bits are those of the NumPy expression.

    Parameters
    ----------
    param : numpy.ndarray of float32 or float64, any shape, contiguous
        Updated in place.
    grad : numpy.ndarray, dtype, shape and order of `param`
        Read only.
    lr : float, >= 0
        Learning rate α.
    weight_decay : float, >= 0, default 0
        λ; adds λ·param to the gradient.
    decoupled_weight_decay : bool, default False
        Instead multiply param by (1 - lr * weight_decay) before the rule.
    maximize : bool, default False
        Follow the gradient upwards.
    grad_scale : float, > 0, default 1
        Multiplies the gradient first.
    clip_value : float, >= 0, or None, default None
        Clip every element of the scaled gradient to [-clip_value, clip_value]; NaN stays NaN.

    Raises
    ------
    TypeError
        For what is no array of a supported dtype, has a mask or a foreign byte order, for two
        dtypes, and for a hyper-parameter that is no real number (a bool is none).
    ValueError
        For arrays that are read-only, misaligned, not contiguous, of another shape or order, or
        that overlap; for a hyper-parameter out of its range, also after rounding to float32.
        A call that raises has changed nothing.

    Notes
    -----
    The rule is the first of CS231n (2017), lecture 7.

    Examples
    --------
    >>> import numpy as np, optcore
    >>> x = np.ones(3, dtype=np.float32)
    >>> optcore.sgd_step(x, np.full(3, 2, dtype=np.float32), lr=0.25)
    >>> x
    array([0.5, 0.5, 0.5], dtype=float32)
    """
    cdef optcore_options o
    read_gradient_options(
        &o, lr, weight_decay, decoupled_weight_decay, maximize, grad_scale, clip_value
    )
    step_arrays(FAMILY_SGD, param, grad, None, &o)


def momentum_step(
    param,
    grad,
    velocity,
    *,
    lr,
    momentum,
    dampening=0.0,
    first_step=False,
    lr_in_velocity=False,
    weight_decay=0.0,
    decoupled_weight_decay=False,
    maximize=False,
    grad_scale=1.0,
    clip_value=None,
):
    """Take one step of SGD with momentum, in place.

    ``velocity = momentum * velocity + (1 - dampening) * d; param = param - lr * velocity``
    (the lecture, PyTorch, optax), or with `lr_in_velocity`
    ``velocity = momentum * velocity - lr * d; param = param + velocity`` (Keras, scikit-learn).
    The two agree in exact arithmetic while lr is constant.

    Parameters
    ----------
    param : numpy.ndarray of float32 or float64, any shape, contiguous
        Updated in place.
    grad : numpy.ndarray, dtype, shape and order of `param`
        Read only.
    velocity : numpy.ndarray, dtype, shape and order of `param`
        Updated in place. Zeros before the first step.
    lr : float, >= 0
        Learning rate α.
    momentum : float in [0, 1)
        ρ, the lecture's friction.
    dampening : float in [0, 1), default 0
        τ; must be 0 with `lr_in_velocity`.
    first_step : bool, default False
        With dampening, start the velocity as d, undampened (PyTorch's rule).
    lr_in_velocity : bool, default False
        Which of the two conventions.
    weight_decay, decoupled_weight_decay, maximize, grad_scale, clip_value
        As in `sgd_step`.

    Raises
    ------
    TypeError, ValueError
        As `sgd_step`; ValueError also for `dampening` with `lr_in_velocity`.

    Notes
    -----
    The rule is the second of CS231n (2017), lecture 7.
    """
    cdef optcore_options o
    read_gradient_options(
        &o, lr, weight_decay, decoupled_weight_decay, maximize, grad_scale, clip_value
    )
    o.momentum = number(momentum, "momentum", FRACTION)
    o.dampening = number(dampening, "dampening", FRACTION)
    o.first_step = flag(first_step, "first_step")
    o.lr_in_velocity = flag(lr_in_velocity, "lr_in_velocity")
    step_arrays(FAMILY_MOMENTUM, param, grad, velocity, &o)


def nesterov_step(
    param,
    grad,
    velocity,
    *,
    lr,
    momentum,
    lr_in_velocity=False,
    weight_decay=0.0,
    decoupled_weight_decay=False,
    maximize=False,
    grad_scale=1.0,
    clip_value=None,
):
    """Take one step of SGD with Nesterov momentum, in place.

    ``velocity = momentum * velocity + d; param = param - lr * (d + momentum * velocity)``
    (PyTorch, optax), or with `lr_in_velocity`
    ``velocity = momentum * velocity - lr * d; param = param + (momentum * velocity - lr * d)``
    (the lecture rearranged, Keras, scikit-learn).

    Parameters
    ----------
    param : numpy.ndarray of float32 or float64, any shape, contiguous
        Updated in place.
    grad : numpy.ndarray, dtype, shape and order of `param`
        Read only.
    velocity : numpy.ndarray, dtype, shape and order of `param`
        Updated in place. Zeros before the first step.
    lr : float, >= 0
        Learning rate α.
    momentum : float in [0, 1)
        ρ, the lecture's friction.
    lr_in_velocity : bool, default False
        Which of the two conventions.
    weight_decay, decoupled_weight_decay, maximize, grad_scale, clip_value
        As in `sgd_step`.

    Raises
    ------
    TypeError, ValueError
        As `sgd_step`.

    Notes
    -----
    The rule is the third of CS231n (2017), lecture 7, which writes it
    ``v = momentum * v_old - lr * d; x += -momentum * v_old + (1 + momentum) * v``.
    """
    cdef optcore_options o
    read_gradient_options(
        &o, lr, weight_decay, decoupled_weight_decay, maximize, grad_scale, clip_value
    )
    o.momentum = number(momentum, "momentum", FRACTION)
    o.lr_in_velocity = flag(lr_in_velocity, "lr_in_velocity")
    step_arrays(FAMILY_NESTEROV, param, grad, velocity, &o)
