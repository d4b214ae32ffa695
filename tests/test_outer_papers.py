"""The settings of docs/outer.md are the rules of the papers it names."""
from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import optcore

ROUNDS = 6
PAGE = Path(__file__).parents[1] / "docs" / "outer.md"


# A round as its paper writes it: parameters, the server's state, the clients' mean, and the inner
# learning rate; the first two are returned

def fedavg(x, v, mean, gamma):
    return mean, v


def fedavgm(x, v, mean, gamma):
    update = x - mean           # the mean of the clients' updates, which are taken off
    v = 0.8 * v + update
    return x - v, v


def reptile(x, v, mean, gamma):
    return x + 0.3 * (mean - x), v


def slowmo(x, u, mean, gamma):
    u = 0.8 * u + (x - mean) / gamma
    return x - 0.7 * gamma * u, u


def diloco(x, v, mean, gamma):
    outer_gradient = x - mean
    v = 0.9 * v + outer_gradient
    return x - 0.7 * (outer_gradient + 0.9 * v), v


PAPERS = {
    "FedAvg": (fedavg, {"lr": 1.0}),
    "FedAvgM": (fedavgm, {"lr": 1.0, "momentum": 0.8}),
    "Reptile": (reptile, {"lr": 0.3}),
    "Lookahead": (reptile, {"lr": 0.3}),        # of one replica
    "SlowMo": (slowmo, {"lr": 0.7, "momentum": 0.8}),
    "DiLoCo": (diloco, {"lr": 0.7, "momentum": 0.9, "nesterov": True}),
}


def agree(a, b):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-13)


@pytest.mark.parametrize("lr_in_velocity", [False, True])
@pytest.mark.parametrize("name", PAPERS)
def test_settings_are_the_paper(name, lr_in_velocity, rng):
    paper, options = PAPERS[name]
    n = 1 if name == "Lookahead" else 3
    x = rng.standard_normal((20, 10))
    theirs, state = x.copy(), np.zeros_like(x)
    replicas = [x.copy() for _ in range(n)]
    opt = optcore.SGD(x, **options, lr_in_velocity=lr_in_velocity)
    for _ in range(ROUNDS):
        for replica in replicas:
            replica += 0.1 * rng.standard_normal(x.shape)
        weights = rng.integers(1, 50, n)
        theirs, state = paper(theirs, state, np.average(replicas, 0, weights), 0.05)
        opt.outer_step(replicas, weights=weights, write_back=True)
        agree(x, theirs)


def test_slowmo_while_the_inner_learning_rate_falls(rng):
    x = rng.standard_normal((20, 10))
    theirs, state, gamma = x.copy(), np.zeros_like(x), 0.1
    opt = optcore.SGD(x, lr=1.0, momentum=0.8)
    for _ in range(ROUNDS):
        replicas = [x + 0.1 * rng.standard_normal(x.shape) for _ in range(3)]
        theirs, state = slowmo(theirs, state, np.mean(replicas, axis=0), gamma)
        opt.lr = 0.7 * gamma
        opt.outer_step(replicas, grad_scale=1 / gamma)
        agree(x, theirs)
        gamma *= 0.7


def test_the_page_has_them_all():
    rows = re.findall(r"^\| (\w+), .* et al\. ", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == list(PAPERS)
