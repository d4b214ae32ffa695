"""Tables that learn by rows from real text: examples/rows_word2vec.py and rows_recommender.py."""
from __future__ import annotations

import sys

import numpy as np
import pytest

from optcore import Rows

pytest.importorskip("pydoc_data.topics", reason="the examples learn from Python's help")

import rows_compare
import rows_recommender
import rows_word2vec


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for example in (rows_recommender, rows_word2vec):
        monkeypatch.setattr(example, "WIDTH", 16)
        monkeypatch.setattr(example, "BATCH", 512)


def trained(train, epochs):
    """Train each way, in float64, whose rounding is far below what the ways are apart by."""
    exact, dense, rows = (train(way, epochs, 0, "float64") for way in ("exact", "dense", "rows"))
    assert rows_compare.apart(exact.tables, dense.tables) > 1e-4    # no row is up to date unasked
    exact.sgd.catch_up()
    assert 0 < rows_compare.apart(exact.tables, dense.tables) < 1e-12
    assert rows_compare.apart(exact.tables, rows.tables) > 0.01
    return exact.tables, dense.tables


def test_words_are_learnt_as_under_dense_momentum():
    text = rows_word2vec.Text()
    exact, dense = (text.loss(tables["center"] @ tables["near"].T)
                    for tables in trained(text.train, epochs=1))
    by_share = np.log(text.share / (rows_word2vec.NEGATIVES * text.noise))
    assert exact < text.loss(np.broadcast_to(by_share, (len(by_share),) * 2)) - 0.05
    assert exact == pytest.approx(dense, rel=1e-12)


def test_a_loss_is_that_of_its_pairs():
    text = rows_word2vec.Text()
    scores = np.random.default_rng(0).standard_normal((len(text.words),) * 2)
    text.held_out = np.array([[3, 5], [4, 4]])
    yes = 1 / (1 + np.exp(-scores))
    expected = [-np.log(yes[i, 4]) - 5 * np.log(1 - yes[i]) @ text.noise for i in (3, 5)]
    assert text.loss(scores) == pytest.approx(np.mean(expected), rel=1e-12)


def test_words_are_recommended_as_under_dense_momentum():
    likes = rows_recommender.Likes()
    exact, dense = (likes.hit_rate(tables["users"] @ tables["items"].T + tables["biases"])
                    for tables in trained(likes.train, epochs=6))
    popular = np.broadcast_to(likes.known.sum(axis=0), likes.known.shape)
    assert exact > 1.2 * likes.hit_rate(popular)
    assert exact == pytest.approx(dense, abs=0.001)     # a tie may fall either way


def test_a_hit_is_among_the_ten_best_of_what_is_not_known():
    likes = rows_recommender.Likes()
    likes.known, likes.held_out = np.zeros((2, 2, 20), bool)
    likes.known[:, :3] = likes.held_out[0, [12, 13]] = likes.held_out[1, 13] = True
    worse_and_worse = np.broadcast_to(-np.arange(20), (2, 20))
    assert likes.hit_rate(worse_and_worse) == pytest.approx(2 / 3)      # 9, 9 and 10 are before


@pytest.mark.parametrize(("asked", "ways"), [
    ([], ["exact", "dense", "rows"]), (["--dense"], ["dense"]), (["--lazy", "rows"], ["rows"]),
])
def test_trains_as_the_command_line_asks(asked, ways, monkeypatch, capsys):
    def train(way, epochs, seed, dtype):
        assert (epochs, seed, dtype) == (3, 1, "float64")
        opt = rows_compare.WatchedSGD({"w": np.ones((2, 3), dtype)}, way, lr=0.1, momentum=0.9)
        for k in (0, 1):
            opt.catch_up("w", np.array([k]))
            opt.step({"w": Rows([k], np.ones((1, 3)))})
        return opt

    monkeypatch.setattr(sys, "argv", ["example", *asked, "--seed", "1", "--dtype", "float64"])
    rows_compare.compare(train, lambda tables: f"ends at {tables['w'][0, 0]:.2f}", epochs=3)
    ends = {"exact": "0.81", "dense": "0.81", "rows": "0.90"}
    found = [line.split(",")[0] for line in capsys.readouterr().out.splitlines()]
    assert found == [f"{way:5}: ends at {ends[way]}" for way in ways]
