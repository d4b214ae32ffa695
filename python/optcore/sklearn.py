"""scikit-learn's perceptrons on optcore's step: ``SGDOptimizer``, ``patched()`` and two classes.

scikit-learn takes its optimizer from a private module and has no option for another. So what is
replaced is first checked to be what this module knows, and `RuntimeError` is raised where it
is not.
"""
from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Iterator, Sequence
from typing import Any

try:
    from sklearn import neural_network
    from sklearn.neural_network import (
        _multilayer_perceptron,
        _stochastic_optimizers,
    )
except ImportError as error:
    raise ImportError(
        "optcore.sklearn needs scikit-learn, which is not installed: "
        "pip install 'optcore[sklearn]'"
    ) from error

import numpy as np

from optcore._arena import allocate_like
from optcore.sgd import SGD


class _Momentum(SGD):
    _rule = "momentum"


class _Nesterov(SGD):
    _rule = "nesterov"


def _is_plain(array: Any) -> bool:
    """Whether an array is one that optcore steps and whose operators are NumPy's own."""
    return type(array) is np.ndarray and array.dtype.char in "fd"


class SGDOptimizer(_stochastic_optimizers.SGDOptimizer):  # type: ignore[misc]
    """scikit-learn's ``SGDOptimizer``, with the update in one fused pass.

    The learning rate, its three schedules and the stopping rule are inherited. The same bits
    come out, in float32 and float64; `velocities` are updated in place, where scikit-learn
    makes new arrays at each step. What optcore does not step is stepped as scikit-learn does
    it: a rate or a momentum that rounds to 0 in float32, ``momentum=1``, gradients that share
    memory with parameters, and what NumPy computes in another dtype than the parameter's
    (gradients in float64, which ``MLPRegressor`` has for float32 X and float64 y, or a
    ``numpy.float64`` as momentum, of float32 parameters).

    Attributes that nothing reads cannot be set; a subclass declares its own in its class.

    Parameters
    ----------
    params : list of numpy.ndarray
        ``coefs_`` and ``intercepts_``; only their shapes and dtypes are taken here.
    learning_rate_init : float > 0, default 0.1
        The first learning rate.
    lr_schedule : {'constant', 'adaptive', 'invscaling'}, default 'constant'
        How `learning_rate` changes, as scikit-learn documents it.
    momentum : float in [0, 1], default 0.9
        ρ.
    nesterov : bool, default True
        Nesterov momentum.
    power_t : float, default 0.5
        Exponent of the 'invscaling' schedule.

    Attributes
    ----------
    learning_rate : float
        As it is now.
    velocities : list of numpy.ndarray
        One for each parameter.

    Raises
    ------
    AttributeError
        When an attribute is set that nothing reads.
    ValueError
        For another `lr_schedule`.
    """

    # The plan over the arrays of the last step, and these arrays.
    _plan: SGD | None = None
    _planned: tuple[Any, ...] = ()
    _complete = False       # so that no more attributes are taken

    def __init__(
        self,
        params: Sequence[np.ndarray],
        learning_rate_init: float = 0.1,
        lr_schedule: str = "constant",
        momentum: float = 0.9,
        nesterov: bool = True,
        power_t: float = 0.5,
    ) -> None:
        plain = all(map(_is_plain, params))
        super().__init__(
            [] if plain else params, learning_rate_init, lr_schedule, momentum, nesterov, power_t
        )
        if plain:
            self.velocities = allocate_like(params)
        self._complete = True

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse what nothing would read."""
        if self._complete and not name.startswith("_") and not hasattr(self, name):
            raise AttributeError(
                f"{type(self).__name__} has no attribute {name!r}, and nothing would read it; it "
                f"has {', '.join(key for key in vars(self) if not key.startswith('_'))}"
            )
        if name == "lr_schedule" and value not in ("constant", "adaptive", "invscaling"):
            raise ValueError(
                f"lr_schedule must be 'constant', 'adaptive' or 'invscaling', got {value!r}"
            )
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        """Return everything but the plan, which the next step makes again."""
        return {key: value for key, value in vars(self).items()
                if key not in ("_plan", "_planned")}

    def __copy__(self) -> SGDOptimizer:
        """Return one with velocities of its own, as the next step would give scikit-learn's."""
        new = type(self).__new__(type(self))
        new.__dict__.update(self.__getstate__(), velocities=[v.copy() for v in self.velocities])
        return new

    def update_params(self, params: Sequence[np.ndarray], grads: Sequence[np.ndarray]) -> None:
        """Take one step, in place.

        Parameters
        ----------
        params, grads : lists of numpy.ndarray
            In the order of construction.

        Raises
        ------
        TypeError, ValueError
            For another number of arrays, what is no array, and what scikit-learn's own step
            refuses. Nothing has changed then.
        """
        if not len(params) == len(grads) == len(self.velocities):
            raise ValueError(
                f"params and grads must hold {len(self.velocities)} arrays, "
                f"got {len(params)} and {len(grads)}"
            )
        for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
            if not isinstance(param, np.ndarray):
                raise TypeError(f"params[{i}] must be a numpy.ndarray, got {type(param).__name__}")
            if np.shape(grad) != param.shape:
                _check_shape(param, grad, i)
        if self._computes_as_optcore(params, grads):
            try:
                self._plan_over(params).step(grads)
                return
            except (TypeError, ValueError):
                pass    # optcore does not step it, and has changed nothing
        self._step_as_theirs(params, grads)

    def _computes_as_optcore(self, params: Sequence[Any], grads: Sequence[Any]) -> bool:
        """Whether every operation of scikit-learn's is one in the dtype of its parameter."""
        arrays = zip(params, grads, self.velocities, strict=True)
        return (
            type(self)._get_updates is _Theirs._get_updates
            and all(_is_plain(param) and _is_plain(grad) and _is_plain(velocity)
                    and param.dtype == grad.dtype == velocity.dtype
                    for param, grad, velocity in arrays)
            and all(np.result_type(dtype, self.momentum, self.learning_rate) == dtype
                    for dtype in {param.dtype for param in params})
        )

    def _plan_over(self, params: Sequence[np.ndarray]) -> SGD:
        """Return the plan that steps these arrays with the options as they are now."""
        rule = _Nesterov if self.nesterov else _Momentum
        arrays = [*params, *self.velocities]
        if type(self._plan) is not rule or list(map(id, arrays)) != list(map(id, self._planned)):
            self._plan = rule(
                list(params), lr=self.learning_rate, momentum=self.momentum, lr_in_velocity=True,
                velocities=list(self.velocities),
            )
            self._planned = tuple(arrays)
        group = self._plan.param_groups[0]
        group["lr"], group["momentum"] = self.learning_rate, self.momentum
        return self._plan

    def _step_as_theirs(self, params: Sequence[np.ndarray], grads: Sequence[np.ndarray]) -> None:
        velocities, before = self.velocities, [param.copy() for param in params]
        try:
            super().update_params(params, grads)
        except BaseException:
            self.velocities = velocities
            for param, value in zip(params, before, strict=True):
                if param.flags.writeable:
                    param[...] = value
            raise


def _check_shape(param: np.ndarray, grad: Any, i: int) -> None:
    """Refuse a gradient that NumPy would not broadcast to its parameter."""
    try:
        np.broadcast_to(grad, param.shape)
    except ValueError:
        raise ValueError(
            f"grads[{i}] has shape {np.shape(grad)}; its parameter has {param.shape}: "
            "give grad.reshape(param.shape)"
        ) from None


_Theirs = _stochastic_optimizers.SGDOptimizer


def _check_scikit_learn() -> None:
    """Raise RuntimeError unless scikit-learn's optimizer is the one that is replaced here."""
    for name in ("__init__", "update_params"):
        theirs, ours = (
            list(inspect.signature(getattr(kind, name)).parameters.values())
            for kind in (_Theirs, SGDOptimizer)
        )
        if [(p.name, p.default) for p in theirs] != [(p.name, p.default) for p in ours]:
            raise _changed(f"SGDOptimizer.{name} takes {', '.join(map(str, theirs))}")
    call = "self._optimizer.update_params(params, grads)"
    if call not in inspect.getsource(neural_network.MLPClassifier._fit_stochastic):
        raise _changed(f"_fit_stochastic does not call {call}")
    if _multilayer_perceptron.SGDOptimizer not in (_Theirs, SGDOptimizer):
        raise _changed("the perceptrons have another SGDOptimizer")
    # What it computes is compared by its bits: 0.1 and 0.7 round, so any other order shows.
    for nesterov in (False, True):
        results = []
        for kind in (_Theirs, SGDOptimizer):
            params: list[np.ndarray] = [
                np.linspace(-1, 1, 7, dtype=np.float32), np.linspace(2, 3, 5)
            ]
            optimizer = kind(params, 0.1, "invscaling", 0.7, nesterov)
            for k in range(3):
                optimizer.update_params(params, [np.sin(param + k) for param in params])
                optimizer.iteration_ends(k)
            results.append(b"".join(a.tobytes() for a in [*params, *optimizer.velocities]))
        if results[0] != results[1]:
            raise _changed(f"SGDOptimizer with nesterov={nesterov} computes something else")


def _changed(what: str) -> RuntimeError:
    from sklearn import __version__

    return RuntimeError(
        f"scikit-learn {__version__} is not as optcore.sklearn knows it: {what}. "
        "Nothing has been replaced"
    )


_lock = threading.Lock()
_depth = 0


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """Let ``MLPClassifier`` and ``MLPRegressor`` with ``solver="sgd"`` use `SGDOptimizer`.

    It holds for all threads of this process until the outermost ``with`` ends, and for those
    optimizers only that ``fit`` or ``partial_fit`` makes meanwhile.

    Raises
    ------
    RuntimeError
        Where scikit-learn's optimizer has another interface or computes something else.

    Examples
    --------
    >>> import optcore.sklearn
    >>> from sklearn.neural_network import MLPRegressor
    >>> with optcore.sklearn.patched():
    ...     model = MLPRegressor(solver="sgd", max_iter=5).fit([[0.0], [1.0]], [0.0, 1.0])
    """
    global _depth
    with _lock:
        if not _depth:
            _check_scikit_learn()
            _multilayer_perceptron.SGDOptimizer = SGDOptimizer
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if not _depth:
                _multilayer_perceptron.SGDOptimizer = _Theirs


class _Patched:
    _settable: frozenset[str]

    def __init_subclass__(cls, **options: Any) -> None:
        """Note the parameters of all constructors that make an estimator."""
        super().__init_subclass__(**options)
        cls._settable = frozenset(
            name for base in cls.__mro__[:-1] if "__init__" in vars(base)
            for name in list(inspect.signature(base.__init__).parameters)[1:]   # type: ignore[misc]
        )

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse what nothing would read."""
        # By scikit-learn's convention names begin with _ where private, end with _ where fitted.
        if not (name.startswith("_") or name.endswith("_") or hasattr(type(self), name)
                or name in self._settable):
            raise AttributeError(
                f"{type(self).__name__} has no attribute {name!r}, and nothing would read it: "
                "get_params() has its parameters"
            )
        super().__setattr__(name, value)

    def _fit_stochastic(self, *args: Any, **kwargs: Any) -> Any:
        with patched():
            return super()._fit_stochastic(*args, **kwargs)  # type: ignore[misc]


class MLPClassifier(_Patched, neural_network.MLPClassifier):  # type: ignore[misc]
    """scikit-learn's ``MLPClassifier``; ``solver="sgd"`` is `SGDOptimizer`, in any process.

    Other solvers are scikit-learn's own. AttributeError is raised when an attribute is set that
    nothing reads; a subclass declares its own in its class.
    """


class MLPRegressor(_Patched, neural_network.MLPRegressor):  # type: ignore[misc]
    """scikit-learn's ``MLPRegressor``; ``solver="sgd"`` is `SGDOptimizer`, in any process.

    As `MLPClassifier`.
    """
