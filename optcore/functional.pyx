"""The functional API: one step of one rule on arrays that the caller keeps."""
from libc.float cimport DBL_EPSILON
from libc.stdint cimport uint64_t
from numpy cimport import_array, ndarray

from optcore cimport rules
from optcore.arrays cimport (
    Label,
    as_ndarray,
    check_param,
    fits,
    refuse_misfit,
    size_of,
    spell,
    stream_of,
)
from optcore.groups cimport chosen_rule
from optcore.memory cimport overlap, span_of
from optcore.noise cimport key_of
from optcore.options cimport (
    STOCHASTIC,
    Options,
    check_options,
    combine,
    default_options,
    integer,
    product_of,
    take,
    variant_of,
)
from optcore.parallel cimport sweep_all
from optcore.rules cimport RULE_ROWS, Rule, Scalars
from optcore.storage cimport FLOAT32, Stream, arithmetic_of
from optcore.sweep cimport STEP, Tensor, one_tensor, round_streams

import_array()

cdef enum:
    UNSAID = -1         # of a choice that has no default here


cdef int step_arrays(Rule rule, tuple arrays, const Options *o) except -1:
    """Check everything, then step; `arrays` are the parameter, its gradient and the states."""
    cdef ndarray x, a
    cdef Scalars scalars
    cdef Stream gradient
    cdef Tensor t
    cdef Py_ssize_t i, k
    for i in range(len(arrays)):
        if type(arrays[i]) is not ndarray:
            arrays = tuple([as_ndarray(array, k != 1, label_of(rule, k))
                            for k, array in enumerate(arrays)])
            break
    x = check_param(arrays[0], label_of(rule, 0))
    for i in range(1, len(arrays)):
        a = <ndarray>arrays[i]
        if not fits(a, x, i > 1):
            refuse_misfit(a, x, i > 1, label_of(rule, i))
        for k in range(i):
            if overlap(span_of(a, i), span_of(<ndarray>arrays[k], k)):
                raise ValueError(
                    f"{spell(label_of(rule, i))} must not share memory with "
                    f"{spell(label_of(rule, k))}, got overlapping arrays"
                )
    gradient = stream_of(<ndarray>arrays[1])
    t = one_tensor(stream_of(x), size_of(x), &gradient, &scalars)
    check_options(rule, o, arithmetic_of(t.param.storage) == FLOAT32)
    scalars = combine(&o.kernel)
    t.rule = rule
    t.variant = variant_of(rule, &o.kernel, o.kernel.first_step and not o.dampen_first)
    for k in range(2, len(arrays)):
        t.states[k - 2] = stream_of(<ndarray>arrays[k])
    round_streams(&t, True)
    if t.draws and o.rounding == UNSAID:
        raise TypeError(
            "rounding must be given where a half type is written: 'nearest', which loses updates "
            "of less than half a unit in the last place, or 'stochastic' with a noise_key"
        )
    round_streams(&t, o.rounding == STOCHASTIC)
    t.key = o.kernel.noise_key
    sweep_all(STEP, &t, 1, t.size)
    return 0


cdef Label label_of(Rule rule, Py_ssize_t i) noexcept:
    """The name of an argument of arrays: the parameter, its gradient, its states."""
    if i < 2:
        return Label(b"param" if i == 0 else b"grad", -1, NULL)
    return Label(RULE_ROWS[rule].states[i - 2], -1, NULL)


cdef int take_gradient_options(
    Options *o, object lr, object weight_decay, object decoupled_weight_decay, object maximize,
    object grad_scale, object clip_value, object rounding, object noise_key,
) except -1:
    """Take the options that every rule has."""
    o[0] = default_options()
    o.rounding = UNSAID
    if rounding is not None:
        take(o, &o.rounding, rounding)
    if noise_key is not None:
        take(o, &o.kernel.noise_key, noise_key)
    elif o.rounding == STOCHASTIC:
        raise TypeError(
            "noise_key must be given with rounding='stochastic', another one for each array and "
            "step: optcore.noise_key(seed, step, index) makes one"
        )
    if noise_key is not None and o.rounding != STOCHASTIC:
        raise TypeError(
            f"noise_key must be left out without rounding='stochastic', got {noise_key!r}"
        )
    take(o, &o.kernel.lr, lr)
    take(o, &o.kernel.weight_decay, weight_decay)
    take(o, &o.kernel.decoupled_weight_decay, decoupled_weight_decay)
    take(o, &o.kernel.maximize, maximize)
    take(o, &o.kernel.grad_scale, grad_scale)
    take(o, &o.kernel.clip_value, clip_value)
    return 0


cdef int take_eps(
    Options *o, object eps, object eps_in_sqrt, object flush_subnormals
) except -1:
    """Take the options that every adaptive rule has."""
    take(o, &o.kernel.eps, eps)
    take(o, &o.kernel.eps_in_sqrt, eps_in_sqrt)
    take(o, &o.kernel.flush_subnormals, flush_subnormals)
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
    rounding=None,
    noise_key=None,
):
    """Take one step of stochastic gradient descent, in place.

    ``param = param - lr * d``, where d is the gradient after, in this order, `grad_scale`,
    `maximize`, `clip_value` and coupled `weight_decay`. Each operation is rounded to the
    arrays' dtype, of half types to float32, left to right, so the bits are those of the NumPy
    expression.

    Parameters
    ----------
    param : numpy.ndarray of float32, float64, bfloat16 or float16, any shape, contiguous
        Updated in place.
    grad : numpy.ndarray, shape and order of `param`
        Read only. float64 where `param` is, else any of the others. For a 0-d `param` a scalar of
        NumPy's, too.
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
    rounding : {"nearest", "stochastic"}, optional
        How results in float32 are rounded to the half types; must be given where one is written.
        Stochastic rounding goes up with the probability of what is cut off, so that it is right
        on average.
    noise_key : int in [0, 2**64), optional
        Chooses the noise of stochastic rounding: another for each array and step, which
        `optcore.noise_key` makes. Goes with ``rounding="stochastic"`` alone.

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
    cdef Options o
    take_gradient_options(
        &o, lr, weight_decay, decoupled_weight_decay, maximize, grad_scale, clip_value, rounding,
        noise_key,
    )
    step_arrays(rules.SGD, (param, grad), &o)


def momentum_step(
    param,
    grad,
    velocity,
    *,
    lr,
    momentum,
    dampening=0.0,
    first_step=None,
    dampen_first=False,
    lr_in_velocity=False,
    flush_subnormals=False,
    weight_decay=0.0,
    decoupled_weight_decay=False,
    maximize=False,
    grad_scale=1.0,
    clip_value=None,
    rounding=None,
    noise_key=None,
):
    """Take one step of SGD with momentum, in place.

    ``velocity = momentum * velocity + (1 - dampening) * d; param = param - lr * velocity``
    (the lecture, PyTorch, optax), or with `lr_in_velocity`
    ``velocity = momentum * velocity - lr * d; param = param + velocity`` (Keras, scikit-learn).
    The two agree in exact arithmetic while lr is constant.

    Parameters
    ----------
    param : numpy.ndarray of float32, float64, bfloat16 or float16, any shape, contiguous
        Updated in place.
    grad : numpy.ndarray, shape and order of `param`
        Read only. float64 where `param` is, else any of the others. For a 0-d `param` a scalar of
        NumPy's, too.
    velocity : numpy.ndarray, shape and order of `param`
        Updated in place; dtype as for `grad`. Zeros before the first step.
    lr : float, >= 0
        Learning rate α.
    momentum : float in [0, 1)
        ρ, the lecture's friction.
    dampening : float in [0, 1), default 0
        τ; must be 0 with `lr_in_velocity`.
    first_step : bool, optional
        Whether `velocity` has not started: with dampening it then starts as d, undampened
        (PyTorch's rule, and `optcore.SGD`'s). Must be said with `dampening`, for zeros alone do not
        tell, unless `dampen_first`.
    dampen_first : bool, default False
        Dampen the first step as any other. From zeros and with ``dampening = momentum`` the
        velocity is then the exponential moving average of d.
    lr_in_velocity : bool, default False
        Which of the two conventions.
    flush_subnormals : bool, default False
        After the step, set the velocity to 0 where it is below the smallest normal number.
    weight_decay, decoupled_weight_decay, maximize, grad_scale, clip_value, rounding, noise_key
        As in `sgd_step`.

    Raises
    ------
    TypeError, ValueError
        As `sgd_step`; TypeError also for `dampening` alone, ValueError for `dampening` with
        `lr_in_velocity`.

    Notes
    -----
    The rule is the second of CS231n (2017), lecture 7.
    """
    cdef Options o
    take_gradient_options(
        &o, lr, weight_decay, decoupled_weight_decay, maximize, grad_scale, clip_value, rounding,
        noise_key,
    )
    take(&o, &o.kernel.momentum, momentum)
    take(&o, &o.kernel.dampening, dampening)
    take(&o, &o.dampen_first, dampen_first)
    if first_step is not None:
        take(&o, &o.kernel.first_step, first_step)
    elif o.kernel.dampening != 0 and not o.dampen_first:
        raise TypeError(
            "first_step must be said with dampening: True where the velocity has not started, else "
            "False; or dampen_first=True, which dampens every step alike; got neither"
        )
    take(&o, &o.kernel.lr_in_velocity, lr_in_velocity)
    take(&o, &o.kernel.flush_subnormals, flush_subnormals)
    step_arrays(rules.MOMENTUM, (param, grad, velocity), &o)


def nesterov_step(
    param,
    grad,
    velocity,
    *,
    lr,
    momentum,
    lr_in_velocity=False,
    flush_subnormals=False,
    weight_decay=0.0,
    decoupled_weight_decay=False,
    maximize=False,
    grad_scale=1.0,
    clip_value=None,
    rounding=None,
    noise_key=None,
):
    """Take one step of SGD with Nesterov momentum, in place.

    ``velocity = momentum * velocity + d; param = param - lr * (d + momentum * velocity)``
    (PyTorch, optax), or with `lr_in_velocity`
    ``velocity = momentum * velocity - lr * d; param = param + (momentum * velocity - lr * d)``
    (the lecture rearranged, Keras, scikit-learn).

    Parameters
    ----------
    param : numpy.ndarray of float32, float64, bfloat16 or float16, any shape, contiguous
        Updated in place.
    grad : numpy.ndarray, shape and order of `param`
        Read only. float64 where `param` is, else any of the others. For a 0-d `param` a scalar of
        NumPy's, too.
    velocity : numpy.ndarray, shape and order of `param`
        Updated in place; dtype as for `grad`. Zeros before the first step.
    lr : float, >= 0
        Learning rate α.
    momentum : float in [0, 1)
        ρ, the lecture's friction.
    lr_in_velocity : bool, default False
        Which of the two conventions.
    flush_subnormals : bool, default False
        After the step, set the velocity to 0 where it is below the smallest normal number.
    weight_decay, decoupled_weight_decay, maximize, grad_scale, clip_value, rounding, noise_key
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
    cdef Options o
    take_gradient_options(
        &o, lr, weight_decay, decoupled_weight_decay, maximize, grad_scale, clip_value, rounding,
        noise_key,
    )
    take(&o, &o.kernel.momentum, momentum)
    take(&o, &o.kernel.lr_in_velocity, lr_in_velocity)
    take(&o, &o.kernel.flush_subnormals, flush_subnormals)
    step_arrays(rules.NESTEROV, (param, grad, velocity), &o)


def adagrad_step(
    param,
    grad,
    square_sum,
    *,
    lr,
    eps=1e-10,
    eps_in_sqrt=False,
    flush_subnormals=False,
    weight_decay=0.0,
    decoupled_weight_decay=False,
    maximize=False,
    grad_scale=1.0,
    clip_value=None,
    rounding=None,
    noise_key=None,
):
    """Take one step of AdaGrad, in place.

    ``square_sum = square_sum + d * d; param = param - lr * d / (sqrt(square_sum) + eps)``, d as in
    `sgd_step`.

    Parameters
    ----------
    param : numpy.ndarray of float32, float64, bfloat16 or float16, any shape, contiguous
        Updated in place.
    grad : numpy.ndarray, shape and order of `param`
        As in `sgd_step`.
    square_sum : numpy.ndarray, shape and order of `param`
        Updated in place; dtype as for `grad`. Zeros before the first step (the lecture, PyTorch),
        or 0.1 (Keras, optax).
    lr : float, >= 0
        Learning rate α.
    eps : float, >= 0, default 1e-10
        ε, as in PyTorch; the lecture and Keras have 1e-7.
    eps_in_sqrt : bool, default False
        Divide by ``sqrt(square_sum + eps)`` (Keras, optax).
    flush_subnormals : bool, default False
        After the step, set the sum to 0 where it is below the smallest normal number.
    weight_decay, decoupled_weight_decay, maximize, grad_scale, clip_value, rounding, noise_key
        As in `sgd_step`.

    Raises
    ------
    TypeError, ValueError
        As `sgd_step`.

    Notes
    -----
    The rule is the fourth of CS231n (2017), lecture 7 (Duchi, Hazan and Singer, 2011).
    """
    cdef Options o
    take_gradient_options(
        &o, lr, weight_decay, decoupled_weight_decay, maximize, grad_scale, clip_value, rounding,
        noise_key,
    )
    take_eps(&o, eps, eps_in_sqrt, flush_subnormals)
    step_arrays(rules.ADAGRAD, (param, grad, square_sum), &o)


def rmsprop_step(
    param,
    grad,
    square_avg,
    velocity=None,
    grad_avg=None,
    *,
    lr,
    alpha=0.99,
    eps=1e-8,
    momentum=0.0,
    nesterov=False,
    lr_in_velocity=False,
    eps_in_sqrt=False,
    flush_subnormals=False,
    weight_decay=0.0,
    decoupled_weight_decay=False,
    maximize=False,
    grad_scale=1.0,
    clip_value=None,
    rounding=None,
    noise_key=None,
):
    """Take one step of RMSProp, in place.

    ``square_avg = alpha * square_avg + (1 - alpha) * d * d``, then
    ``param = param - lr * d / (sqrt(square_avg) + eps)``, d as in `sgd_step`. With a velocity the
    quotient ``d / (sqrt(square_avg) + eps)`` takes the place of d in `momentum_step`, or with
    `nesterov` in `nesterov_step`. With `grad_avg` the step is centered:
    ``grad_avg = alpha * grad_avg + (1 - alpha) * d``, and the root is that of
    ``square_avg - grad_avg * grad_avg``, or of 0 where rounding makes that negative.

    Parameters
    ----------
    param : numpy.ndarray of float32, float64, bfloat16 or float16, any shape, contiguous
        Updated in place.
    grad : numpy.ndarray, shape and order of `param`
        As in `sgd_step`.
    square_avg : numpy.ndarray, shape and order of `param`
        Updated in place; dtype as for `grad`. Zeros before the first step.
    velocity : numpy.ndarray, shape and order of `param`, optional
        Updated in place; given with `momentum` > 0, and only then.
    grad_avg : numpy.ndarray, shape and order of `param`, optional
        Updated in place; given for a centered step.
    lr : float, >= 0
        Learning rate α.
    alpha : float in [0, 1), default 0.99
        Decay of both averages, the lecture's decay rate, Keras' rho.
    eps : float, >= 0, default 1e-8
        ε, as in PyTorch; the lecture and Keras have 1e-7.
    momentum : float in [0, 1), default 0
        ρ.
    nesterov : bool, default False
        Nesterov momentum; needs a velocity.
    lr_in_velocity : bool, default False
        Which of the two conventions of `momentum_step`: True in Keras and optax, False in PyTorch.
    eps_in_sqrt : bool, default False
        Divide by ``sqrt(square_avg + eps)`` (Keras, optax).
    flush_subnormals : bool, default False
        After the step, set states to 0 where they are below the smallest normal number.
    weight_decay, decoupled_weight_decay, maximize, grad_scale, clip_value, rounding, noise_key
        As in `sgd_step`.

    Raises
    ------
    TypeError, ValueError
        As `sgd_step`; ValueError also for `momentum` without a velocity, or one without it.

    Notes
    -----
    The rule is the fifth of CS231n (2017), lecture 7 (Tieleman and Hinton, 2012); centered as in
    Graves 2013.
    """
    cdef Options o
    cdef Rule rule
    take_gradient_options(
        &o, lr, weight_decay, decoupled_weight_decay, maximize, grad_scale, clip_value, rounding,
        noise_key,
    )
    take(&o, &o.kernel.alpha, alpha)
    take(&o, &o.kernel.momentum, momentum)
    take(&o, &o.nesterov, nesterov)
    take(&o, &o.kernel.lr_in_velocity, lr_in_velocity)
    take_eps(&o, eps, eps_in_sqrt, flush_subnormals)
    o.centered = grad_avg is not None
    if (velocity is None) != (o.kernel.momentum == 0):
        raise ValueError(
            f"velocity must be given with momentum > 0 and only then, got "
            f"{'none' if velocity is None else 'one'} with momentum={momentum!r}"
        )
    arrays = (param, grad, square_avg, velocity, grad_avg)
    rule = chosen_rule(rules.RMSPROP, &o)
    step_arrays(rule, tuple([array for i, array in enumerate(arrays)
                             if i < 2 or array is not None]), &o)


cdef int step_adam(tuple arrays, Options *o, object step, object beta1, object beta2) except -1:
    """Step by Adam, with a maximum by AMSGrad, which is given as the last array or None."""
    cdef uint64_t n
    take(o, &o.kernel.beta1, beta1)
    take(o, &o.kernel.beta2, beta2)
    if step is not None:
        n = integer(step, "step")
        if n == 0:
            raise ValueError("step must be at least 1, for it counts this step too, got 0")
        # 1 less anything smaller is 1
        o.kernel.beta1_power = product_of(o.kernel.beta1, n, DBL_EPSILON / 8)
        o.kernel.beta2_power = product_of(o.kernel.beta2, n, DBL_EPSILON / 8)
    o.amsgrad = arrays[4] is not None
    return step_arrays(chosen_rule(rules.ADAM, o), arrays if o.amsgrad else arrays[:4], o)


def adam_step(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    max_exp_avg_sq=None,
    *,
    lr,
    step,
    beta1=0.9,
    beta2=0.999,
    eps=1e-8,
    eps_in_sqrt=False,
    flush_subnormals=False,
    weight_decay=0.0,
    decoupled_weight_decay=False,
    maximize=False,
    grad_scale=1.0,
    clip_value=None,
    rounding=None,
    noise_key=None,
):
    """Take one step of Adam, in place; of AMSGrad, where a maximum is given.

    ``exp_avg = beta1 * exp_avg + (1 - beta1) * d``,
    ``exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * d * d`` and
    ``param = param - a * exp_avg / (sqrt(exp_avg_sq) * b + eps)`` with
    ``a = lr / (1 - beta1**step)`` and ``b = 1 / sqrt(1 - beta2**step)``, d as in `sgd_step`. a and
    b are formed in float64, the powers by multiplying step by step. For AMSGrad
    ``max_exp_avg_sq = max(max_exp_avg_sq, exp_avg_sq)`` takes the place of `exp_avg_sq` in the last
    line.

    Parameters
    ----------
    param : numpy.ndarray of float32, float64, bfloat16 or float16, any shape, contiguous
        Updated in place.
    grad : numpy.ndarray, shape and order of `param`
        As in `sgd_step`.
    exp_avg, exp_avg_sq : numpy.ndarray, shape and order of `param`
        Updated in place; dtype as for `grad`. Zeros before the first step.
    max_exp_avg_sq : numpy.ndarray, shape and order of `param`, optional
        Likewise.
    lr : float, >= 0
        Learning rate α.
    step : int >= 1, or None
        The steps of these arrays, this one among them; the products take about a nanosecond for
        each, until they are below 2**-55: tens of thousands with the default betas. None: no
        correction of the averages' bias towards zero.
    beta1, beta2 : float in [0, 1), defaults 0.9 and 0.999
        Decay of the averages.
    eps : float, >= 0, default 1e-8
        ε, as in PyTorch and Kingma and Ba's Algorithm 1; the lecture has 1e-7.
    eps_in_sqrt : bool, default False
        Divide by ``sqrt(exp_avg_sq / (1 - beta2**step) + eps)``: optax's ``eps_root``.
    flush_subnormals : bool, default False
        After the step, set states to 0 where they are below the smallest normal number.
    weight_decay, decoupled_weight_decay, maximize, grad_scale, clip_value, rounding, noise_key
        As in `sgd_step`.

    Raises
    ------
    TypeError, ValueError
        As `sgd_step`.

    Notes
    -----
    The rule is the sixth of CS231n (2017), lecture 7 (Kingma and Ba 2015; AMSGrad: Reddi, Kale and
    Kumar 2018).
    """
    cdef Options o
    take_gradient_options(
        &o, lr, weight_decay, decoupled_weight_decay, maximize, grad_scale, clip_value, rounding,
        noise_key,
    )
    take_eps(&o, eps, eps_in_sqrt, flush_subnormals)
    step_adam((param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq), &o, step, beta1, beta2)


def adamw_step(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    max_exp_avg_sq=None,
    *,
    lr,
    step,
    beta1=0.9,
    beta2=0.999,
    eps=1e-8,
    eps_in_sqrt=False,
    flush_subnormals=False,
    weight_decay=1e-2,
    maximize=False,
    grad_scale=1.0,
    clip_value=None,
    rounding=None,
    noise_key=None,
):
    """Take one step of AdamW, in place: `adam_step` with ``decoupled_weight_decay=True``.

    ``param`` is multiplied by (1 - lr * weight_decay) first, and the decay is not in the averages.

    Parameters
    ----------
    param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, lr, step, beta1, beta2, eps, eps_in_sqrt
        As in `adam_step`.
    flush_subnormals
        As in `adam_step`.
    weight_decay : float, >= 0, default 1e-2
        λ, as in PyTorch.
    maximize, grad_scale, clip_value, rounding, noise_key
        As in `adam_step`.

    Raises
    ------
    TypeError, ValueError
        As `sgd_step`.

    Notes
    -----
    Loshchilov and Hutter 2019, with the decay multiplied by lr, as PyTorch has it.
    """
    cdef Options o
    take_gradient_options(
        &o, lr, weight_decay, True, maximize, grad_scale, clip_value, rounding, noise_key
    )
    take_eps(&o, eps, eps_in_sqrt, flush_subnormals)
    step_adam((param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq), &o, step, beta1, beta2)


def noise_key(seed, step, index=0):
    """Return the key of the noise that `optcore.SGD` takes in one step for one parameter.

    Parameters
    ----------
    seed : int in [0, 2**64)
        The optimizer's `seed`.
    step : int in [0, 2**64)
        Steps that were applied before.
    index : int in [0, 2**64), default 0
        The parameter's place.

    Returns
    -------
    int in [0, 2**64)

    Raises
    ------
    TypeError, ValueError
        For what is no integer in the range.

    Notes
    -----
    The generator is SplitMix64 over the three in turn (Steele, Lea and Flood, 2014).
    """
    return key_of(integer(seed, "seed"), integer(step, "step"), integer(index, "index"))
