"""Half types in training: the digits' network bit by bit, and the noise over steps and arrays."""
from __future__ import annotations

import math

import numpy as np
import pytest

import optcore
from reference import BFLOAT16, noise_key, same_bits, split, widened

STEPS = 1000


def shown(masters, name):
    """What parameters show of their float32."""
    return [split(x)[0] if name == "bfloat16" else x.astype(np.float16) for x in masters]


@pytest.mark.parametrize(("name", "master", "seen"), [
    ("bfloat16", "split", "float32"), ("bfloat16", "split", "half"), ("float16", "float32", "half"),
])
def test_a_network_with_masters_has_the_bits_of_float32(name, master, seen):
    """Trained for long, seeing the float32 weights or their halves, by gradients of either type.

    What is seen is the same for both after each step, so that each could as well compute its own
    gradients: one wrong bit would grow, for nothing leads a trajectory back to another.
    """
    pytest.importorskip("sklearn", reason="needs the extra 'gallery'")
    from lecture import mlp, network

    images, labels = mlp.digits()
    net = mlp.Network(0)
    halves = shown(net.params.values(), name)
    options = {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}
    opt = optcore.SGD(halves, master=master, **options)
    masters = [np.array(widened(half)) for half in halves]      # where a master begins
    plain = optcore.SGD(masters, **options)
    for chosen in network.batches(0, mlp.TRAINING, STEPS):
        for param, x, half in zip(net.params.values(), masters, halves, strict=True):
            param[...] = x if seen == "float32" else widened(half)
        net.backward(images[chosen], labels[chosen])
        grads = list(net.grads.values())
        if seen == "half":
            grads = shown(grads, name)
        opt.step(grads)
        plain.step([widened(g) for g in grads])
        for x, half in zip(shown(masters, name), halves, strict=True):
            assert x.tobytes() == half.tobytes()
        if plain.step_count % 100 == 0:
            for x, entry in zip(masters, opt.state_dict()["state"].values(), strict=True):
                assert same_bits(x, entry["master"])
    assert net.loss(images[:mlp.TRAINING], labels[:mlp.TRAINING]) < 0.05


def draws(axis, fraction, n_keys):
    """What the engine's roundings do under many keys, ``(n_keys, arrays * elements)``.

    A parameter and its velocity are both rounded up in magnitude with the probability `fraction`;
    results are scaled to mean 0 and variance 1. Elements are of two runs.
    """
    grad = np.full(320, 1 + fraction * 2**-7, np.float32)
    x, v = np.zeros((2, grad.size), np.uint16)
    at = np.r_[0:64, 256:320]
    ups = np.empty((n_keys, 2, at.size), np.uint16)
    for k in range(n_keys):
        x[:] = v[:] = 0
        key = noise_key(**{"seed": 0, "step": 0, "index": 0, axis: k})
        optcore.momentum_step(x.view(BFLOAT16), grad, v.view(BFLOAT16), lr=1.0, momentum=0.0,
                              rounding="stochastic", noise_key=key)
        ups[k] = x[at], v[at]
    ups = (ups & 0x7FFF) - 0x3F80       # 0 where rounded down, to 1
    assert (ups <= 1).all()
    u = (ups.reshape(n_keys, -1) - fraction) / math.sqrt(fraction * (1 - fraction))
    return u.astype(np.float32)


def are_normal(z, more=0.0):
    """Whether numbers are standard normal, by mean, mean square and the largest.

    `more` is added to the variance of the mean square.
    """
    n = z.size
    return (abs(z.mean()) < 4 / math.sqrt(n)
            and abs(np.mean(z**2) - 1) < 4 * math.sqrt(2 / n + more)
            and abs(z).max() < math.sqrt(2 * math.log(n)) + 2)


@pytest.mark.parametrize("fraction", [1 / 2, 1 / 16])
@pytest.mark.parametrize("axis", ["seed", "step", "index"])
def test_no_two_roundings_go_together(axis, fraction):
    """Over seeds, steps or parameters: any two of elements and arrays, at once and in turn."""
    u = draws(axis, fraction, 4096)
    n = len(u)
    assert are_normal(u.sum(axis=0) / math.sqrt(n))
    u = (u - u.mean(axis=0)) / u.std(axis=0)
    # a key under which many are rounded up has a share in the square of every correlation
    more = 2 * (1 / (fraction * (1 - fraction)) - 4) / u.size
    together = u.T @ u / math.sqrt(n)
    assert are_normal(together[np.triu_indices(len(together), 1)], more)
    for lag in (1, 2):
        assert are_normal((u[lag:].T @ u[:-lag] / math.sqrt(n - lag)).ravel(), more), lag
