"""The outer step over torch.distributed: examples/diloco_torch.py."""
from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import EXAMPLES

import optcore

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn", reason="the example learns scikit-learn's digits")

from test_torch import distributed, needs_processes  # noqa: E402 - after the skip

pytestmark = needs_processes


class PlainNumPy:
    """DiLoCo's outer step as one writes it."""

    def __init__(self, x, lr, momentum, nesterov):
        assert nesterov
        self.x, self.lr, self.momentum = x.numpy(), lr, momentum
        self.velocity = np.zeros_like(self.x)

    def outer_step(self, replicas, write_back):
        [mean] = replicas
        d = self.x - mean.numpy()
        self.velocity = self.momentum * self.velocity + d
        self.x -= self.lr * (d + self.momentum * self.velocity)
        if write_back:
            mean.numpy()[...] = self.x


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import diloco_torch

    n_threads = torch.get_num_threads()     # which are OpenMP's, and optcore's with it
    torch.set_num_threads(1)
    yield diloco_torch
    torch.set_num_threads(n_threads)


@pytest.mark.parametrize("size", [1, 2])
def test_has_the_bits_of_plain_numpy(size, example, monkeypatch, tmp_path):
    def target(_):
        ours, _ = example.train(0, rounds=4, inner_steps=3)
        monkeypatch.setattr(optcore, "SGD", PlainNumPy)
        plain, _ = example.train(0, rounds=4, inner_steps=3)
        alone, _ = example.train(0, rounds=4, inner_steps=3, outer=None)
        assert torch.equal(ours, plain)
        assert not torch.allclose(ours, alone, atol=0.01)

    distributed(size, tmp_path, target)


@pytest.mark.parametrize("size", [1, 2])
def test_averaging_at_every_step_is_training_with_the_joined_batch(
    size, example, monkeypatch, tmp_path
):
    def target(_):
        monkeypatch.setattr(
            example, "inner_optimizer", lambda params: torch.optim.SGD(params, lr=0.1))
        start, _ = example.train(0, rounds=0, inner_steps=1, outer=None)
        ours, _ = example.train(0, rounds=20, inner_steps=1, outer={"lr": 1.0})
        alone, _ = example.train(0, rounds=20, inner_steps=1, outer=None)
        assert torch.allclose(ours, alone, rtol=0, atol=1e-6)
        assert not torch.allclose(start, alone, rtol=0, atol=0.01)

    distributed(size, tmp_path, target)


def test_reaches_what_one_process_does():
    command = [sys.executable, EXAMPLES / "diloco_torch.py", "--ranks", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "one process, 300 steps: accuracy 9" in done.stdout
    assert "2 ranks, 30 rounds of 10 steps: accuracy 9" in done.stdout
