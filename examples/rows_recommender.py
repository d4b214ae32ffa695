"""Recommend words to paragraphs of Python's help: a factorisation with biases, momentum by rows.

A paragraph is a user, a word in it an item that it likes: implicit feedback, with words that it
lacks drawn as negatives. One word of ten is held out, and hit rate@10 says how many of them are
among the ten best of all words that the paragraph is not known to have. It learns in the three
ways of rows_compare.py, with weight decay, which under "rows" only touched rows see.

Run ``python examples/rows_recommender.py``; it needs nothing but NumPy.
"""
from __future__ import annotations

import re
from collections import Counter
from pydoc_data.topics import topics

import numpy as np
from rows_compare import Floats, Tables, WatchedSGD, compare

import optcore

NEGATIVES, BATCH, WIDTH = 5, 256, 64


class Likes:
    """Which paragraph has which word: `known` to train on, `held_out` to test with."""

    def __init__(self) -> None:
        paragraphs = [set(re.findall(r"\w+", paragraph.lower()))
                      for name in sorted(topics) for paragraph in topics[name].split("\n\n")]
        counts = Counter(word for words in paragraphs for word in words)
        few = sorted(word for word, n in counts.items() if 3 <= n <= len(paragraphs) / 10)
        number = {word: i for i, word in enumerate(few)}
        users = [ids for words in paragraphs
                 if len(ids := sorted(number[word] for word in words if word in number)) >= 8]
        self.known = np.zeros((len(users), len(few)), bool)
        self.held_out = self.known.copy()
        rng = np.random.default_rng(0)
        for user, items in enumerate(users):
            out, known = np.split(rng.permutation(items), [max(1, len(items) // 10)])
            self.held_out[user, out] = self.known[user, known] = True

    def hit_rate(self, scores: Floats) -> float:
        """Return the share of held-out words that less than ten unknown ones are put before."""
        users, items = self.held_out.nonzero()
        others = np.where(self.known | self.held_out, -np.inf, scores)
        before = others[users] > scores[users, items, np.newaxis]
        return float((before.sum(axis=1) < 10).mean())

    def train(self, way: str, epochs: int, seed: int, dtype: str) -> WatchedSGD:
        """Learn the factors and biases."""
        rng = np.random.default_rng(seed)
        n_users, n_items = self.known.shape
        tables: Tables = {
            "users": (rng.standard_normal((n_users, WIDTH)) / 10).astype(dtype),
            "items": (rng.standard_normal((n_items, WIDTH)) / 10).astype(dtype),
            "biases": np.zeros(n_items, dtype),
        }
        opt = WatchedSGD(tables, way, lr=0.01, momentum=0.9, weight_decay=0.02)
        likes = np.argwhere(self.known)
        liked = np.repeat(np.array([1, 0], dtype), [BATCH, BATCH * NEGATIVES])
        for _ in range(epochs):
            order = rng.permutation(len(likes))[: len(likes) // BATCH * BATCH]
            for batch in order.reshape(-1, BATCH):
                users = np.tile(likes[batch, 0], 1 + NEGATIVES)
                items = np.append(likes[batch, 1], rng.integers(n_items, size=BATCH * NEGATIVES))
                for name, rows in (("users", users), ("items", items), ("biases", items)):
                    opt.catch_up(name, rows)
                u, i = tables["users"][users], tables["items"][items]
                score = (u * i).sum(axis=1) + tables["biases"][items]
                d = 1 / (1 + np.exp(-score)) - liked
                opt.step({
                    "users": optcore.Rows(users, d[:, np.newaxis] * i),
                    "items": optcore.Rows(items, d[:, np.newaxis] * u),
                    "biases": optcore.Rows(items, d),
                })
        return opt


def main() -> None:
    """Learn, and compare with what is popular."""
    likes = Likes()
    popular = np.broadcast_to(likes.known.sum(axis=0), likes.known.shape)
    print(f"{len(likes.known)} paragraphs, {likes.known.shape[1]} words, {likes.known.sum()} likes;"
          f" hit rate@10 of the most popular words {likes.hit_rate(popular):.1%}")
    compare(
        likes.train,
        lambda t: f"hit rate@10 {likes.hit_rate(t['users'] @ t['items'].T + t['biases']):.1%}",
        epochs=10,
    )


if __name__ == "__main__":
    main()
