"""SGD, SGD with momentum and Nesterov momentum."""
from __future__ import annotations

from typing import Any

from optcore.optimizer import Optimizer, Schedule, SGDOptions


class SGD(Optimizer, SGDOptions):
    """SGD, SGD with momentum, or Nesterov momentum, over a whole model in place.

    Parameters
    ----------
    params : array, sequence, mapping or nest of arrays, or list of group dictionaries
        float32, float64, bfloat16 or float16 arrays of any shape, C- or Fortran-contiguous,
        updated in place; the half types are stepped in float32. Arrays of bfloat16 are those of
        ml_dtypes, or bits declared by ``array.view(optcore.bfloat16)``.
        Besides NumPy's: PyTorch's CPU tensors, and whatever lends its memory by DLPack or the
        buffer protocol, which is kept alive. Mappings and sequences nest to any depth; keys and
        places joined by dots are the parameters' names. Containers are looked at again at each
        step: another array in the place of a parameter is refused.
        A group dictionary holds ``"params"`` and any of the options below that bear a star,
        as PyTorch's do. Each number with a star may be a schedule instead: a callable that is
        given the count of steps taken so far. A number is Python's or NumPy's, or whatever has
        ``__float__`` and one element; what may change in its place (a 0-d array) is read anew at
        each step. Options without a star are read when they are set.
    lr : float >= 0
        Learning rate α*.
    momentum : float in [0, 1), default 0
        ρ*. 0 is plain SGD, without a velocity.
    dampening : float in [0, 1), default 0
        τ*: ``v = momentum * v + (1 - dampening) * d``, undampened on a parameter's first step, as
        PyTorch has it.
    weight_decay : float >= 0, default 0
        λ*: added to the gradient as λ·param.
    nesterov : bool, default False
        Nesterov momentum*; needs ``momentum > 0`` and no dampening.
    maximize : bool, default False
        Follow the gradient upwards*.
    decoupled_weight_decay : bool, default False
        Multiply the parameter by (1 - lr * weight_decay) instead*.
    lr_in_velocity : bool, default False
        The velocity convention*. False: ``v = ρ·v + d; x = x - α·v`` (PyTorch, optax). True:
        ``v = ρ·v - α·d; x = x + v`` (Keras, scikit-learn).
    clip_value : float >= 0, optional
        Clip every element of the scaled gradient to [-clip_value, clip_value]*.
    dampen_first : bool, default False
        Dampen a parameter's first step as any other*: with ``dampening = momentum`` the velocity
        is then the exponential moving average of the gradients, from zero.
    flush_subnormals : bool, default False
        After each step, set velocities to 0 where they are below the smallest normal number*.
        Under zero gradients they would come down to a few subnormal units and stay there, which
        some CPUs compute slowly.
    max_norm : float >= 0, optional
        Clip by the norm of all gradients together, as ``torch.nn.utils.clip_grad_norm_``.
        Excludes `clip_value`.
    skip_nonfinite : bool, default False
        Skip a step whose gradients hold a NaN or an infinity.
    track_grad_norm : bool, default False
        Measure `grad_norm` also without `max_norm`.
    ema_decay : float in [0, 1) or callable, optional
        Keep an exponential moving average of the parameters,
        ``e = ema_decay * e + (1 - ema_decay) * x`` after each step, starting from the
        parameters as they are now; see `ema`. A callable is given the count of steps so far.
    master : {"auto", "split", "float32"} or None, default "auto"
        What is kept of a half parameter's float32*, which is what is stepped. ``"split"``
        (bfloat16): its low 16 bits, the parameter being its high ones, rounded to the nearest.
        ``"float32"``: all of it. None: nothing, the parameter is all there is. ``"auto"``: split
        for bfloat16, float32 for float16. A parameter that is given another value between steps
        is stepped from that. Stays as the optimizer was built.
    rounding : {"stochastic", "nearest"}, default "stochastic"
        How half parameters without a master and bfloat16 velocities are rounded*. The nearest
        loses updates of less than half a unit in the last place.
    velocity_dtype : {"float32", "bfloat16"} or None, default None
        Dtype of the velocities*; None: that in which the parameter is stepped, float64 for
        float64 and else float32. Stays as the optimizer was built.
    lazy : {"exact", "rows"}, default "exact"
        What a step with `Rows` means for the other rows of its parameter*. ``"exact"``: what a
        gradient of zero means, momentum and decay going on; a row is brought up to date when it is
        next touched, or by `catch_up`. ``"rows"``: nothing, they stay where they are.
    seed : int in [0, 2**64), default 0
        Chooses the noise of stochastic rounding, which is a function of it, the step count, the
        parameter's place and the element's: optimizers side by side want seeds of their own.
    grads : in the structure of `params`, optional
        Gradient arrays that stay in place; `step` then needs no argument, which is the
        fastest way to step. Another array in the place of one is taken over.
    velocities : in the structure of `params`, optional
        Arrays of the caller's to keep the velocities in, with the shape and order of their
        parameters and the dtype that `velocity_dtype` says; the optimizer owns one where this has
        None. One that is zero throughout has not started: see `dampening`.

    Attributes
    ----------
    param_groups : list of dict
        One dictionary a group; options may be edited between steps and are checked when they
        change. ``"params"`` is a tuple and stays as it is: NumPy arrays, which for parameters
        of other libraries are views of their memory.
    step_count : int
        Steps applied.
    skipped : int
        Steps skipped.
    lr, momentum, … : float or callable
        Every option that bears a star: its value in all groups, and to be set in all of them.

    Raises
    ------
    TypeError, ValueError
        For arrays and hyper-parameters that are not as they must be, naming them.

    Notes
    -----
    The rules are those of CS231n (2017), lecture 7; PyTorch's documentation of
    ``torch.optim.SGD`` gives dampening, weight decay and maximize.

    With groups, gradients are given as one flat sequence over all groups in their order, or as
    one mapping where the parameters of every group are one.

    Optimizers can be pickled and deep-copied. Together with its arrays, in one pickle or one
    deepcopy, a copy steps the copied arrays; alone it has copies of its own in `param_groups`.

    Examples
    --------
    >>> import numpy as np, optcore
    >>> params = {"w": np.ones((2, 2), np.float32), "b": np.zeros(2, np.float32)}
    >>> opt = optcore.SGD(params, lr=0.5, momentum=0.9)
    >>> opt.step({"w": np.ones((2, 2), np.float32), "b": np.ones(2, np.float32)})
    True
    >>> params["b"]
    array([-0.5, -0.5], dtype=float32)
    """

    __slots__ = ()

    def __init__(
        self,
        params: Any,
        lr: float | Schedule | None = None,
        momentum: float | Schedule = 0.0,
        dampening: float | Schedule = 0.0,
        weight_decay: float | Schedule = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
        lr_in_velocity: bool = False,
        clip_value: float | Schedule | None = None,
        dampen_first: bool = False,
        flush_subnormals: bool = False,
        max_norm: float | None = None,
        skip_nonfinite: bool = False,
        track_grad_norm: bool = False,
        ema_decay: float | Schedule | None = None,
        master: str | None = "auto",
        rounding: str = "stochastic",
        velocity_dtype: Any = None,
        lazy: str = "exact",
        seed: int = 0,
        grads: Any = None,
        velocities: Any = None,
    ) -> None:
        self._construct(locals())
