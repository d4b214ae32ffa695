"""What theory says, in closed form: nothing here takes a step.

On a quadratic every eigenvalue λ of the Hessian lives alone. One step maps (x, v) by a 2x2 matrix,
and everything the lecture says about quadratics is a property of that matrix: its spectral radius
is the contraction, radius 1 the edge of stability, its angle the zigzag, its powers the overshoot.
"""
from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lecture.rules import Constants

Array = np.ndarray


def block(rule: str, lr: float, momentum: float, curvature: Array | float) -> Array:
    """Return the iteration matrix of (x, v) on ½·curvature·x², shape ``(..., 2, 2)``."""
    h = np.asarray(curvature, dtype=float)
    one, zero = np.ones_like(h), np.zeros_like(h)
    if rule == "sgd":
        rows = [[1 - lr * h, zero], [zero, zero]]
    elif rule == "momentum":
        rows = [[1 - lr * h, -lr * momentum * one], [h, momentum * one]]
    elif rule == "nesterov":
        rows = [[1 - lr * h * (1 + momentum), -lr * momentum**2 * one], [h, momentum * one]]
    else:
        raise ValueError(f"rule must be sgd, momentum or nesterov, got {rule!r}")
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def spectral_radius(matrix: Array) -> Array:
    """Return the spectral radius of 2x2 matrices from trace and determinant.

    Explicit, because a general eigensolver loses half the digits on the defective matrices that
    textbook-optimal momentum has.
    """
    half_trace = (matrix[..., 0, 0] + matrix[..., 1, 1]) / 2
    determinant = (
        matrix[..., 0, 0] * matrix[..., 1, 1] - matrix[..., 0, 1] * matrix[..., 1, 0]
    )
    discriminant = half_trace**2 - determinant
    real = np.abs(half_trace) + np.sqrt(np.maximum(discriminant, 0))
    return np.where(discriminant < 0, np.sqrt(np.maximum(determinant, 0)), real)


def contraction(rule: str, lr: float, momentum: float, curvature: Array | float) -> Array:
    """Return the asymptotic factor per step by which the error shrinks, per eigenvalue."""
    return spectral_radius(block(rule, lr, momentum, curvature))


def textbook(rule: str, kappa: float) -> tuple[float, float]:
    """Return the optimal (lr, momentum) for eigenvalues in [1/kappa, 1].

    Polyak (1964) for momentum, Nesterov (2004, scheme 2.2.11) for his own.
    """
    root = np.sqrt(kappa)
    if rule == "sgd":
        return 2 / (1 + 1 / kappa), 0.0
    if rule == "momentum":
        return 4 / (1 + 1 / root) ** 2, ((root - 1) / (root + 1)) ** 2
    return 1.0, (root - 1) / (root + 1)


def nesterov_on_quadratics(kappa: float) -> tuple[float, float]:
    """Return the (lr, momentum) that is optimal for Nesterov on quadratics alone.

    Lessard, Recht and Packard (2016), table 1: contraction 1 - 2/√(3κ + 1).
    """
    root = np.sqrt(3 * kappa + 1)
    return 4 / (3 + 1 / kappa), (root - 2) / (root + 2)


def stability_edge(rule: str, momentum: float, curvature: float) -> float:
    """Return the largest learning rate that converges: where an eigenvalue reaches -1."""
    if rule == "sgd":
        return 2 / curvature
    if rule == "momentum":
        return 2 * (1 + momentum) / curvature
    return 2 * (1 + momentum) / ((1 + 2 * momentum) * curvature)


def sign_changes(rule: str, lr: float, momentum: float, curvature: Array | float) -> Array:
    """Return how often per step x changes its sign: the dominant eigenvalue's angle over π."""
    matrix = block(rule, lr, momentum, curvature)
    half_trace = np.trace(matrix, axis1=-2, axis2=-1) / 2
    determinant = np.linalg.det(matrix)
    spiral = half_trace**2 < determinant
    cosine = half_trace / np.sqrt(np.where(spiral, determinant, np.inf))
    return np.where(spiral, np.arccos(np.clip(cosine, -1, 1)) / np.pi, (half_trace < 0) * 1.0)


def modes(rule: str, lr: float, momentum: float, curvature: Array, steps: int) -> Array:
    """Return x after 0..steps steps from x = 1, v = 0 by Cayley-Hamilton, ``(steps + 1, n)``.

    The two-term recursion of the characteristic polynomial shares no code, no velocity and no
    order of operations with the rule itself.
    """
    matrix = block(rule, lr, momentum, np.asarray(curvature, dtype=float))
    trace = np.trace(matrix, axis1=-2, axis2=-1)
    determinant = np.linalg.det(matrix)
    x = np.empty((steps + 1, *trace.shape))
    x[0] = 1
    x[1] = matrix[..., 0, 0]
    for k in range(1, steps):
        x[k + 1] = trace * x[k] - determinant * x[k - 1]
    return x


def stationary_covariance(
    rule: str, lr: float, momentum: float, curvature: float, noise: float
) -> Array:
    """Return the 2x2 covariance of (x, v) under gradient noise of standard deviation `noise`.

    It solves C = M·C·Mᵀ + b·bᵀ, with b what one unit of gradient noise does to (x, v).
    """
    matrix = block(rule, lr, momentum, curvature)
    b = noise * np.array({
        "sgd": (-lr, 0.0),
        "momentum": (-lr, 1.0),
        "nesterov": (-lr * (1 + momentum), 1.0),
    }[rule])
    vectorised = np.linalg.solve(np.eye(4) - np.kron(matrix, matrix), np.outer(b, b).ravel())
    return vectorised.reshape(2, 2)


def stationary_variance(
    rule: str, lr: float, momentum: float, curvature: float, noise: float
) -> float:
    """Return the stationary variance of x in closed form, for SGD and momentum."""
    if rule == "sgd":
        return lr * noise**2 / (curvature * (2 - lr * curvature))
    if rule == "momentum":
        return (
            lr * noise**2 * (1 + momentum)
            / (curvature * (1 - momentum) * (2 * (1 + momentum) - lr * curvature))
        )
    return float(stationary_covariance(rule, lr, momentum, curvature, noise)[0, 0])


def rounding_variance(spread: float, unit: float) -> float:
    """Return the variance that stochastic rounding adds in one step, u²·E f(1−f).

    x lies on the grid of the units u, so f, the fraction that is cut off, is that of the step over
    u. With f(1−f) = 1/6 − Σ cos(2πkf)/(πk)² and a step that is normal, of variance `spread`,
    E f(1−f) = 1/6 − Σ exp(−2π²k²·spread/u²)/(πk)²: u²/6 for steps of a unit and more, and
    u·E|step| − spread for those far below.
    """
    if not unit:
        return 0.0
    k = np.arange(1, 2001)
    series = np.exp(-2 * (np.pi * k / unit) ** 2 * spread) / (np.pi * k) ** 2
    return float(unit**2 * (1 / 6 - series.sum()))


def rounded_variance(lr: float, curvature: float, noise: float, unit: float) -> float:
    """Return SGD's stationary variance of an x that is rounded stochastically to a unit.

    V = (1−αλ)²·V + α²σ² + R with R the `rounding_variance` of a step, of variance α²(λ²V + σ²).
    R hardly depends on V, so that the equation is solved by repetition.
    """
    variance = 0.0
    for _ in range(50):
        spread = lr**2 * (curvature**2 * variance + noise**2)
        added = lr**2 * noise**2 + rounding_variance(spread, unit)
        variance = added / (1 - (1 - lr * curvature) ** 2)
    return variance


def rounding_floor(curvature: float, noise: float, unit: float) -> float:
    """Return what `rounded_variance` tends to for small learning rates: u·σ/(λ√(2π)).

    Steps far below a unit are rounded to all or nothing, at u·E|step| = u·α·σ·√(2/π) of variance.
    That there is such a floor is in Li, De, Xu, Studer, Samet and Goldstein (2017).
    """
    return unit * noise / (curvature * np.sqrt(2 * np.pi))


def stall(lr: float, curvature: float, unit: float) -> float:
    """Return the distance from the minimum at which rounding to the nearest stops SGD.

    A step α·λ·|x| of less than half a unit is lost, one of up to three halves is a unit. So x, on
    the grid with the minimum, comes to the last place of it where α·λ·|x| < u/2 and stays.
    """
    return unit * np.floor(1 / (2 * lr * curvature))


def steady_steps(rule: str, t: Array, gradient: Array, c: Constants) -> Array:
    """Return the t-th step of an adaptive rule over α, all gradients being the same."""
    floor = c.eps / np.abs(gradient)
    if rule == "adagrad":
        return 1 / (np.sqrt(t) + floor)
    if rule == "rmsprop":
        return 1 / (np.sqrt(1 - c.decay**t) + floor)
    if c.corrected:
        return np.ones(t.shape) / (1 + floor)
    return (1 - c.beta1**t) / (np.sqrt(1 - c.beta2**t) + floor)


def adagrad_distance(steps: int) -> float:
    """Return Σ 1/√t over 1..steps, AdaGrad's way under a steady gradient over α.

    2√T + ζ(½) + 1/(2√T) by Euler and Maclaurin; what is missing is less than T^(-3/2)/24.
    """
    return 2 * np.sqrt(steps) - 1.4603545088095868 + 0.5 / np.sqrt(steps)


def uncorrected_peak(beta1: float, beta2: float) -> tuple[float, float]:
    """Return when Adam's step without correction is largest, and how large, over α.

    The maximum over real t of (1 - β₁ᵗ)/√(1 - β₂ᵗ), where its logarithm's derivative is 0. For β₂
    close to 1 that is at 1.2564/ln(1/β₁), with 0.6382·√(ln β₁/ln β₂).
    """
    a, b = np.log(beta1), np.log(beta2)
    low, high = 1e-6, 100 / -a
    while high - low > 1e-9 * high:
        t = (low + high) / 2
        rising = a / np.expm1(-a * t) < b / (2 * np.expm1(-b * t))
        low, high = (t, high) if rising else (low, t)
    return t, float(np.expm1(a * t) / -np.sqrt(-np.expm1(b * t)))


def tilted_rmsprop_rate(decay: float, kappa: float) -> float:
    """Return the rate −ln r of RMSProp along a valley at 45° to the axes, curvatures 1/κ and 1.

    In the end it jitters across the valley, between ±a. Then √s = a/√2 in both coordinates, and as
    a step across, α·a/√s, has to be 2a, α/√s is 2: gradient descent's edge of stability. A slope b
    along the valley adds to one coordinate's gradient where it takes from the other's, and makes
    their s differ by 2·a·b·(1-ρ)/(1+ρ), to and fro. That share of the step is lost, and of the 2
    there is left 2·(1 - (1-ρ)/(1+ρ)) = 4ρ/(1+ρ).
    """
    return -np.log1p(-4 * decay / (1 + decay) / kappa)


def escape_time(
    rule: str, lr: float, momentum: float, curvature: float, start: Array, threshold: float
) -> Array:
    """Return the linearised number of steps from `start` to `threshold` where curvature < 0.

    The state is decomposed into the two eigenvectors and only the growing one is kept.
    """
    if rule == "sgd":
        return np.log(threshold / start) / np.log(1 - lr * curvature)
    values, vectors = np.linalg.eig(block(rule, lr, momentum, curvature))
    growing = int(np.argmax(values))
    share = (vectors[0] * np.linalg.solve(vectors, [1.0, 0.0]))[growing]
    return np.log(threshold / (share * start)) / np.log(values[growing])


def critical_friction(
    force: Callable[[Array], Array], start: float, barrier: float, highest: float
) -> float:
    """Return the friction γ at which x'' + γ·x' = force(x), from rest, just tops a barrier.

    Runge-Kutta of order 4, many frictions at once, zooming in on the one that decides.
    """
    low, high, dt = 0.0, highest, 0.01

    def slope(x: Array, u: Array) -> tuple[Array, Array]:
        return u, force(x) - gamma * u

    for _ in range(3):
        gamma = np.linspace(low, high, 41)
        x, u = np.full_like(gamma, start), np.zeros_like(gamma)
        passed = np.zeros(gamma.shape, dtype=bool)
        for _ in range(4000):
            x1, u1 = slope(x, u)
            x2, u2 = slope(x + dt / 2 * x1, u + dt / 2 * u1)
            x3, u3 = slope(x + dt / 2 * x2, u + dt / 2 * u2)
            x4, u4 = slope(x + dt * x3, u + dt * u3)
            x = x + dt / 6 * (x1 + 2 * x2 + 2 * x3 + x4)
            u = u + dt / 6 * (u1 + 2 * u2 + 2 * u3 + u4)
            passed |= x > barrier
        last = int(np.flatnonzero(passed)[-1])
        low, high = gamma[last], gamma[last + 1]
    return (low + high) / 2


def equivalent_friction(lr: float, momentum: float) -> float:
    """Return the friction of the rolling ball that momentum follows, to second order in √lr.

    x_{k+1} - x_k = ρ(x_k - x_{k-1}) - α·f' is the ball ½(1+ρ)·x'' + (1-ρ)/√α·x' + f' = 0 at
    times k·√α; dividing by the mass ½(1+ρ), with time rescaled, leaves this friction.
    """
    return (1 - momentum) * np.sqrt(2 / (lr * (1 + momentum)))


# Exact shares of saddles among the critical points of an isotropic Gaussian random field:
# Euler's characteristic settles d = 2; Bardeen, Bond, Kaiser and Szalay (1986) give d = 3.
SADDLE_SHARE = {1: 0.0, 2: 0.5, 3: (29 + 6 * np.sqrt(6)) / 58}


def mean_log_condition(n: int) -> float:
    """Return E ln κ(A) for an n x n Gaussian matrix, n large: Edelman (1988), theorem 6.1."""
    return float(np.log(n) + 1.537)


def heavy_ball_cycle() -> Array:
    """Return the three points among which textbook momentum circles for ever.

    The loss of Lessard, Recht and Packard (2016), section 4.6, has the gradient 25x below 1,
    x + 24 from 1 to 2 and 25x - 24 above: convex, μ = 1, L = 25. On a cycle of one point above 2
    and two below 1 the step x₊ = x - α·f'(x) + ρ·(x - x₋) is a linear system of three equations.
    """
    lr, momentum = textbook("momentum", 25)
    lr /= 25
    ahead, back = np.roll(np.eye(3), 1, axis=1), np.roll(np.eye(3), -1, axis=1)
    system = ahead - (1 - 25 * lr + momentum) * np.eye(3) + momentum * back
    return np.linalg.solve(system, lr * np.array([0.0, 0.0, 24.0]))
