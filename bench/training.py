"""Steps inside a training: between them a forward and a backward pass use caches and cores."""
from __future__ import annotations

import os
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
from cases import Arrays, Case
from contenders import literal_reference
from limit import library
from shapes import TRAININGS

import reference

# Each measurement is a training from the same start, whose last steps are timed one by one.
WARM_UP_STEPS = 5
TIMED_STEPS = 20
EXAMPLES = 1500
CLASSES = 10

# A round trip is the quickest of so many tries: what else runs on the two cores only adds.
TRIES = 9
TRIPS = 2000


class Training(Arrays):
    """A perceptron with ReLU layers and softmax cross-entropy, on pictures drawn at random.

    Its parameters and gradients are the arrays of the case; a backward pass writes the latter.
    """

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        sizes, self.batch = TRAININGS[case.workload]
        rng = np.random.default_rng(11)
        self._start = [
            (rng.standard_normal(x.shape) * np.sqrt(2 / len(x)) * (x.ndim > 1)).astype(x.dtype)
            for x in self.x
        ]
        # Of a mean of zero and so small that a step of this suite's learning rate is stable
        self._images = 0.1 * rng.standard_normal((EXAMPLES, sizes[0]), np.float32)
        self._labels = (self._images @ rng.standard_normal((sizes[0], CLASSES))).argmax(axis=1)
        self._at = 0

    def reset(self) -> None:
        """Return to the state before the first step."""
        self._at = 0
        for x, start, g in zip(self.x, self._start, self.g, strict=True):
            x[...] = start
            g.fill(0)

    def backward(self) -> None:
        """Fill the gradients for the next batch, as a NumPy trainer does."""
        if self._at + self.batch > EXAMPLES:
            self._at = 0
        rows = slice(self._at, self._at + self.batch)
        self._at += self.batch
        layers, labels = [self._images[rows]], self._labels[rows]
        for weights, bias in zip(self.x[:-2:2], self.x[1:-2:2], strict=True):
            layers.append(np.maximum(layers[-1] @ weights + bias, 0))
        logits = layers[-1] @ self.x[-2] + self.x[-1]
        delta = np.exp(logits - logits.max(axis=1, keepdims=True))
        delta /= delta.sum(axis=1, keepdims=True)
        delta[np.arange(len(labels)), labels] -= 1
        delta /= len(labels)
        for i in reversed(range(len(layers))):
            np.matmul(layers[i].T, delta, out=self.g[2 * i])
            delta.sum(axis=0, out=self.g[2 * i + 1])
            if i:
                delta = (delta @ self.x[2 * i].T) * (layers[i] > 0)

    @cached_property
    def trained(self) -> list[np.ndarray]:
        """The parameters that a measurement leaves, by the reference."""
        other = Training(self.case)
        other.reset()
        states = other.states()
        for count in range(WARM_UP_STEPS + TIMED_STEPS):
            other.backward()
            options = replace(self.case.options, step=count + 1)
            literal_reference(self.case.rule, options, other.x, other.g, *states)
        return other.x

    def check_trained(self, *, exact: bool) -> None:
        """Compare the parameters with the reference's training: bits, or closeness of a peer.

        Raises
        ------
        AssertionError
            Where they differ.
        """
        for i, (x, expected) in enumerate(zip(self.x, self.trained, strict=True)):
            same = reference.same_bits(x, expected) if exact else np.allclose(
                x, expected, rtol=0, atol=1e-3 * np.abs(expected).max()
            )
            assert same, f"tensor {i} is not what the reference's training has"


def round_trip(folder: Path) -> float | None:
    """Return the nanoseconds in which a cache line goes from one core to another and back.

    Of the first core that this process may use to the farthest of the others; None where there
    is one core, or threads cannot be pinned.

    Raises
    ------
    limit.NoCompilerError
        Where the probe cannot be built.
    """
    import ctypes

    if not hasattr(os, "sched_getaffinity"):
        return None
    first, *others = sorted(os.sched_getaffinity(0))
    probe = library("roundtrip.c", folder).round_trip_ns
    probe.restype = ctypes.c_double
    times = [min(probe(first, other, TRIPS) for _ in range(TRIES)) for other in others]
    return max(times) if times and min(times) > 0 else None
