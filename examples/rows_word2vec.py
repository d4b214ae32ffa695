"""Learn word vectors from Python's own help: skip-gram, negative sampling, momentum by rows.

A step reads some hundred rows of two tables, and its gradients are `optcore.Rows`. The vectors are
learnt three times from the same start, in the three ways of rows_compare.py.

Run ``python examples/rows_word2vec.py``; it needs nothing but NumPy.
"""
from __future__ import annotations

import re
from collections import Counter
from pydoc_data.topics import topics
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rows_compare import Floats, WatchedSGD, compare

import optcore

WINDOW, NEGATIVES, SHARED, BATCH, WIDTH = 4, 5, 64, 256, 64


class Text:
    """Which words of the help stand near which; every tenth paragraph is held out."""

    def __init__(self) -> None:
        paragraphs = [re.findall(r"\w+", paragraph.lower())
                      for name in sorted(topics) for paragraph in topics[name].split("\n\n")]
        counts = Counter(word for i, part in enumerate(paragraphs) if i % 10 for word in part)
        self.words = [word for word, n in counts.most_common() if n >= 5]
        self.number = {word: i for i, word in enumerate(self.words)}
        n = np.array([counts[word] for word in self.words], float)
        self.share, self.noise = n / n.sum(), n**0.75 / (n**0.75).sum()
        rng = np.random.default_rng(0)
        found: tuple[list[NDArray[Any]], ...] = [], []
        for i, part in enumerate(paragraphs):
            ids = np.array([self.number[word] for word in part if word in self.number], int)
            ids = ids[rng.random(len(ids)) < np.sqrt(1e-3 / self.share[ids])]   # fewer "the"
            for k in range(1, WINDOW + 1):
                ahead = np.stack([ids[:-k], ids[k:]])
                found[i % 10 == 0].extend([ahead, ahead[::-1]])
        self.pairs, self.held_out = (np.concatenate(part, axis=1) for part in found)

    def loss(self, scores: Floats) -> float:
        """Return the held-out loss of a pair, given every word's score beside every other."""
        center, near = self.held_out
        noise = NEGATIVES * np.logaddexp(0, scores) @ self.noise
        return float((np.logaddexp(0, -scores[center, near]) + noise[center]).mean())

    def nearest(self, vectors: Floats, word: str) -> list[str]:
        """Return the five words whose vectors point most nearly where this word's does."""
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return [self.words[i] for i in np.argsort(-unit @ unit[self.number[word]])[1:6]]

    def train(self, way: str, epochs: int, seed: int, dtype: str) -> WatchedSGD:
        """Learn the vectors; a batch shares its negative words."""
        rng = np.random.default_rng(seed)
        shape, n_batches = (len(self.words), WIDTH), self.pairs.shape[1] // BATCH
        tables = {"center": ((rng.random(shape) - 0.5) / WIDTH).astype(dtype),
                  "near": np.zeros(shape, dtype)}
        opt = WatchedSGD(
            tables, way, lr=lambda k: 0.01 * (1 - k / (epochs * n_batches)), momentum=0.9)
        for _ in range(epochs):
            order = rng.permutation(self.pairs.shape[1])[: n_batches * BATCH]
            for batch in order.reshape(-1, BATCH):
                center, near = self.pairs[:, batch]
                negative = rng.choice(len(self.words), SHARED, p=self.noise)
                near = np.concatenate([near, negative])
                opt.catch_up("center", center)
                opt.catch_up("near", near)
                c, o = tables["center"][center], tables["near"][near]
                pull = -1 / (1 + np.exp((c * o[:BATCH]).sum(axis=1, keepdims=True)))
                push = NEGATIVES / SHARED / (1 + np.exp(-c @ o[BATCH:].T))
                opt.step({
                    "center": optcore.Rows(center, pull * o[:BATCH] + push @ o[BATCH:]),
                    "near": optcore.Rows(near, np.concatenate([pull * c, push.T @ c])),
                })
        return opt


def main() -> None:
    """Learn, and look at a few words."""
    text = Text()
    by_share = np.log(text.share / (NEGATIVES * text.noise))
    print(f"{len(text.words)} words, {text.pairs.shape[1]} pairs; held-out loss by frequency alone "
          f"{text.loss(np.broadcast_to(by_share, (len(text.words),) * 2)):.4f}")
    vectors = compare(
        text.train, lambda t: f"held-out loss {text.loss(t['center'] @ t['near'].T):.4f}", epochs=4
    )["center"]
    for word in ("exception", "integer", "true", "import", "mutable"):
        print(f"{word}: {', '.join(text.nearest(vectors, word))}")


if __name__ == "__main__":
    main()
