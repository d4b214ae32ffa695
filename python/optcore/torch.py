"""``optcore.torch.SGD``: ``torch.optim.SGD`` on optcore's plan.

The plan steps on the tensors' own memory. It is a cache: all that must survive it stands where
PyTorch keeps such things, in `param_groups` and `state`, and the plan is built anew whenever a
tensor's memory or a buffer in `state` turns out to be another than it was built for.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

try:
    import torch
except ImportError as error:
    raise ImportError(
        "optcore.torch needs PyTorch, which is not installed: pip install 'optcore[torch]'"
    ) from error

import numpy as np

import optcore
from optcore.arrays import check_saved
from optcore.options import GROUP_OPTIONS

# Ways of running that torch.optim has: groups hold them, as torch.optim.SGD's do, switched off.
SWITCHED_OFF = {"foreach": None, "fused": None, "differentiable": False, "capturable": False}
# What `state` calls a state of the plan's, where that is PyTorch's own: in its convention only.
TORCH_KEYS = {"velocity": "momentum_buffer"}


def _options(group: dict[str, Any]) -> dict[str, Any]:
    """Return a group's options as the plan takes them."""
    for key in SWITCHED_OFF:
        if group.get(key):
            raise ValueError(f"{key} must be None or False, got {group[key]!r}: not supported")
    options = {}
    for key in GROUP_OPTIONS:
        value = group[key]
        if isinstance(value, torch.Tensor):
            if value.requires_grad:
                raise ValueError(f"{key} must not require grad: a step cannot be differentiated")
            value = value.item()
        elif callable(value):       # the plan, which counts steps, may be built anew at any time
            raise TypeError(f"{key} must be a number, got {value!r}: use torch.optim.lr_scheduler")
        options[key] = value
    if options["momentum"] == 0:
        options["dampening"] = 0.0      # which PyTorch ignores there and optcore.SGD refuses
    return options


def _key(name: str, group: dict[str, Any]) -> str:
    """Return under which key `state` keeps a state of the plan's."""
    return name if group["lr_in_velocity"] else TORCH_KEYS.get(name, name)


# A tensor in another dense layout than the C order, such as channels_last, is stepped through
# the permutation of its axes that is in C order.

def _order(param: torch.Tensor) -> list[int] | None:
    """Return the axes of a parameter by descending stride; None where they are in C order."""
    if param.layout is not torch.strided or param.is_contiguous():
        return None
    return sorted(range(param.dim()), key=param.stride, reverse=True)


def _turned(tensor: torch.Tensor | None, order: list[int] | None) -> torch.Tensor | None:
    """Return a parameter's tensor, or a gradient or state of it, with its axes in that order."""
    return tensor if tensor is None or order is None else tensor.detach().permute(order)


def _gradient(param: torch.Tensor, order: list[int] | None) -> torch.Tensor | None:
    """Return the gradient in its parameter's layout: itself, or a copy where it has another."""
    grad = _turned(param.grad, order)
    return grad if grad is None or grad.layout is not torch.strided else grad.contiguous()


def _lent(array: Any, order: list[int] | None) -> torch.Tensor:
    """Return the plan's array as a tensor in its parameter's order of axes."""
    tensor = torch.from_numpy(array)
    if order is None:
        return tensor
    return tensor.permute(sorted(range(len(order)), key=order.__getitem__))


def _saved(
    entry: dict[str, Any], key: str, order: list[int] | None, array: np.ndarray, i: int
) -> np.ndarray | None:
    """Return what `state` holds for a parameter, checked, in the plan's order of axes."""
    tensor = entry.get(key)
    if tensor is None:
        return None
    where = f"state[{i}][{key!r}]"
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{where} must be a tensor or None, got {type(tensor).__name__}")
    if order is not None and tensor.dim() == len(order):
        tensor = tensor.permute(order)
    return check_saved(tensor.detach().numpy(), array, where)


class SGD(torch.optim.Optimizer):
    """``torch.optim.SGD`` in one fused pass over float32 and float64 tensors on the CPU.

    Parameters
    ----------
    params : iterable of tensors, of (name, tensor) pairs, or of group dictionaries
        As ``torch.optim.SGD`` takes them. Tensors are dense and updated in place.
    lr : float or one-element tensor >= 0, default 1e-3
        Learning rate*.
    momentum : float in [0, 1), default 0
        ρ*.
    dampening : float in [0, 1), default 0
        τ*; without effect where momentum is 0, as in PyTorch.
    weight_decay : float >= 0, default 0
        λ*.
    nesterov : bool, default False
        Nesterov momentum*; needs momentum and no dampening.
    maximize : bool, default False
        Follow the gradient upwards*.
    foreach, fused : None or False
        Taken for compatibility; True is refused, for there is one way to run.
    differentiable : False
        True is refused: a step cannot be differentiated.
    decoupled_weight_decay, lr_in_velocity, clip_value
        As in `optcore.SGD`*.
    max_norm, skip_nonfinite
        As in `optcore.SGD`, over the parameters of all groups; attributes, too.
    ema_decay : float in [0, 1), optional
        As in `optcore.SGD`; the averages are in ``state[param]["ema"]``. An attribute, too.

    Attributes
    ----------
    skipped : int
        Steps skipped, by `skip_nonfinite` or by a GradScaler.
    grad_norm : float or None
        Norm of all gradients in the last step, before clipping; None without `max_norm`.

    Raises
    ------
    TypeError, ValueError
        For what is not supported or out of range. Tensors on a GPU, sparse, complex or of
        another dtype are refused, naming the parameter where names were given.

    Notes
    -----
    An option that bears a star may stand in a group and be edited between steps.

    ``state[param]["momentum_buffer"]`` is the velocity itself, not a copy, and appears with the
    parameter's first gradient. Under `lr_in_velocity` it is called ``"velocity"``, since no
    other optimizer could go on from it.

    Examples
    --------
    >>> import torch, optcore.torch
    >>> model = torch.nn.Linear(3, 1)
    >>> opt = optcore.torch.SGD(model.parameters(), lr=0.1, momentum=0.9)
    >>> model(torch.ones(2, 3)).sum().backward()
    >>> opt.step()
    """

    # GradScaler then leaves unscaling and skipping to step(), by `grad_scale` and `found_inf`.
    _step_supports_amp_scaling = True

    _plan: optcore.SGD | None = None
    _state_names: tuple[str, ...] = ()

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | torch.Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        lr_in_velocity: bool = False,
        clip_value: float | None = None,
        max_norm: float | None = None,
        skip_nonfinite: bool = False,
        ema_decay: float | None = None,
    ) -> None:
        self.max_norm = max_norm
        self.skip_nonfinite = skip_nonfinite
        self.ema_decay = ema_decay
        self.grad_norm: float | None = None
        self.skipped = 0
        self._built = False
        super().__init__(params, {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
            "lr_in_velocity": lr_in_velocity,
            "clip_value": clip_value,
        })
        self._built = True
        self._build()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as ``torch.optim.Optimizer.add_param_group``; refused whole, if at all."""
        super().add_param_group(param_group)
        if self._built:
            try:
                self._build()
            except BaseException:
                self.param_groups.pop()
                raise

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle takes along: all but the plan and the hooks."""
        options = ("max_norm", "skip_nonfinite", "ema_decay", "grad_norm", "skipped", "_built")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in options}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a state, which may be another optimizer's."""
        super().__setstate__(state)
        self._plan = None
        for group in self.param_groups:
            for key, default in self.defaults.items():
                group.setdefault(key, default)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state of this class or of ``torch.optim.SGD``.

        How the other one ran (``foreach``, ``fused``) is not taken over; all else is as
        ``torch.optim.Optimizer.load_state_dict`` has it.

        Raises
        ------
        TypeError, ValueError
            For a state that does not fit. Nothing has changed then.
        """
        before = {"state": self.state, "param_groups": self.param_groups}
        try:
            super().load_state_dict(state_dict)
            for group in self.param_groups:
                group.update({key: SWITCHED_OFF[key] for key in SWITCHED_OFF if key in group})
            self._build()
        except BaseException:
            self.__setstate__(before)
            raise

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step over all parameters that have a gradient.

        Parameters
        ----------
        closure : callable, optional
            Evaluates the model anew and returns the loss, which is returned.

        Raises
        ------
        TypeError, ValueError
            For gradients and options that are not as they must be. Nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and found_inf != 0:    # GradScaler sums it over devices
            self.skipped += 1
            return loss
        plan = self._current_plan()
        grads: list[Any] = [_gradient(param, order) for param, order in self._params]
        taken = [param for (param, _), grad in zip(self._params, grads, strict=True)
                 if grad is not None]
        if plan is None or not taken:
            return loss
        scale = getattr(self, "grad_scale", None)
        applied = plan.step(grads, grad_scale=1.0 if scale is None else 1 / float(scale))
        self.grad_norm = plan.grad_norm
        if applied:
            # The plan writes behind autograd's back, which must learn of it.
            torch.autograd.graph.increment_version(taken)
            if self._waiting and any(group["momentum"] for group in self.param_groups):
                self._publish(plan)
        else:
            self.skipped += 1
        return loss

    # The plan

    def _current_plan(self) -> optcore.SGD | None:
        """Return a plan for the tensors, the state and the options as they are now."""
        if self._plan is None or self._seen != self._look():
            self._build()
        if self._plan is not None:
            for mine, group in zip(self._plan.param_groups, self.param_groups, strict=True):
                options = _options(group)
                # An object that stays spares the plan from reading its group again.
                mine.update({
                    key: value for key, value in options.items()
                    if type(mine[key]) is not type(value) or mine[key] != value
                })
        return self._plan

    def _look(self) -> list[Any]:
        """Return what the plan was built for, to be compared."""
        options = (self.max_norm, self.skip_nonfinite, self.ema_decay)
        seen: list[Any] = [
            value.item() if isinstance(value, torch.Tensor) else value for value in options
        ]
        for group in self.param_groups:
            keys = [_key(name, group) for name in self._state_names]
            for param in group["params"]:
                buffers = [self.state.get(param, {}).get(key) for key in keys]
                seen.append((
                    param.data_ptr(), param.shape, param.stride(),
                    *[None if buffer is None else buffer.data_ptr() for buffer in buffers],
                ))
            seen.append(keys)
        return seen

    def _build(self) -> None:
        """Build a plan for the tensors as they are, going on from what `state` holds."""
        self._plan = None
        groups = []
        owners = []     # of each parameter: itself, its order, its group
        for group in self.param_groups:
            own = [(param, _order(param), group) for param in group["params"]]
            owners += own
            groups.append({
                **_options(group),
                "params": [_turned(param, order) for param, order, _ in own],
                "param_names": group.get("param_names"),
            })
        self._params = [(param, order) for param, order, _ in owners]
        if not owners:
            return
        plan = optcore.SGD(
            groups, max_norm=self.max_norm, skip_nonfinite=self.skip_nonfinite,
            ema_decay=self.ema_decay,
        )
        arrays = [array for group in plan.param_groups for array in group["params"]]
        entries = []
        for i, ((param, order, group), array) in enumerate(zip(owners, arrays, strict=True)):
            held = self.state.get(param, {})
            for name, torch_key in TORCH_KEYS.items():
                stranger = torch_key if group["lr_in_velocity"] else name
                if held.get(stranger) is not None:
                    raise ValueError(
                        f"state[{i}] must hold no {stranger!r} with "
                        f"lr_in_velocity={group['lr_in_velocity']!r}, got one"
                    )
            entry = {name: _saved(held, _key(name, group), order, array, i)
                     for name in plan._state_names}
            first_step = all(saved is None for saved in entry.values())
            average = None if self.ema_decay is None else _saved(held, "ema", order, array, i)
            entries.append({**entry, "ema": average, "first_step": first_step})
        plan._restore(plan.param_groups, entries, {}, (0, 0))
        self._state_names = plan._state_names
        self._waiting = list(enumerate(owners))
        if self.ema_decay is not None:
            for (param, order, _), entry in zip(owners, plan._state, strict=True):
                self.state[param]["ema"] = _lent(entry["ema"], order)
        self._publish(plan)
        self._plan = plan

    def _publish(self, plan: optcore.SGD) -> None:
        """Put the states that have started into `state`; note what the plan relies on."""
        waiting = []
        state = plan._state
        for i, owner in self._waiting:
            if state[i]["first_step"]:
                waiting.append((i, owner))
                continue
            param, order, group = owner
            for name in self._state_names:
                self.state[param][_key(name, group)] = _lent(state[i][name], order)
        self._waiting = waiting
        self._seen = self._look()
