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
from optcore.functional import momentum_step, nesterov_step


class SGDOptimizer(_stochastic_optimizers.SGDOptimizer):  # type: ignore[misc]
    """scikit-learn's ``SGDOptimizer``, with the update in one fused pass.

    The learning rate, its three schedules and the stopping rule are inherited. The same bits
    come out, in float32 and float64; `velocities` are updated in place, where scikit-learn
    makes new arrays at each step. Gradients of another dtype than their parameters, which
    ``MLPRegressor`` has for float32 X and float64 y, go scikit-learn's own way.

    Parameters
    ----------
    params : list of numpy.ndarray
        coefs_ and intercepts_; only their shapes and dtypes are taken here.
    learning_rate_init : float > 0, default 0.1
        The first learning rate.
    lr_schedule : {'constant', 'adaptive', 'invscaling'}, default 'constant'
        How `learning_rate` changes, as scikit-learn documents it.
    momentum : float in [0, 1), default 0.9
        ρ. scikit-learn also takes 1, which `update_params` refuses.
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
    """

    def __init__(
        self,
        params: Sequence[np.ndarray],
        learning_rate_init: float = 0.1,
        lr_schedule: str = "constant",
        momentum: float = 0.9,
        nesterov: bool = True,
        power_t: float = 0.5,
    ) -> None:
        super().__init__([], learning_rate_init, lr_schedule, momentum, nesterov, power_t)
        self.velocities = allocate_like(params)

    def update_params(self, params: Sequence[np.ndarray], grads: Sequence[np.ndarray]) -> None:
        """Take one step, in place.

        Parameters
        ----------
        params, grads : lists of numpy.ndarray
            In the order of construction. A gradient in another memory order than its
            parameter's is copied into that.

        Raises
        ------
        TypeError, ValueError
            As `optcore.momentum_step`; ValueError also for another number of arrays. The
            parameters before the one at fault have been updated then.
        """
        if not len(params) == len(grads) == len(self.velocities):
            raise ValueError(
                f"params and grads must hold {len(self.velocities)} arrays, "
                f"got {len(params)} and {len(grads)}"
            )
        if any(not param.dtype == grad.dtype == velocity.dtype for param, grad, velocity
               in zip(params, grads, self.velocities, strict=True)):
            super().update_params(params, grads)
            return
        step = nesterov_step if self.nesterov else momentum_step
        for param, grad, velocity in zip(params, grads, self.velocities, strict=True):
            step(
                param, np.asarray(grad, order="C" if param.flags.c_contiguous else "F"), velocity,
                lr=self.learning_rate, momentum=self.momentum, lr_in_velocity=True,
            )


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
    def _fit_stochastic(self, *args: Any, **kwargs: Any) -> Any:
        with patched():
            return super()._fit_stochastic(*args, **kwargs)  # type: ignore[misc]


class MLPClassifier(_Patched, neural_network.MLPClassifier):  # type: ignore[misc]
    """scikit-learn's ``MLPClassifier``; ``solver="sgd"`` is `SGDOptimizer`, in any process."""


class MLPRegressor(_Patched, neural_network.MLPRegressor):  # type: ignore[misc]
    """scikit-learn's ``MLPRegressor``; ``solver="sgd"`` is `SGDOptimizer`, in any process."""
