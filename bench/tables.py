"""Tables of which a step touches some rows, others in each: what the rows suite works on."""
from __future__ import annotations

from functools import cached_property

import numpy as np
from cases import (
    LR,
    MOMENTUM,
    PERIOD,
    RULES,
    TOUCHED,
    WIDTH,
    Arrays,
    Case,
    Run,
    fresh_empty,
    length_of,
)

import reference

# Row numbers of all sets together: their rows are several times what caches hold.
ROTATION = 200_000
# The table whose steps are measured beside those of larger ones
SMALL = "1e5"
# Those whose dense gradient is measured, too
WITH_DENSE = ("1e5", "1e6")
# Dense gradients are formed beforehand, of so few sets: their rows are the least of such a step.
DENSE_SETS = 8
# What is compared of rows that no step touched
UNTOUCHED = 1000
# Zipf's ranks are spread over the table, neighbours far apart: a prime, so that no two meet.
SPREAD = 2_654_435_761


class Table(Arrays):
    """A table where a fresh process has it, and sets of row numbers that steps go through."""

    def __init__(self, case: Case) -> None:
        self.case = case
        rng = np.random.default_rng(7)
        n, touched = length_of(case.workload), TOUCHED[case.touched]
        self.pattern = {"x": rng.standard_normal(PERIOD, np.float32)}
        self.x = [fresh_empty((n, WIDTH), case.dtype)]
        self.g = self.sets = []         # a dense gradient only for those who take one
        self.values = rng.standard_normal((touched.n, WIDTH), np.float32)
        drawn = rng.random((ROTATION // touched.n, touched.n))
        # The whole of a power of n + 1 is k about as often as 1 / k says
        self._indices = (
            ((n + 1) ** drawn).astype(np.int64) * SPREAD if touched.zipf
            else (drawn * n).astype(np.int64)
        ) % n
        self.indices = list(self._indices)

    def gradient(self, indices: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return a set's gradient of rows in order, what is one row's added as it comes."""
        g = np.zeros((len(rows), WIDTH), np.float32)
        np.add.at(g, np.searchsorted(rows, indices), self.values)
        return g

    @cached_property
    def gradients(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """The first sets' rows, each once, and their gradients."""
        named = [(indices, np.unique(indices)) for indices in self.indices[:DENSE_SETS]]
        return [(rows, self.gradient(indices, rows)) for indices, rows in named]

    @cached_property
    def compared(self) -> np.ndarray:
        """Row numbers in order: all that two steps touch, and some of the others."""
        others = np.linspace(0, len(self.x[0]) - 1, UNTOUCHED).astype(np.int64)
        return np.unique(np.concatenate([*self.indices[:2], others]))

    @cached_property
    def expected(self) -> np.ndarray:
        """The compared rows after two dense steps."""
        return self.after_two()

    def after_two(self, rule: str = "momentum", *, lazy: bool = False) -> np.ndarray:
        """Return as much after steps of another rule, or of those rows alone that are touched."""
        options = reference.Options(lr=LR, momentum=MOMENTUM if RULES[rule].has_momentum else 0)
        at = self.compared[:, None] * WIDTH + np.arange(WIDTH)
        x = self.pattern["x"][at % PERIOD]
        states = [np.zeros_like(x) for _ in RULES[rule].states]
        for indices in self.indices[:2]:
            g = self.gradient(indices, self.compared)
            moved = np.isin(self.compared, indices) if lazy else slice(None)
            x[moved], new = RULES[rule].reference(
                x[moved], g[moved], [state[moved] for state in states], options
            )
            for state, value in zip(states, new, strict=True):
                state[moved] = value
        return x

    def check(self, run: Run, *, exact: bool) -> None:
        """Take two steps and compare rows with the reference's: bits, or closeness.

        Raises
        ------
        AssertionError
            Where they differ; nothing may be timed then.
        """
        run.step()
        run.step()
        (x,) = run.params()
        found, want = x[self.compared], self.expected if run.expected is None else run.expected
        if exact:
            same = (found.view(np.uint32) == want.view(np.uint32)).all(axis=1)
        else:
            # A few ulp at the largest values, and one for each addition to the same row
            most = max(np.bincount(indices).max() for indices in self.indices[:2])
            tolerance = (16 + most) * np.finfo(x.dtype).eps * np.abs(want).max()
            same = (np.abs(found - want) <= tolerance).all(axis=1)
        wrong = self.compared[~same]
        assert not wrong.size, f"row {wrong[0]} is not what the reference has"
