"""A small network on the digits that come with scikit-learn: plain NumPy, gradients in place."""
from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from sklearn.datasets import load_digits

TRAINING = 1500   # of 1797 examples; the rest is for testing


@cache
def digits(dtype: str = "float32") -> tuple[np.ndarray, np.ndarray]:
    """Return the images ``(1797, 64)``, scaled to [0, 1], and their labels, in a fixed shuffle."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    return (images[order] / 16).astype(dtype), labels[order]


class Network:
    """64 pixels, one hidden layer of rectified units, ten classes, softmax cross-entropy.

    Parameters
    ----------
    seed : int or sequence of int
        Of the initial weights. A sequence makes so many networks in one: everything has a first
        axis more, images, labels, parameters and results.
    hidden : int
        Hidden units.
    dtype : str
        Of parameters and gradients.

    Attributes
    ----------
    params, grads : dict of arrays
        By name; `backward` writes the gradients in place, so that an optimizer may hold them.
    """

    def __init__(self, seed: int | Sequence[int], hidden: int = 64, dtype: str = "float32"
                 ) -> None:
        def drawn(seed: int) -> dict[str, np.ndarray]:
            rng = np.random.default_rng(seed)
            return {
                "w1": (rng.standard_normal((64, hidden)) * np.sqrt(2 / 64)).astype(dtype),
                "b1": np.zeros(hidden, dtype),
                "w2": (rng.standard_normal((hidden, 10)) * np.sqrt(1 / hidden)).astype(dtype),
                "b2": np.zeros(10, dtype),
            }

        if isinstance(seed, int):
            self.params = drawn(seed)
        else:
            several = [drawn(one) for one in seed]
            self.params = {name: np.stack([params[name] for params in several])
                           for name in several[0]}
        self.grads = {name: np.zeros_like(param) for name, param in self.params.items()}

    def _forward(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        p = self.params
        hidden = np.maximum(images @ p["w1"] + p["b1"][..., None, :], 0)
        logits = hidden @ p["w2"] + p["b2"][..., None, :]
        logits -= logits.max(axis=-1, keepdims=True)
        return hidden, logits

    def loss(self, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Return the mean cross-entropy."""
        _, logits = self._forward(images)
        right = np.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
        return np.mean(np.log(np.exp(logits).sum(axis=-1)) - right, axis=-1)

    def accuracy(self, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Return the share of images whose largest logit is the label's."""
        return np.mean(self._forward(images)[1].argmax(axis=-1) == labels, axis=-1)

    def backward(self, images: np.ndarray, labels: np.ndarray) -> None:
        """Write the gradient of the mean cross-entropy into `grads`."""
        hidden, error = self._forward(images)
        np.exp(error, out=error)
        error /= error.sum(axis=-1, keepdims=True)
        error -= labels[..., None] == np.arange(error.shape[-1])
        error /= labels.shape[-1]
        below = (error @ self.params["w2"].swapaxes(-1, -2)) * (hidden > 0)
        np.matmul(hidden.swapaxes(-1, -2), error, out=self.grads["w2"])
        np.matmul(images.swapaxes(-1, -2), below, out=self.grads["w1"])
        error.sum(axis=-2, out=self.grads["b2"])
        below.sum(axis=-2, out=self.grads["b1"])

    def flat_gradient(self) -> np.ndarray:
        """Return all gradients as one vector."""
        return np.concatenate([grad.ravel() for grad in self.grads.values()])
