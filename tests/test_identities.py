"""The rules against other people's statements of them."""
from __future__ import annotations

import numpy as np
import pytest

import optcore
from reference import same_bits

STEPS = 60


def quadratic(dtype=np.float64, n=40):
    """Return a start and the gradient of an ill-conditioned quadratic."""
    rng = np.random.default_rng(7)
    curvature = np.logspace(-2, 0, n).astype(dtype)
    return rng.standard_normal(n).astype(dtype), lambda x: curvature * x


def test_lecture_nesterov_is_the_rearranged_rule():
    """v = ρ·v_old - α·g; x += -ρ·v_old + (1+ρ)·v, as the lecture writes it."""
    lr, rho = 0.1, 0.9
    x, gradient = quadratic()
    y, v, w = x.copy(), np.zeros_like(x), np.zeros_like(x)
    for _ in range(STEPS):
        old = w
        w = rho * w - lr * gradient(y)
        y = y + (-rho * old + (1 + rho) * w)
        optcore.nesterov_step(x, gradient(x), v, lr=lr, momentum=rho, lr_in_velocity=True)
        np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-14)
        np.testing.assert_allclose(v, w, rtol=1e-11, atol=1e-14)


def test_look_ahead_form_gives_the_same_sequence():
    """v = ρ·v - α·∇f(x + ρ·v); x += v, with x̃ = x + ρ·v."""
    lr, rho = 0.1, 0.9
    shifted, gradient = quadratic()
    x, v, w = shifted.copy(), np.zeros_like(shifted), np.zeros_like(shifted)
    for _ in range(STEPS):
        w = rho * w - lr * gradient(x + rho * w)
        x = x + w
        optcore.nesterov_step(
            shifted, gradient(shifted), v, lr=lr, momentum=rho, lr_in_velocity=True
        )
        np.testing.assert_allclose(shifted, x + rho * w, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("step", [optcore.momentum_step, optcore.nesterov_step])
def test_conventions_agree_while_lr_is_constant(step):
    x, gradient = quadratic()
    y, v, w = x.copy(), np.zeros_like(x), np.zeros_like(x)
    for _ in range(STEPS):
        step(x, gradient(x), v, lr=0.1, momentum=0.9)
        step(y, gradient(y), w, lr=0.1, momentum=0.9, lr_in_velocity=True)
        np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-14)
        np.testing.assert_allclose(w, -0.1 * v, rtol=1e-11, atol=1e-14)


def test_conventions_part_when_lr_changes():
    ends = []
    for lr_in_velocity in (False, True):
        x, v, g = np.zeros(1), np.zeros(1), np.ones(1)
        for lr in (0.1, 0.01):
            optcore.momentum_step(x, g, v, lr=lr, momentum=0.9, lr_in_velocity=lr_in_velocity)
        ends.append(x[0])
    np.testing.assert_allclose(ends, [-0.119, -0.200], atol=1e-12)


def torch_sgd(params, grads_of, steps, *, lr, momentum=0, dampening=0, weight_decay=0,
              nesterov=False, maximize=False):
    """The algorithm box of torch.optim.SGD's documentation, line by line."""
    b = None
    for t in range(1, steps + 1):
        g = grads_of(params)
        if maximize:
            g = -g
        if weight_decay != 0:
            g = g + weight_decay * params
        if momentum != 0:
            b = momentum * b + (1 - dampening) * g if t > 1 else g
            g = g + momentum * b if nesterov else b
        params = params - lr * g
    return params


@pytest.mark.parametrize("weight_decay", [0, 0.01])
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.9}, {"momentum": 0.9, "dampening": 0.3},
     {"momentum": 0.9, "nesterov": True}],
)
@pytest.mark.parametrize("maximize", [False, True])
def test_torch_documentation(options, weight_decay, maximize):
    x, gradient = quadratic()
    sign = -1 if maximize else 1
    options = {**options, "lr": 0.1, "weight_decay": weight_decay, "maximize": maximize}
    expected = torch_sgd(x, lambda p: sign * gradient(p), 20, **options)
    opt = optcore.SGD(x, **options)
    for _ in range(20):
        opt.step(sign * gradient(x))
    np.testing.assert_allclose(x, expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("nesterov", [False, True])
def test_keras_documentation(nesterov):
    """velocity = momentum * velocity - learning_rate * g; w = w + velocity, or with nesterov
    w = w + momentum * velocity - learning_rate * g.
    """
    x, gradient = quadratic()
    w, velocity = x.copy(), np.zeros_like(x)
    opt = optcore.SGD(x, lr=0.1, momentum=0.9, nesterov=nesterov, lr_in_velocity=True)
    for _ in range(20):
        g = gradient(w)
        velocity = 0.9 * velocity - 0.1 * g
        w = w + 0.9 * velocity - 0.1 * g if nesterov else w + velocity
        opt.step(gradient(x))
        np.testing.assert_allclose(x, w, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scikit_learn(nesterov, dtype):
    """Bit for bit: scikit-learn's optimizer evaluates the same expression."""
    module = pytest.importorskip("sklearn.neural_network._stochastic_optimizers")
    x, gradient = quadratic(dtype)
    theirs = [x.copy()]
    sk = module.SGDOptimizer(theirs, learning_rate_init=0.1, momentum=0.9, nesterov=nesterov)
    opt = optcore.SGD([x], lr=0.1, momentum=0.9, nesterov=nesterov, lr_in_velocity=True)
    for _ in range(STEPS):
        sk.update_params(theirs, [gradient(theirs[0])])
        opt.step([gradient(x)])
        assert same_bits(x, theirs[0])
