"""A trainer in Numba: logistic regression compiled whole, calling the kernels by address.

``pip install optcore numba``, then ``python examples/embed_numba.py``.
"""
import numba
import numpy as np
from numpy.typing import NDArray

import optcore
from optcore.kernels import functions, make_options

LR, LR_DECAY, MOMENTUM, WEIGHT_DECAY, STEPS = 0.5, 0.99, 0.9, 1e-3, 200

momentum_f64 = functions()["optcore_momentum_f64"]

Vector = NDArray[np.float64]


@numba.njit(nogil=True)
def gradient(w: Vector, x: Vector, y: Vector, out: Vector) -> float:
    """Write the gradient of the mean of log(1 + exp(-y·xw)); return that mean."""
    out[:] = 0
    loss = 0.0
    for i in range(len(y)):
        margin = 0.0
        for j in range(len(w)):
            margin += x[i, j] * w[j]
        margin *= y[i]
        loss += np.log1p(np.exp(-margin))
        pull = -y[i] / (1 + np.exp(margin)) / len(y)
        for j in range(len(w)):
            out[j] += pull * x[i, j]
    return loss / len(y)


@numba.njit(nogil=True)
def train(w: Vector, x: Vector, y: Vector, options: NDArray[np.void], steps: int) -> float:
    """Train `w` in place, lr falling from step to step; return the last loss."""
    grad = np.empty_like(w)
    velocity = np.zeros_like(w)
    loss = 0.0
    for _ in range(steps):
        loss = gradient(w, x, y, grad)
        momentum_f64(w.ctypes, grad.ctypes, velocity.ctypes, w.size, options.ctypes)
        options[0].lr *= LR_DECAY
    return loss


def main() -> None:
    """Train in compiled code, then step by step from Python, and compare the bits."""
    rng = np.random.default_rng(0)
    y = rng.choice([-1.0, 1.0], 500)
    x = rng.standard_normal((500, 16)) + 0.5 * y[:, None]

    w = np.zeros(16)
    options = make_options(
        lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, decoupled_weight_decay=True
    )
    loss = train(w, x, y, options, STEPS)

    w_python = np.zeros_like(w)
    grad, velocity = np.empty_like(w), np.zeros_like(w)
    lr = LR
    for _ in range(STEPS):
        gradient(w_python, x, y, grad)
        optcore.momentum_step(
            w_python, grad, velocity, lr=lr, momentum=MOMENTUM,
            weight_decay=WEIGHT_DECAY, decoupled_weight_decay=True,
        )
        lr *= LR_DECAY

    right = np.mean(np.sign(x @ w) == y)
    print(f"Numba: loss {loss:.3e} after {STEPS} steps, {right:.1%} of the points on their side")
    assert w.tobytes() == w_python.tobytes()
    print("Numba and Python: equal to the last bit")


if __name__ == "__main__":
    main()
