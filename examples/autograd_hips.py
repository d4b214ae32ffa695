"""Fit a small network with HIPS autograd and optcore: gradients by autograd, steps in place.

Run ``python examples/autograd_hips.py``; it needs ``pip install 'optcore[examples]'``.
"""
from __future__ import annotations

from typing import Any

import autograd.numpy as np
from autograd import value_and_grad

import optcore

STEPS = 1000


def predict(params: dict[str, Any], x: Any) -> Any:
    """Return the network's output for a column of inputs."""
    hidden = np.tanh(x @ params["w1"] + params["b1"])
    return hidden @ params["w2"] + params["b2"]


def loss(params: dict[str, Any], x: Any, y: Any) -> Any:
    """Return the mean squared error."""
    return np.mean((predict(params, x) - y) ** 2)


def main() -> None:
    """Fit sin on [-3, 3]."""
    rng = np.random.RandomState(0)
    x = np.linspace(-3, 3, 200).reshape(-1, 1)
    y = np.sin(x)
    params = {
        "w1": rng.standard_normal((1, 32)),
        "b1": np.zeros(32),
        "w2": rng.standard_normal((32, 1)) / 32**0.5,
        "b2": np.zeros(1),
    }
    opt = optcore.SGD(
        params, lr=lambda step: 0.05 * (1 - step / STEPS), momentum=0.9, nesterov=True
    )
    gradient = value_and_grad(loss)
    for step in range(STEPS):
        value, grads = gradient(params, x, y)   # a mapping, as params is
        opt.step(grads)
        if step % 200 == 0:
            print(f"step {step:4d}: loss {value:.6f}")
    value = loss(params, x, y)
    print(f"step {STEPS:4d}: loss {value:.6f}")
    assert value < 0.01, "the fit failed"


if __name__ == "__main__":
    main()
