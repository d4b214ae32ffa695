"""Measurements: every update in every figure is made here or in a row, by a rule of `rules`."""
from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lecture.rules import Adaptive, Constants, Rule
from lecture.theory import spectral_radius

Array = np.ndarray
Gradient = Callable[[Array], Array]
Step = Callable[[Array, Array, int], None]   # of x and its gradient, the t-th

BLOCK = 50   # steps between renormalisations: no state leaves float64's range within one


def trajectory(
    rule: Rule, gradient: Gradient, start: Array, *, lr: float, momentum: float, steps: int
) -> Array:
    """Return the parameters after 0..steps steps, shape ``(steps + 1, *start.shape)``."""
    x = np.array(start, dtype=float)
    v = np.zeros_like(x)
    path = np.empty((steps + 1, *x.shape))
    path[0] = x
    for k in range(steps):
        rule.step(x, gradient(x), v, lr, momentum)
        path[k + 1] = x
    return path


def adaptive_trajectory(
    rule: Adaptive, gradient: Gradient, start: Array, constants: Constants, *, steps: int
) -> Array:
    """Return the same of an adaptive rule."""
    x = np.array(start, dtype=float)
    states = np.zeros((2, *x.shape))
    path = np.empty((steps + 1, *x.shape))
    path[0] = x
    for t in range(1, steps + 1):
        rule.step(x, gradient(x), states, t, constants)
        path[t] = x
    return path


def spectrum(kappa: float, n: int = 25) -> Array:
    """Return n eigenvalues from 1/kappa to 1, evenly spaced in their logarithm."""
    return np.geomspace(1 / kappa, 1, n)


def contraction(
    rule: Rule, curvatures: Array, *, lr: float, momentum: float, steps: int = 1000
) -> Array:
    """Measure the contraction per step on each eigenvalue of a quadratic.

    The optimizer runs from (x, v) = (1, 0) and from (0, 1); the two ends are the columns of the
    map that many steps make, and the n-th root of its spectral radius is the contraction. The
    plain decay of the error would do as well where the matrix can be diagonalised. At
    textbook-optimal momentum it cannot: there the error falls as k·rᵏ, and a slope fitted to it
    is off by 1/k. The state is rescaled as it goes, which a homogeneous loss allows.
    """
    curvatures = np.asarray(curvatures, dtype=float)
    x, v = np.zeros((2, curvatures.size)), np.zeros((2, curvatures.size))
    x[0] = 1
    v[1] = rule.name != "sgd"
    log_scale = np.zeros(curvatures.size)
    for _ in range(steps // BLOCK):
        for _ in range(BLOCK):
            rule.step(x, curvatures * x, v, lr, momentum)
        size = np.maximum(np.abs(x), np.abs(v)).max(axis=0)
        size[size == 0] = 1   # an eigenvalue that a few steps solve exactly
        x /= size
        v /= size
        log_scale += np.log(size)
    radius = spectral_radius(np.stack([x.T, v.T], axis=-2))
    with np.errstate(divide="ignore"):
        return np.exp((np.log(radius) + log_scale) / (steps // BLOCK * BLOCK))


def steps_to(
    rule: Rule, curvatures: Array, *, lr: float, momentum: float, accuracy: float
) -> float:
    """Count the steps until the error is `accuracy` times that of the start; inf if it blows up."""
    x = np.ones_like(curvatures)
    v, g = np.zeros_like(x), np.empty_like(x)
    target, blown_up = accuracy**2 * x.size, x.size / accuracy**2
    steps = 0
    while (error := x @ x) > target:
        if error > blown_up:
            return np.inf
        np.multiply(curvatures, x, out=g)
        rule.step(x, g, v, lr, momentum)
        steps += 1
    return steps


def valleys(angle: float, kappas: Array) -> tuple[Array, Array]:
    """Return Hessians of eigenvalues 1/κ and 1, turned by an angle, and (1, 1) turned with them."""
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return np.stack([turn * [1 / kappa, 1] @ turn.T for kappa in kappas]), turn @ [1.0, 1.0]


def valley_steps(step: Step, hessians: Array, start: Array, *, accuracy: float) -> Array:
    """Count the same for each of several Hessians ``(k, n, n)``, all of which have to get there."""
    x = np.tile(start, (len(hessians), 1))
    steps, t = np.zeros(len(hessians)), 0
    while not steps.all():
        t += 1
        step(x, np.einsum("kij,kj->ki", hessians, x), t)
        steps[(steps == 0) & (np.einsum("ki,ki->k", x, x) <= accuracy**2 * (start @ start))] = t
    return steps


def converges(rule: Rule, curvature: float, *, lr: float, momentum: float, steps: int) -> bool:
    """Whether the state has shrunk after so many steps, or clearly before."""
    x, v = np.ones(1), np.zeros(1)
    start = None
    for _ in range(0, steps, BLOCK):
        for _ in range(BLOCK):
            rule.step(x, curvature * x, v, lr, momentum)
        size = np.hypot(x[0], lr * v[0])
        start = start or size   # after the first block, when the transient is over
        if not 1e-6 < size / start < 1e6:
            break
    return bool(size < start)


def stability_edge(
    rule: Rule, curvature: float, *, momentum: float, share: float = 1e-4, steps: int = 20_000
) -> float:
    """Find the largest learning rate that converges, by bisection, to a share of itself."""
    low, high = 0.1 / curvature, 8 / curvature
    while high - low > share * low:
        middle = (low + high) / 2
        if converges(rule, curvature, lr=middle, momentum=momentum, steps=steps):
            low = middle
        else:
            high = middle
    return (low + high) / 2


def sign_changes(
    rule: Rule, curvatures: Array, *, lr: float, momentum: float, steps: int = 5000
) -> Array:
    """Measure how often per step x changes its sign, on each eigenvalue."""
    curvatures = np.asarray(curvatures, dtype=float)
    x, v = np.ones_like(curvatures), np.zeros_like(curvatures)
    before, changes = x > 0, np.zeros(x.shape)
    for k in range(1, steps + 1):
        rule.step(x, curvatures * x, v, lr, momentum)
        after = x > 0
        changes += after != before
        before = after
        if k % BLOCK == 0:
            size = np.maximum(np.abs(x), np.abs(v))
            size[size == 0] = 1
            x /= size
            v /= size
    return changes / steps


def first_overshoot(path: Array) -> Array:
    """Return how far paths ``(steps, n)`` from 1 swing past 0 the first time, 0 if they do not."""
    beyond = path < 0
    entered = np.cumsum(np.diff(beyond.astype(int), axis=0, prepend=0) == 1, axis=0)
    return np.where(beyond & (entered == 1), -path, 0).max(axis=0)


def exponent(x: Array, y: Array) -> float:
    """Return the slope of the straight line through ln y over ln x; NaN if y is not finite."""
    if not np.all(np.isfinite(y)):
        return np.nan
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def variance(samples: Array) -> tuple[float, float]:
    """Return the variance of independent samples and its standard error."""
    deviations = (samples - samples.mean()) ** 2
    return float(deviations.mean()), float(deviations.std() / np.sqrt(deviations.size))
