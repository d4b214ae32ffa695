"""``optcore.torch``: the optimizers of ``torch.optim`` on optcore's plan.

The plan steps on the tensors' own memory, parameters' and velocities'. It is a cache: all that
must survive it stands where PyTorch keeps such things, in `param_groups` and `state`, and it is
built anew whenever these hold other tensors, or tensors in another place, than it was built for.
"""
from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, overload

try:
    import torch
except ImportError as error:
    raise ImportError(
        "optcore.torch needs PyTorch, which is not installed: pip install 'optcore[torch]'"
    ) from error

import numpy as np

import optcore
from optcore import _lookups
from optcore._state import saved_count, saved_number
from optcore.adaptive import AdaGradOptions, RMSPropOptions
from optcore.arrays import bfloat16, is_bfloat16
from optcore.groups import GROUP_NOTES
from optcore.optimizer import AdaptiveOptions, GroupOption, Optimizer, SGDOptions
from optcore.options import (
    CHOICES,
    GROUP_OPTIONS,
    OPTIMIZER_OPTIONS,
    STORAGE,
    checked,
    running_power,
)
from optcore.pieces import Stepping

# Ways of running that torch.optim has: groups hold them, as torch.optim.SGD's do, switched off.
SWITCHED_OFF = {"foreach": None, "fused": None, "differentiable": False, "capturable": False}
# Of the whole optimizer. The norm is measured for max_norm alone.
OWN_OPTIONS = tuple(name for name in OPTIMIZER_OPTIONS if name != "track_grad_norm")
# What PyTorch keeps in an optimizer under public names.
TORCH_ATTRIBUTES = {"defaults", "state", "param_groups", "grad_scale", "found_inf"}
PLAIN = {torch.Tensor, torch.nn.Parameter}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# What `state` has of the plan's masters, by their dtype: a float32 copy, or its low halves.
MASTER_KEYS = {np.dtype(np.float32): "master", np.dtype(np.uint16): "low_bits"}
MASTER_AND_AVERAGE = {*MASTER_KEYS.values(), "ema"}
# What PyTorch calls a state otherwise, and the options that say how states are stored
STATE_KEYS = {"velocity": "momentum_buffer", "square_sum": "sum"}
STATE_DTYPES = {"velocity_dtype", "state_dtype"}
# A beta to the number of steps, which parameters mostly have alike
_power = functools.lru_cache(maxsize=1024)(running_power)
# States that may begin after the first step, from zeros
BEGUN_LATE = ("momentum_buffer", "velocity", "grad_avg", "max_exp_avg_sq")
# Options by which a rule has more states or others
SWITCHES = ("lr_in_velocity", "centered", "amsgrad")


def _as_array(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor's memory as the plan takes it."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16).view(bfloat16)
    return tensor.numpy()


class _Uncast:
    """Keeps a loaded tensor from PyTorch, which would cast it to its parameter's dtype."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def _number(name: str, value: Any) -> Any:
    """Return an option as the plan takes it."""
    if name in CHOICES:
        return checked(name, value, name)
    if callable(value):     # the plan, which counts steps, may be built anew at any time
        raise TypeError(
            f"{name} must be a number, got {value!r}: use torch.optim.lr_scheduler, or set it "
            "between steps"
        )
    if isinstance(value, torch.Tensor) and value.requires_grad:
        raise ValueError(f"{name} must not require grad: a step cannot be differentiated")
    return value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value


def _local(tensor: Any) -> Any:
    """Return the tensor itself or, of a DTensor, the part on this rank."""
    return tensor.detach().to_local() if hasattr(tensor, "to_local") else tensor


def _place(tensor: Any) -> Any:
    """Return what tells a tensor's memory and how it lies there."""
    if type(tensor) not in PLAIN:
        if not isinstance(tensor, torch.Tensor) or torch.nn.parameter.is_lazy(tensor):
            return type(tensor)
        tensor = _local(tensor)
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


class _Owner(NamedTuple):
    """A parameter and how it is stepped: by the permutation of its axes that is in C order."""

    param: Any
    group: dict[str, Any]
    order: list[int] | None     # the axes by descending stride; None: in C order as they are
    label: str
    place: Any

    def key_of(self, name: str) -> str:
        """Under which key `state` has a state: PyTorch's, a velocity in its convention only."""
        if name == "velocity" and self.group["lr_in_velocity"]:
            return name
        return STATE_KEYS.get(name, name)

    def dtype_of(self, key: str) -> torch.dtype:
        """In which dtype `state` has an entry."""
        if key == "low_bits":
            return torch.int16
        for option in STATE_DTYPES & self.group.keys():
            if key not in MASTER_AND_AVERAGE and (
                _number(option, self.group[option]) == "bfloat16"
            ):
                return torch.bfloat16
        return torch.float64 if self.param.dtype == torch.float64 else torch.float32

    def turned(self, tensor: torch.Tensor) -> Any:
        """Return a tensor like the parameter as the plan takes it."""
        tensor = _local(tensor)
        return tensor if self.order is None else tensor.detach().permute(self.order)

    def lent(self, array: Any) -> Any:
        """Return the plan's array as a tensor like the parameter."""
        p = self.param
        tensor = torch.from_numpy(array.view(np.int16) if array.dtype == np.uint16 else array)
        if is_bfloat16(array):
            tensor = tensor.view(torch.bfloat16)
        if self.order is not None:
            tensor = tensor.permute(sorted(range(len(self.order)), key=self.order.__getitem__))
        if not hasattr(p, "to_local"):
            return tensor
        return p.from_local(tensor, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())

    def gradient(self, grad: Any) -> Any:
        """Return a gradient as the plan takes it."""
        if grad is None:
            return None
        if self.order is not None and grad.is_sparse:
            raise ValueError(
                f"{self.label} must be contiguous to be stepped by a sparse gradient: give "
                "torch.nn.Parameter(p.contiguous())"
            )
        if hasattr(grad, "to_local") and grad.placements != self.param.placements:
            grad = grad.detach().redistribute(placements=self.param.placements)
        return self.turned(grad.resolve_neg() if grad.is_neg() else grad)

    def converted(self, key: str, array: Any) -> Any:
        """Return what is kept of a bfloat16 parameter's master in the other form than `key` has.

        The two show ties otherwise: there it begins at what the parameter shows.
        """
        forms = ("split", "float32") if key == "low_bits" else ("float32", "split")
        here, there = (optcore.SGD([self.turned(self.param)], lr=0.0, master=form)
                       for form in forms)
        here._lend_masters([array.view(here._masters[0].dtype)])
        there._restore(there.param_groups, here._snapshot()["state"], {}, (0, 0))
        return there._masters[0]

    def steppable(self, key: str, held: Any, where: str) -> torch.Tensor:
        """Return a tensor of `state` as it can be stepped: itself, or else cast and laid out."""
        dtype = self.dtype_of(key)
        if not isinstance(held, torch.Tensor) or not (
            held.dtype == dtype or (held.is_floating_point() and dtype.is_floating_point)
        ):
            raise TypeError(
                f"{where} must be a tensor of "
                f"{'real numbers' if dtype.is_floating_point else dtype}, got "
                f"{type(held).__name__} of {getattr(held, 'dtype', 'no dtype')}"
            )
        for name in ("layout", "shape", "placements"):
            has, wanted = (getattr(tensor, name, None) for tensor in (held, self.param))
            if has != wanted:
                raise ValueError(f"{where} has {name} {has}; its parameter has {wanted}")
        fits = held.dtype == dtype and self.turned(held).is_contiguous()
        shared = _local(held).is_shared()
        if fits and not held.is_neg() and (key != "ema" or not shared):
            return held
        if shared:
            raise ValueError(
                f"{where} is shared with other processes, which only a velocity or a master that "
                f"lies like its parameter can stay, torch.zeros_like(p, dtype={dtype}) say: give "
                "a clone()"
            )
        return torch.empty_like(self.param, dtype=dtype).copy_(held.detach())


def _of_each(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the group of each parameter."""
    return [group for group in groups for _ in group["params"]]


def _owned(param: Any, group: dict[str, Any], label: str) -> tuple[_Owner, torch.Tensor]:
    """Return how a parameter is stepped, and what the plan gets of it."""
    if not isinstance(param, torch.Tensor):
        raise TypeError(f"{label} must be a tensor, got {type(param).__name__}")
    kind = param.dtype, param.layout, param.device.type
    if kind not in [(dtype, torch.strided, "cpu") for dtype in DTYPES]:
        raise TypeError(
            f"{label} must be a dense float32, float64, bfloat16 or float16 tensor on the CPU, "
            f"got {', '.join(map(str, kind))}"
        )
    if torch.nn.parameter.is_lazy(param):       # nothing yet
        return _Owner(param, group, None, label, _place(param)), torch.empty(0, dtype=param.dtype)
    if param.is_neg():
        raise ValueError(f"{label} is a negated view: give torch.nn.Parameter(p.resolve_neg())")
    local = _local(param)
    order = None if local.is_contiguous() else sorted(
        range(local.dim()), key=local.stride, reverse=True)
    owner = _Owner(param, group, order, label, _place(param))
    return owner, owner.turned(local)


def _on_gradient(ref: weakref.ref[_Optimizer]) -> Callable[[Any], None]:
    """Return the hook that steps a parameter, but keeps no optimizer alive."""
    def hook(param: Any) -> None:
        opt = ref()
        if opt is not None and param.grad is not None:
            opt._take({param: param.grad})

    return hook


def _on_bucket(ref: weakref.ref[_Optimizer]) -> Callable[[Any, Any], Any]:
    """Return the hook by which DistributedDataParallel averages a bucket and has it stepped."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    def hook(group: Any, bucket: Any) -> Any:
        opt = ref()
        if opt is not None:
            opt._check_bucket(bucket)
        average = allreduce_hook(group, bucket)
        if opt is not None:
            opt._take_averaged(average, bucket)
        return average

    return lambda group, bucket: hook(group, bucket)    # which has no annotations to be disputed


def _check_replicated(model: Any) -> None:
    """Refuse a model that cannot tell which gradients there are while ``backward()`` runs."""
    if not isinstance(model, torch.nn.parallel.DistributedDataParallel):
        raise TypeError(
            "step_in_backward must be True, False or a DistributedDataParallel model, got "
            f"{type(model).__name__}"
        )
    for name in ("find_unused_parameters", "static_graph", "mixed_precision"):
        if getattr(model, name, None):
            raise ValueError(
                f"step_in_backward must be False with {name}, for which gradients are known only "
                f"after backward(): build DistributedDataParallel without {name}"
            )


def _own_option(name: str) -> Any:
    """Return an option of the whole optimizer as an attribute, checked when it is set."""
    return property(
        lambda opt: opt._own[name], lambda opt, value: opt._set_own(name, value),
        doc=f"The option ``{name}``, to be read and set.",
    )


class _Optimizer(torch.optim.Optimizer):
    """What all of them do; each has a class of optcore's, and its options and states by name."""

    _core: type[Optimizer]
    # Of groups, with what stands for an option that a group does not have
    _group_options: dict[str, Any]
    # Keys that tell a state of PyTorch's class of that name
    _own_keys: frozenset[str]
    # Whether states are there before the first gradient
    _starts_at_once = False

    # GradScaler then leaves unscaling and skipping to step(), by `grad_scale` and `found_inf`.
    _step_supports_amp_scaling = True

    _plan: Optimizer | None = None
    _complete = False       # whether the constructor's groups are all there
    _skipped = 0
    _applied = 0            # steps, which noise is counted by
    _measured: tuple[float | None, list[Any]] = (None, [])
    _in_backward = False
    _replicas: Any = None   # the DistributedDataParallel model that averages the gradients
    _histories: list[Any] | None = None     # of a copy's rows, until it has a plan
    _piece: Stepping | None = None      # the step that backward() has begun
    _betas_seen: list[Any] | None = None    # and counts, for which the plan has its powers
    _counts_seen: Any = None
    _lasting: tuple[dict[str, Any], ...] | list[dict[str, Any]] = ()    # how groups are stored

    def _start(self, given: Mapping[str, Any]) -> None:
        """Build from the arguments of the constructor by their names."""
        step_in_backward = given["step_in_backward"]
        self._own = {name: given[name] for name in OWN_OPTIONS}
        self._in_backward = step_in_backward is not False
        if not isinstance(step_in_backward, bool):
            _check_replicated(step_in_backward)
            self._replicas = step_in_backward
        self._begin()
        super().__init__(given["params"], {
            name: given[name] for name in (*self._group_options, *SWITCHED_OFF) if name in given
        })
        self._complete = True
        self._build()
        if self._replicas is not None:
            self._replicas.register_comm_hook(
                self._replicas.process_group, _on_bucket(weakref.ref(self)))

    def _options(self, group: dict[str, Any]) -> dict[str, Any]:
        """Return a group's options as the plan takes them."""
        known = {"params", "param_names", *self._group_options, *SWITCHED_OFF, *GROUP_NOTES}
        for key in group.keys() - known:
            raise TypeError(
                f"unknown option {key!r} in a group: groups have "
                f"{', '.join(self._group_options)}; "
                f"{type(self).__name__}(...) has {', '.join(OWN_OPTIONS)}"
            )
        for key in SWITCHED_OFF:
            if group.get(key):
                raise ValueError(f"{key} must be None or False, got {group[key]!r}: not supported")
        for key in self._group_options.keys() - group.keys():
            raise KeyError(f"option {key!r} is missing in a group")
        options = {key: _number(key, value) for key, value in self._spelled(group).items()}
        if options.get("momentum") == 0 and "dampening" in options:
            options["dampening"] = 0.0      # which PyTorch ignores there and optcore.SGD refuses
        return options

    def _spelled(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return a group's options by the names that the plan has for them."""
        return {key: group[key] for key in self._group_options}

    @property
    def skipped(self) -> int:
        """Steps skipped, by `skip_nonfinite` or by a GradScaler."""
        return self._skipped

    @property
    def grad_norm(self) -> float | None:
        """Norm of all gradients in the last step, before clipping; None without `max_norm`."""
        return self._measured[0]

    @property
    def nonfinite_params(self) -> list[Any]:
        """Names, or indices over all groups, of the last step's non-finite gradients.

        Empty where the step did not look: it looks with `max_norm` or `skip_nonfinite`.
        """
        return list(self._measured[1])

    @property
    def step_in_backward(self) -> bool:
        """Whether parameters are stepped inside ``backward()``."""
        return self._in_backward

    max_norm = _own_option("max_norm")
    skip_nonfinite = _own_option("skip_nonfinite")
    ema_decay = _own_option("ema_decay")
    seed = _own_option("seed")

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse what nobody would read; private names are PyTorch's and its friends'."""
        kind = type(self)
        if kind.__module__ == __name__ and not (
            name.startswith("_") or name in TORCH_ATTRIBUTES or hasattr(kind, name)
        ):
            raise AttributeError(
                f"optcore.torch.{kind.__name__} has no attribute and no option {name!r}"
            )
        super().__setattr__(name, value)

    @contextlib.contextmanager
    def _all_or_nothing(self, *dicts: dict[str, Any]) -> Iterator[None]:
        """Put back what a change has changed that is refused."""
        self._check_between()
        own, state, groups = self._own, self.state, self.param_groups
        applied = self._applied
        n_groups, before = len(groups), [
            (group, dict(group)) for group in (*groups, *dicts) if isinstance(group, dict)]
        try:
            yield
        except BaseException:
            self._own, self.state, self.param_groups, self._plan = own, state, groups, None
            self._applied = applied
            del groups[n_groups:]
            for group, options in before:
                for key in group.keys() - options.keys():
                    del group[key]
                group.update({key: options[key] for key in options if key != "params"})
            raise

    def _set_in_groups(self, name: str, value: Any) -> None:
        with self._all_or_nothing():
            for group in self.param_groups:
                group[name] = value
            plan = self._current_plan()
            if plan is not None:
                plan.max_norm = plan.max_norm       # which checks all options together

    def _set_own(self, name: str, value: Any) -> None:
        with self._all_or_nothing():
            if self.ema_decay is None:
                self._plan = None       # averages may begin
            self._own = {**self._own, name: value}
            plan = self._current_plan()
            if plan is not None:
                setattr(plan, name, _number(name, value))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as ``torch.optim.Optimizer.add_param_group``.

        Parameters
        ----------
        param_group : dict
            ``"params"``, and options where they differ from those given to the constructor.

        Raises
        ------
        KeyError, TypeError, ValueError
            As the constructor, and as PyTorch. Nothing has changed then.
        """
        if not self._complete:
            super().add_param_group(param_group)
            return
        with self._all_or_nothing(param_group):
            super().add_param_group(param_group)
            self._build()

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle takes along: all but the plan and the hooks."""
        self._check_between()
        if self._replicas is not None:
            raise TypeError(
                "an optimizer with step_in_backward=model cannot be copied or pickled, for the "
                "copy's model would not tell it of gradients: build one with the other model and "
                "load_state_dict(opt.state_dict())"
            )
        own = ("_own", "_complete", "_skipped", "_applied", "_measured", "_in_backward")
        histories = self._histories if self._plan is None else self._plan._copy_histories()
        return {
            **super().__getstate__(), **{name: getattr(self, name) for name in own},
            "_histories": histories,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Go on from `__getstate__`."""
        super().__setstate__(state)
        self._begin()
        self._hook()
        if self._histories is not None:
            _lookups.watch(self)

    def state_dict(self) -> dict[str, Any]:
        """Return the state, as ``torch.optim.Optimizer.state_dict``.

        Groups have, besides, the ``"seed"`` and the ``"step_count"`` that noise comes from.
        """
        self._check_between()
        self.catch_up()
        state = super().state_dict()
        for group in state["param_groups"]:
            group.update(seed=self.seed, step_count=self._applied)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state of this class or of PyTorch's of its name.

        Options that it does not have (``clip_value``, say, in PyTorch's) stay, averages that it
        does not have begin anew, and how the other one ran (``foreach``, ``fused``) is not taken
        over. `master`, `velocity_dtype` and `state_dtype` stay, and what the state has is converted
        to them. All else is as ``torch.optim.Optimizer.load_state_dict`` has it.

        Parameters
        ----------
        state_dict : dict
            What ``state_dict()`` of either returned.

        Raises
        ------
        KeyError, TypeError, ValueError
            For a state that does not fit, another algorithm's for one. Nothing has changed then.
        """
        with self._all_or_nothing():
            hooks = (
                self.register_load_state_dict_pre_hook(lambda _, state: self._adapted(state)),
                self.register_load_state_dict_post_hook(lambda _: self._loaded(), prepend=True),
            )
            try:
                super().load_state_dict(state_dict)
            finally:
                for hook in hooks:
                    hook.remove()
        self._measured = (None, [])

    def _adapted(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Complete a state's groups; refuse, or hide, what PyTorch would keep unread, or cast."""
        groups, state = [], {}
        pairs = zip(self.param_groups, state_dict["param_groups"], strict=False)
        for g, (own, saved) in enumerate(pairs):
            for key in self._own_keys - saved.keys():
                raise KeyError(
                    f"state_dict['param_groups'] must have {type(self).__name__}'s {key!r}"
                )
            group = {
                **{key: own[key] for key in self._group_options}, **saved,
                **{key: SWITCHED_OFF[key] for key in SWITCHED_OFF if key in saved},
                **{key: own[key] for key in STORAGE if key in own}, **self._core._always,
            }
            if "step_count" in group:
                self._applied = saved_count(
                    group, "step_count", f"state_dict['param_groups'][{g}]")
                del group["step_count"]
            if "seed" in group:
                self._own = {**self._own, "seed": group.pop("seed")}
            groups.append(group)
        groups += state_dict["param_groups"][len(groups):]     # too many, which PyTorch refuses
        known = {i for group in groups for i in group["params"]}
        for i, entry in state_dict["state"].items():
            if i not in known or not isinstance(entry, Mapping):
                got = type(entry).__name__ if i in known else "no such parameter"
                raise ValueError(f"state[{i!r}] must be a parameter's dictionary, got {got}")
            state[i] = {key: _Uncast(held) if isinstance(held, torch.Tensor) else held
                        for key, held in entry.items()}
        return {**state_dict, "param_groups": groups, "state": state}

    def _loaded(self) -> None:
        """Go on from what PyTorch has loaded."""
        for param, entry in self.state.items():
            for key, held in entry.items():
                if isinstance(held, _Uncast):
                    entry[key] = held.tensor.to(param.device)
        self._build(loaded=True)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step over all parameters that have a gradient.

        With `step_in_backward`, over those that ``backward()`` has not stepped, which ends the
        step that it began: one step is counted.

        Parameters
        ----------
        closure : callable, optional
            Evaluates the model anew and returns the loss, which is returned.

        Raises
        ------
        KeyError, TypeError, ValueError
            For gradients, options and states that are not as they must be. Nothing has changed
            then.
        RuntimeError
            With `step_in_backward`, for a GradScaler, and for gradients of parameters that were
            stepped already.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._in_backward:
            self._end_step()
            return loss
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and found_inf != 0:    # GradScaler sums it over devices
            self._skipped += 1
            self._measured = (None, [])
            return loss
        plan = self._current_plan()
        grads = [owner.gradient(owner.param.grad) for owner in self._owners]
        taken = [owner.param for owner, grad in zip(self._owners, grads, strict=True)
                 if grad is not None]
        if plan is None or not taken:
            self._measured = (None, [])
            return loss
        self._follow_counts(plan)
        scale = getattr(self, "grad_scale", None)
        applied = plan.step(grads, grad_scale=1.0 if scale is None else 1 / float(scale))
        self._watch_rows(plan)
        self._note_counts(plan)
        self._measured = (plan.grad_norm, plan.nonfinite_params)
        self._applied = plan.step_count
        if applied:
            # The plan writes behind autograd's back, which must learn of it.
            torch.autograd.graph.increment_version(taken)
            started = [i for i in self._waiting if grads[i] is not None]
            if started:
                self._publish(plan, started)
        else:
            self._skipped += 1
        return loss

    # Sparse gradients

    def _watch_rows(self, plan: Optimizer) -> None:
        """Have embedding layers say what they read, once rows may be behind."""
        if plan._has_histories:
            _lookups.watch(self)

    def _steps(self, param: Any) -> bool:
        """Return whether it is what steps a parameter."""
        return any(param is own for group in self.param_groups for own in group["params"])

    def catch_up(self, param: Any = None, rows: Any = None) -> None:
        """Bring rows up to date that sparse gradients have not touched, before they are read.

        Embedding layers do it in their forward pass, and state dictionaries by themselves; copies
        and pickles take along what rows have missed. It is for what reads a table otherwise:
        ``F.embedding``, an evaluation, the model's own ``state_dict()``.

        Parameters
        ----------
        param : Parameter, optional
            Without it, all.
        rows : tensor of integers of any shape, optional
            Without it, all rows.

        Raises
        ------
        KeyError, IndexError, TypeError
            For a parameter that is not this optimizer's, and rows that it does not have.
        RuntimeError
            With `step_in_backward`, between ``backward()`` and ``step()``.
        """
        if param is not None and not self._steps(param):
            raise KeyError("param must be a parameter of this optimizer")
        if self._plan is None and self._histories is not None:
            self._build()
        plan = self._plan
        if plan is None or not plan._has_histories:
            return
        if param is None:
            plan.catch_up()
            params = [owner.param for owner in self._owners]
        else:
            plan.catch_up(self._places[param], None if rows is None else rows.detach().numpy())
            params = [param]
        # The plan writes behind autograd's back, which must learn of it.
        torch.autograd.graph.increment_version(params)

    # Steps in backward

    def _begin(self) -> None:
        """Begin without hooks and without a step under way."""
        self._hooks: dict[Any, Any] = {}
        self._stepped: set[int] = set()     # in the step under way
        self._buckets: list[tuple[Any, dict[Any, Any]]] = []    # of this backward(), not stepped

    def _hook(self) -> None:
        """Register hooks where they lack, and remove the others; one that is running stays."""
        if not self._in_backward or self._replicas is not None:
            return
        wanted = {
            param for group in self.param_groups for param in group["params"]
            if param.requires_grad and not torch.nn.parameter.is_lazy(param)
        }
        for param in self._hooks.keys() - wanted:
            self._hooks.pop(param).remove()
        for param in wanted - self._hooks.keys():
            self._hooks[param] = param.register_post_accumulate_grad_hook(
                _on_gradient(weakref.ref(self)))

    def _check_between(self) -> None:
        """Refuse what has no meaning in the middle of a step."""
        if self._piece is not None:
            raise RuntimeError(
                "a step is under way, for backward() has stepped parameters: call opt.step() first"
            )

    def _take(self, gradients: dict[Any, Any]) -> None:
        """Step some parameters, all or none, and free their gradients; the first begin the step."""
        plan = self._current_plan() if self._piece is None else self._plan
        if plan is None:
            return
        given = {}
        for param, grad in gradients.items():
            i = self._places.get(param)
            if i is None:       # another optimizer's, or no longer this one's
                continue
            owner = self._owners[i]
            self._refuse_again(i)
            if _place(param) != owner.place:
                raise RuntimeError(
                    f"{owner.label} was replaced while a step was under way: call opt.step() "
                    "before, which ends it (opt.zero_grad() drops the gradient)"
                )
            given[i] = owner.gradient(grad)
        if not given:
            return
        if self._piece is not None:
            self._piece.step(given)
        else:
            self._follow_counts(plan)
            with contextlib.ExitStack() as beginning:
                piece = beginning.enter_context(plan.stepping())
                piece.step(given)
                beginning.pop_all()     # it stays open
            self._piece = piece
        self._watch_rows(plan)
        self._stepped.update(given)
        taken = [self._owners[i].param for i in given]
        # The plan writes behind autograd's back, which must learn of it.
        torch.autograd.graph.increment_version(taken)
        for param in taken:
            param.grad = None

    def _refuse_again(self, i: int | None) -> None:
        """Refuse a gradient of a parameter that had its step."""
        if i in self._stepped:
            raise RuntimeError(
                f"{self._owners[i].label} has another gradient after step_in_backward has stepped "
                "it: call opt.step() after each backward() (opt.zero_grad() drops the gradient); "
                "to add gradients up, leave step_in_backward out; a DistributedDataParallel "
                "model needs step_in_backward=model, and a parameter in several checkpoints "
                "use_reentrant=False"
            )

    def _check_bucket(self, bucket: Any) -> None:
        """Refuse a bucket before any rank waits for others to average it."""
        if self._replicas._join_config.enable:
            raise RuntimeError(
                "step_in_backward must be False within join(), where ranks that have no more "
                "inputs see gradients too"
            )
        for param in bucket.parameters():
            self._refuse_again(self._places.get(param))

    def _take_averaged(self, average: Any, bucket: Any) -> None:
        """Step the buckets that are averaged by now, and after the last one, all."""
        if bucket.index() == 0:
            self._buckets.clear()       # of a backward() that failed
        self._buckets.append(
            (average, dict(zip(bucket.parameters(), bucket.gradients(), strict=True))))
        while self._buckets and self._buckets[0][0].done():
            self._take_next()
        if bucket.is_last():
            # once the model's own callback, which comes next, has awaited the averages and put
            # them into p.grad
            queue = torch.autograd.Variable._execution_engine.queue_callback
            queue(lambda: queue(self._take_buckets))

    def _take_next(self) -> None:
        """Step the first bucket of those that were not."""
        average, gradients = self._buckets.pop(0)
        average.value()     # which raises if it failed
        self._take(gradients)

    def _take_buckets(self) -> None:
        """Step the buckets left at the end of ``backward()``."""
        while self._buckets:
            self._take_next()
        for i in self._stepped:
            self._owners[i].param.grad = None

    def _end_step(self) -> None:
        """Step what has a gradient that no hook was called for, and end the step."""
        for name in ("grad_scale", "found_inf"):
            if getattr(self, name, None) is not None:
                raise RuntimeError(
                    "step_in_backward has stepped scaled gradients: a GradScaler needs an "
                    "optimizer without step_in_backward, and bfloat16 needs no GradScaler"
                )
        self._take({param: param.grad for group in self.param_groups for param in group["params"]
                    if param.grad is not None})
        plan, piece, stepped = self._plan, self._piece, self._stepped
        if plan is None or piece is None:
            return
        self._piece, self._stepped = None, set()
        piece.__exit__(None, None, None)
        self._note_counts(plan)
        self._applied = plan.step_count
        started = [i for i in self._waiting if i in stepped]
        if started:
            replaced = self._seen != self._look()
            self._publish(plan, started)
            if replaced:
                self._plan = None       # the next step is to go on from what is there now

    # The plan

    def _current_plan(self) -> Optimizer | None:
        """Return a plan for the tensors, the state and the options as they are now."""
        if self._plan is None or self._seen != self._look():
            self._build()
        plan = self._plan
        if plan is not None:
            for mine, group in zip(plan.param_groups, self.param_groups, strict=True):
                options = self._options(group)
                # An object that stays spares the plan from reading its group again.
                mine.update({
                    key: value for key, value in options.items()
                    if type(mine[key]) is not type(value) or mine[key] != value
                })
            for name, value in self._own_numbers().items():
                if getattr(plan, name) != value:
                    setattr(plan, name, value)
        return plan

    def _own_numbers(self) -> dict[str, Any]:
        """Return the options of the whole optimizer as the plan takes them."""
        for name in ("max_norm", "skip_nonfinite"):
            if self._own[name] is OPTIMIZER_OPTIONS[name]:
                continue
            if self._in_backward:
                raise ValueError(
                    f"{name} must be left out with step_in_backward: it needs all gradients "
                    "before the first parameter is stepped (clip_value does not)"
                )
            if any(hasattr(owner.param, "to_local") for owner in self._owners):
                raise ValueError(
                    f"{name} must be left out with DTensors, whose gradients lie on several ranks: "
                    "call torch.nn.utils.clip_grad_norm_() before step()"
                )
        return {name: _number(name, value) for name, value in self._own.items()}

    def _look(self) -> list[Any]:
        """Return what the plan was built for, to be compared."""
        seen: list[Any] = []
        for group in self.param_groups:
            # what states there are
            seen += bool(group.get("momentum")), *map(group.get, SWITCHES)
            for param in group["params"]:
                seen += id(param), _place(param), self._in_backward and param.requires_grad
        for param, entry in self.state.items():
            for key, held in entry.items():
                seen += id(param), key, id(held) if key == "step" else _place(held)
        return seen

    def _build(self, *, loaded: bool = False) -> None:
        """Build a plan for the tensors as they are, going on from what `state` holds.

        What was loaded may be another optimizer's, with masters in another form or none.
        """
        histories = None if loaded else self._histories     # what is loaded is up to date
        if not loaded and histories is None:
            self.catch_up()
        self._plan = None
        self._owners: list[_Owner] = []
        names = [name for group in self.param_groups for name in group.get("param_names") or ()]
        if len(set(names)) != sum(len(group["params"]) for group in self.param_groups):
            names = []              # they name nothing: errors tell parameters by their indices
        groups = []
        for group in self.param_groups:
            params: list[torch.Tensor] = []
            for param in group["params"]:
                i = len(self._owners)
                label = f"params[{i}] ({names[i]!r})" if names else f"params[{i}]"
                owner, stepped = _owned(param, group, label)
                self._owners.append(owner)
                params.append(stepped)
            own_names = group["param_names"] if names else None
            groups.append({**self._options(group), "params": params, "param_names": own_names})
        options = self._own_numbers()
        lasting = [{key: group[key] for key in STORAGE if key in group} for group in groups]
        for g, (was, now) in enumerate(zip(self._lasting, lasting, strict=False)):
            if was != now:
                raise ValueError(
                    f"param_groups[{g}] must keep {was!r} as the optimizer was built, got {now!r}"
                )
        if not self._owners:
            return
        ema_decay = options.pop("ema_decay")
        plan = self._core(groups, **options)
        used, steps, of_each = plan._states_in_use, self._steps_of(plan), _of_each(groups)
        states: dict[str, list[Any]] = {
            name: [None] * len(self._owners) for name in plan._state_names}
        masters: list[tuple[int, dict[str, Any], str, Any]] = []
        entries: list[dict[str, Any]] = [{"first_step": True} for _ in self._owners]
        changed: list[tuple[dict[str, Any], str, torch.Tensor | None]] = []
        for i, owner in enumerate(self._owners):
            lazy = torch.nn.parameter.is_lazy(owner.param)
            held = {} if lazy else self.state.get(owner.param, {})
            keys = {owner.key_of(name): name for name in plan._state_names}
            if steps is not None and any(key in keys for key in held):
                entries[i].update(self._count_in(held, f"state[{i}]", of_each[i]))
                changed.append((held, "step", steps[i]))
                for key in map(owner.key_of, used[i]):
                    if key not in BEGUN_LATE and held.get(key) is None:
                        raise KeyError(f"state[{i}] must have {key!r} beside 'step', got "
                                       f"{list(held)!r}")
            for key, old in held.items():
                where = f"state[{i}][{key!r}]"
                if key == "step" and steps is not None:
                    continue
                if key not in {*keys, *MASTER_KEYS.values()} and (
                    key != "ema" or ema_decay is None
                ):
                    convention = owner.group.get("lr_in_velocity")
                    raise ValueError(
                        f"{where} is nothing to go on from with ema_decay={ema_decay!r}"
                        + ("" if convention is None else f" and lr_in_velocity={convention!r}")
                    )
                if old is None:
                    continue
                dtype = getattr(old, "dtype", None)
                if loaded and key == "low_bits" and dtype == owner.param.dtype:
                    changed.append((held, key, None))   # PyTorch has cast it, as all it loads
                    continue
                tensor = owner.steppable(key, old, where)
                if tensor is not old:
                    changed.append((held, key, tensor))
                if key == "ema":
                    entries[i]["ema"] = owner.turned(tensor).detach().numpy()
                elif key in keys:
                    if keys[key] in used[i]:
                        states[keys[key]][i] = _as_array(owner.turned(tensor))
                    entries[i]["first_step"] = False
                else:
                    masters.append((i, held, key, owner.turned(tensor).detach().numpy()))
        for name, arrays in states.items():
            if any(array is not None for array in arrays):
                plan._lend_states(name, arrays)
        lent: list[Any] = [None] * len(self._owners)
        for i, held, key, array in masters:
            owner, own = self._owners[i], plan._masters[i]
            wanted = None if own is None else MASTER_KEYS[own.dtype]
            if key == wanted:
                lent[i] = array.view(own.dtype)
            elif not loaded:
                raise ValueError(
                    f"state[{i}][{key!r}] is nothing to go on from with "
                    f"master={owner.group['master']!r} and {owner.param.dtype}: "
                    f"del opt.state[p][{key!r}] steps from the parameter as it is"
                )
            else:
                changed.append((held, key, None))
                if wanted is not None and wanted not in held and (
                    owner.param.dtype == torch.bfloat16
                ):
                    lent[i] = owner.converted(key, array)
                    changed.append((held, wanted, owner.lent(lent[i])))
        plan._lend_masters(lent)
        plan.ema_decay = ema_decay      # averages begin at the masters
        plan._restore(plan.param_groups, entries, {}, (self._applied, 0))
        if histories is not None:
            plan._take_histories(histories)
        # Nothing from here on can fail
        self._histories, self._lasting = None, lasting
        for held, key, new in changed:
            if new is None:
                del held[key]
            else:
                held[key] = new
        if ema_decay is not None:
            for owner, entry in zip(self._owners, plan._state, strict=True):
                if not torch.nn.parameter.is_lazy(owner.param):
                    self.state[owner.param]["ema"] = owner.lent(entry["ema"])
        self._waiting = [
            i for i in range(len(self._owners))
            if any(states[name][i] is None for name in used[i])
            or (lent[i] is None and plan._masters[i] is not None)
        ]
        self._places = {owner.param: i for i, owner in enumerate(self._owners)}
        if self._starts_at_once:
            self._publish(plan, [i for i in self._waiting if not torch.nn.parameter.is_lazy(
                self._owners[i].param)])
        self._hook()
        self._seen = self._look()
        self._plan = plan

    def _steps_of(self, plan: Optimizer) -> Any:
        """Return the plan's count of steps of each parameter, for `state` to have; or None."""
        counts = plan._count_array
        return None if counts is None else torch.from_numpy(counts)[:, 0]

    def _count_in(
        self, held: Mapping[str, Any], where: str, options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return what the plan has of a parameter's steps, from what `state` has."""
        if "step" not in held:
            raise KeyError(f"{where} must have a 'step', got {list(held)!r}")
        step = held["step"]
        if isinstance(step, torch.Tensor) and step.numel() == 1:
            step = step.item()
        if isinstance(step, float) and step.is_integer():
            step = int(step)
        count = int(saved_number({"step": step}, "step", where))
        return {"step": count, **self._powers(options, count)}

    def _powers(self, options: Mapping[str, Any], step: int) -> dict[str, float]:
        """Return the products of betas by which averages are corrected after so many steps."""
        return {}

    def _follow_counts(self, plan: Optimizer) -> None:
        """Take over counts that were edited in `state`, and the powers of the betas of now."""
        counts = plan._count_array
        if counts is None:
            return
        betas = [(group.get("beta1"), group.get("beta2")) for group in plan.param_groups]
        if betas == self._betas_seen and np.array_equal(counts, self._counts_seen):
            return
        found = [
            self._count_in({"step": float(row[0])}, f"state[{i}]", options)
            for i, (row, options) in enumerate(
                zip(counts, _of_each(plan.param_groups), strict=True))
        ]
        for row, numbers in zip(counts, found, strict=True):
            row[: len(numbers)] = [*numbers.values()]
        self._betas_seen = betas

    def _note_counts(self, plan: Optimizer) -> None:
        """Remember the counts that a step has left, to see whether they are edited."""
        if plan._count_array is not None:
            self._counts_seen = plan._count_array.copy()

    def _publish(self, plan: Optimizer, started: list[int]) -> None:
        """Put into `state` what a first gradient has brought into use."""
        entries, masters = plan._state, plan._masters
        used, steps = plan._states_in_use, self._steps_of(plan)
        for i in started:
            owner = self._owners[i]
            held = self.state[owner.param]
            if steps is not None:
                held["step"] = steps[i]
            for name in used[i]:
                if held.get(owner.key_of(name)) is None:
                    held[owner.key_of(name)] = owner.lent(entries[i][name])
            master = masters[i]
            if master is not None and held.get(MASTER_KEYS[master.dtype]) is None:
                held[MASTER_KEYS[master.dtype]] = owner.lent(master)
        self._waiting = [i for i in self._waiting if i not in started]
        self._seen = self._look()


class _AdamOptions(AdaptiveOptions):
    """Adam's, by PyTorch's names."""

    betas = GroupOption()
    amsgrad = GroupOption()


_ADAM_OPTIONS = {
    **{name: default for name, default in GROUP_OPTIONS["adam"].items()
       if name not in ("beta1", "beta2")},
    "betas": (0.9, 0.999),
}


class SGD(_Optimizer, SGDOptions):
    """``torch.optim.SGD`` in one fused pass over tensors on the CPU.

    Parameters
    ----------
    params : iterable of tensors, of (name, tensor) pairs, or of group dictionaries
        As ``torch.optim.SGD`` takes them. Tensors are dense, float32, float64, bfloat16 or
        float16, and updated in place, of a DTensor the part on this rank; the half types are
        stepped in float32. Lazy parameters join when they are materialised.
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
    foreach, differentiable, fused : None or False
        Taken for compatibility; True is refused, for there is one way to run, and a step cannot
        be differentiated.
    decoupled_weight_decay, lr_in_velocity, clip_value, dampen_first, flush_subnormals
        As in `optcore.SGD`, each with a star.
    max_norm, skip_nonfinite
        As in `optcore.SGD`, over the parameters of all groups; refused with DTensors.
    ema_decay : float in [0, 1), optional
        As in `optcore.SGD`, but no callable; the averages are in ``state[param]["ema"]``.
    master : {"auto", "split", "float32"} or None, default "auto"
        As in `optcore.SGD`, with a star. What is kept of a half parameter's float32 is, from its
        first gradient on, in its state: ``"low_bits"``, int16, for split, ``"master"``, float32.
    rounding : {"stochastic", "nearest"}, default "stochastic"
        As in `optcore.SGD`, with a star.
    velocity_dtype : {"float32", "bfloat16"}, a dtype of those names or None, default None
        As in `optcore.SGD`, with a star: None is float32 for half parameters, too.
    lazy : {"exact", "rows"}, default "exact"
        As in `optcore.SGD`, with a star, for sparse gradients (``Embedding(sparse=True)``). With
        "exact" rows are brought up to date when an ``Embedding`` or ``EmbeddingBag`` is about to
        read them, when they are stepped, for state dictionaries, and by `catch_up`.
    seed : int in [0, 2**64), default 0
        As in `optcore.SGD`.
    step_in_backward : bool or DistributedDataParallel, default False
        Step each parameter inside ``backward()``, as soon as it has its gradient, and free that;
        ``step()`` then steps what else has a gradient and ends the step. Parameters of a
        DistributedDataParallel model need the model itself here, since their gradients must be
        averaged first.

    Attributes
    ----------
    lr, momentum, …, max_norm, skip_nonfinite, ema_decay, seed
        Every option, to be read and set between steps; those with a star over all groups.

    Raises
    ------
    TypeError, ValueError
        For what is not supported or out of range. Parameters on a GPU, sparse, complex, negated or
        of another dtype are refused, naming the parameter where names were given. `master` and
        `velocity_dtype` stay as the optimizer was built. With `step_in_backward`, `max_norm` and
        `skip_nonfinite`, which need all gradients before the first parameter is stepped.
    RuntimeError
        With `step_in_backward`, from ``backward()``, for a second gradient of a parameter that is
        stepped already; from ``step()`` under a GradScaler; and for what changes, saves or copies
        the optimizer between ``backward()`` and ``step()``.

    Notes
    -----
    An option that bears a star may stand in a group and be edited between steps. Keys and
    attributes that nobody would read are refused.

    ``state[param]["momentum_buffer"]`` is the velocity itself, not a copy, and appears with the
    parameter's first gradient; a tensor put there is stepped itself. Under ``lr_in_velocity`` it is
    called ``"velocity"``, since no other optimizer could go on from it.

    Examples
    --------
    >>> import torch, optcore.torch
    >>> model = torch.nn.Linear(3, 1)
    >>> opt = optcore.torch.SGD(model.parameters(), lr=0.1, momentum=0.9)
    >>> model(torch.ones(2, 3)).sum().backward()
    >>> opt.step()
    """

    _core = optcore.SGD
    _group_options = GROUP_OPTIONS["sgd"]
    _own_keys = frozenset({"lr", "momentum", "dampening", "weight_decay"})

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
        dampen_first: bool = False,
        flush_subnormals: bool = False,
        max_norm: float | None = None,
        skip_nonfinite: bool = False,
        ema_decay: float | None = None,
        master: str | None = "auto",
        rounding: str = "stochastic",
        velocity_dtype: Any = None,
        lazy: str = "exact",
        seed: int = 0,
        step_in_backward: bool | torch.nn.parallel.DistributedDataParallel = False,
    ) -> None:
        self._start(locals())


class Adagrad(_Optimizer, AdaGradOptions):
    """``torch.optim.Adagrad`` in one fused pass over tensors on the CPU.

    Parameters
    ----------
    params : iterable of tensors, of (name, tensor) pairs, or of group dictionaries
        As for `SGD`.
    lr : float or one-element tensor >= 0, default 1e-2
        Learning rate*.
    lr_decay : float >= 0, default 0
        Its decay*: a parameter's t-th step is taken with ``lr / (1 + (t - 1) * lr_decay)``.
    weight_decay : float >= 0, default 0
        λ*.
    initial_accumulator_value : float >= 0, default 0
        What sums of squares begin with*.
    eps : float >= 0, default 1e-10
        ε*.
    maximize, decoupled_weight_decay
        As in `SGD`, each with a star.
    foreach, differentiable, fused, capturable : None or False
        Taken for compatibility, where PyTorch has them; True is refused.
    eps_in_sqrt, state_dtype, clip_value, flush_subnormals, master, rounding, lazy
        As in `optcore.AdaGrad`, each with a star.
    max_norm, skip_nonfinite, ema_decay, seed, step_in_backward
        As in `SGD`.

    Raises
    ------
    KeyError, TypeError, ValueError, RuntimeError
        As `SGD`.

    Notes
    -----
    ``state[param]`` has PyTorch's keys, and states of either class are gone on from by the other.
    """

    _core = optcore.AdaGrad
    _group_options = GROUP_OPTIONS["adagrad"]
    _own_keys = frozenset({"lr", "lr_decay", "initial_accumulator_value", "eps"})
    _starts_at_once = True      # as PyTorch's does, which goes on from no parameter without

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        eps_in_sqrt: bool = False,
        clip_value: float | None = None,
        flush_subnormals: bool = False,
        max_norm: float | None = None,
        skip_nonfinite: bool = False,
        ema_decay: float | None = None,
        master: str | None = "auto",
        rounding: str = "stochastic",
        state_dtype: Any = None,
        lazy: str = "exact",
        seed: int = 0,
        step_in_backward: bool | torch.nn.parallel.DistributedDataParallel = False,
    ) -> None:
        self._start(locals())


class RMSprop(_Optimizer, RMSPropOptions):
    """``torch.optim.RMSprop`` in one fused pass over tensors on the CPU.

    Parameters
    ----------
    params : iterable of tensors, of (name, tensor) pairs, or of group dictionaries
        As for `SGD`.
    lr : float or one-element tensor >= 0, default 1e-2
        Learning rate*.
    alpha : float in [0, 1), default 0.99
        Decay of the averages*.
    eps : float >= 0, default 1e-8
        ε*.
    weight_decay : float >= 0, default 0
        λ*.
    momentum : float in [0, 1), default 0
        ρ*.
    centered : bool, default False
        Divide by the root of the gradients' variance*.
    maximize, decoupled_weight_decay, nesterov, lr_in_velocity
        As in `optcore.RMSProp`, each with a star.
    foreach, differentiable, fused, capturable : None or False
        Taken for compatibility, where PyTorch has them; True is refused.
    eps_in_sqrt, state_dtype, clip_value, flush_subnormals, master, rounding, lazy
        As in `optcore.RMSProp`, each with a star.
    max_norm, skip_nonfinite, ema_decay, seed, step_in_backward
        As in `SGD`.

    Raises
    ------
    KeyError, TypeError, ValueError, RuntimeError
        As `SGD`.

    Notes
    -----
    ``state[param]`` has PyTorch's keys, and states of either class are gone on from by the other.
    Where rounding makes a variance negative it counts as 0 here; PyTorch's root of it is NaN.
    """

    _core = optcore.RMSProp
    _group_options = GROUP_OPTIONS["rmsprop"]
    _own_keys = frozenset({"lr", "alpha", "eps", "centered", "momentum"})

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        decoupled_weight_decay: bool = False,
        nesterov: bool = False,
        lr_in_velocity: bool = False,
        eps_in_sqrt: bool = False,
        clip_value: float | None = None,
        flush_subnormals: bool = False,
        max_norm: float | None = None,
        skip_nonfinite: bool = False,
        ema_decay: float | None = None,
        master: str | None = "auto",
        rounding: str = "stochastic",
        state_dtype: Any = None,
        lazy: str = "exact",
        seed: int = 0,
        step_in_backward: bool | torch.nn.parallel.DistributedDataParallel = False,
    ) -> None:
        self._start(locals())


class Adam(_Optimizer, _AdamOptions):
    """``torch.optim.Adam`` in one fused pass over tensors on the CPU.

    Parameters
    ----------
    params : iterable of tensors, of (name, tensor) pairs, or of group dictionaries
        As for `SGD`.
    lr : float or one-element tensor >= 0, default 1e-3
        Learning rate*.
    betas : pair of floats in [0, 1), default (0.9, 0.999)
        β₁ and β₂*.
    eps : float >= 0, default 1e-8
        ε*.
    weight_decay : float >= 0, default 0
        λ*.
    amsgrad : bool, default False
        Divide by the root of the greatest average of squares there was*.
    maximize, decoupled_weight_decay
        As in `SGD`, each with a star.
    foreach, differentiable, fused, capturable : None or False
        Taken for compatibility, where PyTorch has them; True is refused.
    eps_in_sqrt, state_dtype, clip_value, flush_subnormals, master, rounding, lazy
        As in `optcore.Adam`, each with a star.
    max_norm, skip_nonfinite, ema_decay, seed, step_in_backward
        As in `SGD`.

    Raises
    ------
    KeyError, TypeError, ValueError, RuntimeError
        As `SGD`.

    Notes
    -----
    ``state[param]`` has PyTorch's keys, and states of either class are gone on from by the other.
    As in PyTorch averages are corrected by the betas of now to the number of steps, multiplied one
    by one; where the betas stay that is what `optcore.Adam` does.
    """

    _core = optcore.Adam
    _group_options = _ADAM_OPTIONS
    _own_keys = frozenset({"lr", "betas", "eps", "amsgrad"})

    def _powers(self, options: Mapping[str, Any], step: int) -> dict[str, float]:
        return {f"{beta}_power": _power(float(options[beta]), step) for beta in ("beta1", "beta2")}

    def _spelled(self, group: Mapping[str, Any]) -> dict[str, Any]:
        betas = group["betas"]
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise TypeError(f"betas must be a pair of numbers, got {betas!r}")
        others = {key: group[key] for key in self._group_options if key != "betas"}
        return {**others, "beta1": betas[0], "beta2": betas[1]}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        eps_in_sqrt: bool = False,
        clip_value: float | None = None,
        flush_subnormals: bool = False,
        max_norm: float | None = None,
        skip_nonfinite: bool = False,
        ema_decay: float | None = None,
        master: str | None = "auto",
        rounding: str = "stochastic",
        state_dtype: Any = None,
        lazy: str = "exact",
        seed: int = 0,
        step_in_backward: bool | torch.nn.parallel.DistributedDataParallel = False,
    ) -> None:
        self._start(locals())


class AdamW(Adam):
    """``torch.optim.AdamW`` in one fused pass over tensors on the CPU.

    Parameters
    ----------
    params, lr, betas, eps, amsgrad, maximize
        As for `Adam`.
    weight_decay : float >= 0, default 1e-2
        λ*.
    decoupled_weight_decay : bool, default True
        In `Adam` False is the default.
    foreach, differentiable, fused, capturable : None or False
        Taken for compatibility, where PyTorch has them; True is refused.
    eps_in_sqrt, state_dtype, clip_value, flush_subnormals, master, rounding, lazy
        As in `optcore.Adam`, each with a star.
    max_norm, skip_nonfinite, ema_decay, seed, step_in_backward
        As in `SGD`.

    Raises
    ------
    KeyError, TypeError, ValueError, RuntimeError
        As `SGD`.
    """

    _core = optcore.AdamW

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = True,
        eps_in_sqrt: bool = False,
        clip_value: float | None = None,
        flush_subnormals: bool = False,
        max_norm: float | None = None,
        skip_nonfinite: bool = False,
        ema_decay: float | None = None,
        master: str | None = "auto",
        rounding: str = "stochastic",
        state_dtype: Any = None,
        lazy: str = "exact",
        seed: int = 0,
        step_in_backward: bool | torch.nn.parallel.DistributedDataParallel = False,
    ) -> None:
        self._start(locals())
