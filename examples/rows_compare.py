"""What the two examples of `optcore.Rows` share: training in three ways, and what sets them apart.

"exact" gives rows, and untouched rows move as momentum has it; "dense" gives the same gradients as
large as the tables; "rows" gives rows, and untouched rows do not move.
"""
from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

import optcore

Floats = NDArray[np.floating[Any]]
Tables = dict[str, Floats]


class WatchedSGD:
    """`optcore.SGD` in one of the three ways, with the seconds that each step took."""

    def __init__(self, tables: Tables, way: str, **options: Any) -> None:
        self.tables, self.way, self.seconds = tables, way, [0.0]
        self.sgd = optcore.SGD(tables, lazy="rows" if way == "rows" else "exact", **options)

    def catch_up(self, name: str, rows: NDArray[Any]) -> None:
        """Bring some rows of a table up to date."""
        start = time.perf_counter()
        self.sgd.catch_up(name, rows)
        self.seconds[-1] += time.perf_counter() - start

    def step(self, grads: dict[str, optcore.Rows]) -> None:
        """Update the tables."""
        given: dict[str, Any] = dict(grads)
        if self.way == "dense":
            for name, rows in grads.items():
                given[name] = np.zeros_like(self.tables[name])
                np.add.at(given[name], rows.indices, rows.values)
        start = time.perf_counter()
        self.sgd.step(given)
        self.seconds[-1] += time.perf_counter() - start
        self.seconds.append(0.0)


def compare(
    train: Callable[..., WatchedSGD], quality: Callable[[Tables], str], epochs: int
) -> Tables:
    """Train in the ways the command line asks for, print how they end; return the first's tables.

    The time is that of the optimizer alone, without what it takes to make a dense gradient.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--dense", action="store_true", help="dense gradients only")
    parser.add_argument("--lazy", choices=["exact", "rows"], help="rows only, in this way")
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    args = parser.parse_args()
    ways = ["dense"] if args.dense else [args.lazy] if args.lazy else ["exact", "dense", "rows"]
    first: Tables = {}
    for way in ways:
        opt = train(way, args.epochs, args.seed, args.dtype)
        opt.sgd.catch_up()
        first = first or opt.tables
        line = f"{way:5}: {quality(opt.tables)}, {1e6 * np.median(opt.seconds[:-1]):.0f} µs a step"
        if way != ways[0]:
            line += f", {apart(opt.tables, first):.0e} from {ways[0]}"
        print(line)
    return first


def apart(tables: Tables, others: Tables) -> float:
    """Return the largest difference, as a share of the table's largest entry."""
    return max(float(abs(x - others[name]).max() / abs(x).max()) for name, x in tables.items())
