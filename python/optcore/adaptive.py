"""AdaGrad, RMSProp, Adam and AdamW, whose steps are divided by what gradients were."""
from __future__ import annotations

from typing import Any, ClassVar

from optcore.optimizer import AdaptiveOptions, GroupOption, Optimizer, Schedule

COMMON = """    eps_in_sqrt : bool, default False
        Add ε under the root*, to the square that is corrected; False: to the root (PyTorch).
    maximize, decoupled_weight_decay, clip_value, flush_subnormals
        As in `optcore.SGD`, each with a star.
    max_norm, skip_nonfinite, track_grad_norm, ema_decay
        As in `optcore.SGD`.
    master, rounding
        As in `optcore.SGD`, each with a star.
    state_dtype : {"float32", "bfloat16"} or None, default None
        Dtype of the states*; None: that in which the parameter is stepped. Rounded as `rounding`
        says. Stays as the optimizer was built.
    lazy : {"exact", "rows"}, default "exact"
        "rows": what a step with `Rows` leaves out stays where it is*. What a gradient of zero makes
        of other rows cannot be made up for later here, and "exact" refuses Rows.
    seed, grads
        As in `optcore.SGD`.

    Raises
    ------
    TypeError, ValueError
        As `optcore.SGD`. All its methods and attributes are here too, each option that bears a star
        among them; what needs momentum alone, as `accumulating`, refuses."""


def documented(kind: Any) -> Any:
    """Put into a class's text what all here have."""
    if kind.__doc__:        # there is none under python -OO
        kind.__doc__ = kind.__doc__.replace("    {common}", COMMON)
    return kind


class AdaGradOptions(AdaptiveOptions):
    """Those of `optcore.AdaGrad`."""

    __slots__ = ()

    lr_decay = GroupOption()
    initial_accumulator_value = GroupOption()


@documented
class AdaGrad(Optimizer, AdaGradOptions):
    """AdaGrad over a whole model in place.

    ``s = s + d·d; x = x - α·d / (√s + ε)``, s being the state ``"square_sum"``.

    Parameters
    ----------
    params : array, sequence, mapping or nest of arrays, or list of group dictionaries
        As for `optcore.SGD`; options with a star may differ from group to group.
    lr : float >= 0 or schedule, default 1e-2
        Learning rate α*.
    lr_decay : float >= 0 or schedule, default 0
        Its decay*: a parameter's t-th step is taken with ``lr / (1 + (t - 1) * lr_decay)``.
    weight_decay : float >= 0 or schedule, default 0
        λ*: added to the gradient as λ·param.
    initial_accumulator_value : float >= 0, default 0
        What s begins with*: 0 in the lecture and PyTorch, 0.1 in Keras and optax. Stays as the
        optimizer was built.
    eps : float >= 0 or schedule, default 1e-10
        ε*: PyTorch's; 1e-7 in the lecture, Keras and optax.
    {common}

    Notes
    -----
    Duchi, Hazan and Singer 2011; CS231n (2017), lecture 7. Options and their defaults are those of
    ``torch.optim.Adagrad``. Keras and optax have ``eps=1e-7, eps_in_sqrt=True,
    initial_accumulator_value=0.1``.

    Examples
    --------
    >>> import numpy as np, optcore
    >>> x = np.zeros(2, np.float32)
    >>> opt = optcore.AdaGrad(x, lr=0.5)
    >>> opt.step(np.array([1e-3, 1e3], np.float32))
    True
    >>> x
    array([-0.49999994, -0.5       ], dtype=float32)
    """

    __slots__ = ()

    _family = "adagrad"

    def __init__(
        self,
        params: Any,
        lr: float | Schedule = 1e-2,
        lr_decay: float | Schedule = 0.0,
        weight_decay: float | Schedule = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float | Schedule = 1e-10,
        *,
        eps_in_sqrt: bool = False,
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
        clip_value: float | Schedule | None = None,
        flush_subnormals: bool = False,
        max_norm: float | None = None,
        skip_nonfinite: bool = False,
        track_grad_norm: bool = False,
        ema_decay: float | Schedule | None = None,
        master: str | None = "auto",
        rounding: str = "stochastic",
        state_dtype: Any = None,
        lazy: str = "exact",
        seed: int = 0,
        grads: Any = None,
    ) -> None:
        self._construct(locals())


class RMSPropOptions(AdaptiveOptions):
    """Those of `optcore.RMSProp`."""

    __slots__ = ()

    alpha = GroupOption()
    momentum = GroupOption()
    centered = GroupOption()
    nesterov = GroupOption()
    lr_in_velocity = GroupOption()


@documented
class RMSProp(Optimizer, RMSPropOptions):
    """RMSProp over a whole model in place: plain, centered, with momentum or Nesterov momentum.

    ``s = α·s + (1 - α)·d·d; x = x - lr·d / (√s + ε)``, s being the state ``"square_avg"``. With
    momentum ``d / (√s + ε)`` takes the gradient's place in the rules of `optcore.SGD`.

    Parameters
    ----------
    params : array, sequence, mapping or nest of arrays, or list of group dictionaries
        As for `optcore.SGD`; options with a star may differ from group to group.
    lr : float >= 0 or schedule, default 1e-2
        Learning rate*.
    alpha : float in [0, 1) or schedule, default 0.99
        Decay of the averages*.
    eps : float >= 0 or schedule, default 1e-8
        ε*.
    weight_decay : float >= 0 or schedule, default 0
        λ*: added to the gradient as λ·param.
    momentum : float in [0, 1) or schedule, default 0
        ρ*.
    centered : bool, default False
        Divide by the root of the gradients' variance*: ``√(s - m·m)``, m being the average of the
        gradients, ``"grad_avg"``; what rounding makes negative counts as 0.
    nesterov : bool, default False
        Nesterov momentum*; needs ``momentum > 0``.
    lr_in_velocity : bool, default False
        The velocity's convention*, as in `optcore.SGD`. Stays as the optimizer was built.
    {common}

    Notes
    -----
    Tieleman and Hinton 2012; Graves 2013 (centered). Options and their defaults are those of
    ``torch.optim.RMSprop``. CS231n (2017), lecture 7, has ``eps=1e-7``; Keras
    ``alpha=0.9, eps=1e-7, eps_in_sqrt=True, lr_in_velocity=True``, optax the same with
    ``eps=1e-8``.

    Examples
    --------
    >>> import numpy as np, optcore
    >>> x = np.zeros(2, np.float32)
    >>> opt = optcore.RMSProp(x, lr=0.5, alpha=0.75)
    >>> opt.step(np.array([1e-3, 1e3], np.float32))
    True
    >>> x
    array([-0.99998, -1.     ], dtype=float32)
    """

    __slots__ = ()

    _family = "rmsprop"

    def __init__(
        self,
        params: Any,
        lr: float | Schedule = 1e-2,
        alpha: float | Schedule = 0.99,
        eps: float | Schedule = 1e-8,
        weight_decay: float | Schedule = 0.0,
        momentum: float | Schedule = 0.0,
        centered: bool = False,
        *,
        nesterov: bool = False,
        lr_in_velocity: bool = False,
        eps_in_sqrt: bool = False,
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
        clip_value: float | Schedule | None = None,
        flush_subnormals: bool = False,
        max_norm: float | None = None,
        skip_nonfinite: bool = False,
        track_grad_norm: bool = False,
        ema_decay: float | Schedule | None = None,
        master: str | None = "auto",
        rounding: str = "stochastic",
        state_dtype: Any = None,
        lazy: str = "exact",
        seed: int = 0,
        grads: Any = None,
    ) -> None:
        self._construct(locals())


class AdamOptions(AdaptiveOptions):
    """Those of `optcore.Adam` and `optcore.AdamW`."""

    __slots__ = ()

    beta1 = GroupOption()
    beta2 = GroupOption()
    amsgrad = GroupOption()


@documented
class Adam(Optimizer, AdamOptions):
    """Adam over a whole model in place, or AMSGrad.

    ``m = β₁·m + (1 - β₁)·d; v = β₂·v + (1 - β₂)·d·d; x = x - α·m̂ / (√v̂ + ε)`` with
    ``m̂ = m / (1 - β₁ᵗ)`` and ``v̂ = v / (1 - β₂ᵗ)``, m and v being the states ``"exp_avg"`` and
    ``"exp_avg_sq"``. t counts the steps of each parameter for itself, and the powers are products
    over them in float64, of what β₁ and β₂ were.

    Parameters
    ----------
    params : array, sequence, mapping or nest of arrays, or list of group dictionaries
        As for `optcore.SGD`; options with a star may differ from group to group.
    lr : float >= 0 or schedule, default 1e-3
        Learning rate α*.
    beta1 : float in [0, 1) or schedule, default 0.9
        β₁*.
    beta2 : float in [0, 1) or schedule, default 0.999
        β₂*.
    eps : float >= 0 or schedule, default 1e-8
        ε*.
    weight_decay : float >= 0 or schedule, default 0
        λ*: added to the gradient as λ·param, unless `decoupled_weight_decay`.
    amsgrad : bool, default False
        Divide by the root of the greatest v there was*, ``"max_exp_avg_sq"``.
    {common}

    Notes
    -----
    Kingma and Ba 2015; Reddi, Kale and Kumar 2018 (AMSGrad); CS231n (2017), lecture 7, with
    ``eps=1e-7``. Options and their defaults are those of ``torch.optim.Adam``, whose ``betas`` are
    ``(beta1, beta2)``.

    Examples
    --------
    >>> import numpy as np, optcore
    >>> x = np.zeros(2, np.float32)
    >>> opt = optcore.Adam(x, lr=0.5)
    >>> opt.step(np.array([1e-3, 1e3], np.float32))
    True
    >>> x
    array([-0.499995, -0.5     ], dtype=float32)
    """

    __slots__ = ()

    _family = "adam"

    def __init__(
        self,
        params: Any,
        lr: float | Schedule = 1e-3,
        beta1: float | Schedule = 0.9,
        beta2: float | Schedule = 0.999,
        eps: float | Schedule = 1e-8,
        weight_decay: float | Schedule = 0.0,
        amsgrad: bool = False,
        *,
        eps_in_sqrt: bool = False,
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
        clip_value: float | Schedule | None = None,
        flush_subnormals: bool = False,
        max_norm: float | None = None,
        skip_nonfinite: bool = False,
        track_grad_norm: bool = False,
        ema_decay: float | Schedule | None = None,
        master: str | None = "auto",
        rounding: str = "stochastic",
        state_dtype: Any = None,
        lazy: str = "exact",
        seed: int = 0,
        grads: Any = None,
    ) -> None:
        self._construct(locals())


@documented
class AdamW(Adam):
    """`optcore.Adam` with decoupled weight decay, ``x = x·(1 - α·λ)`` before the rule.

    Parameters
    ----------
    params, lr, beta1, beta2, eps
        As for `optcore.Adam`.
    weight_decay : float >= 0 or schedule, default 1e-2
        λ*.
    amsgrad
        As for `optcore.Adam`.
    {common}

    Notes
    -----
    Loshchilov and Hutter 2019. Options and their defaults are those of ``torch.optim.AdamW``.
    Loading a state of `Adam` leaves the decay decoupled.
    """

    __slots__ = ()

    _always: ClassVar[dict[str, Any]] = {"decoupled_weight_decay": True}

    def __init__(
        self,
        params: Any,
        lr: float | Schedule = 1e-3,
        beta1: float | Schedule = 0.9,
        beta2: float | Schedule = 0.999,
        eps: float | Schedule = 1e-8,
        weight_decay: float | Schedule = 1e-2,
        amsgrad: bool = False,
        *,
        eps_in_sqrt: bool = False,
        maximize: bool = False,
        decoupled_weight_decay: bool = True,
        clip_value: float | Schedule | None = None,
        flush_subnormals: bool = False,
        max_norm: float | None = None,
        skip_nonfinite: bool = False,
        track_grad_norm: bool = False,
        ema_decay: float | Schedule | None = None,
        master: str | None = "auto",
        rounding: str = "stochastic",
        state_dtype: Any = None,
        lazy: str = "exact",
        seed: int = 0,
        grads: Any = None,
    ) -> None:
        self._construct(locals())
