"""In which order a suite runs."""
from __future__ import annotations

from collections.abc import Iterable

import pytest
from cases import Case
from contenders import Contender

# From here on a step takes a tenth of a second: one repeat less, for it drifts less too.
LONG_BYTES = 1_000_000_000
# A training is measured twice as often: how near the cores are to each other changes in minutes.
TRAINING_TIMES = 2


def repeats_of(case: Case, most: int) -> int:
    """Return how often a case is measured, where most are so many times."""
    if case.training:
        return TRAINING_TIMES * most
    return most if case.n_bytes < LONG_BYTES else max(1, most - 1)


def interleave(
    metafunc: pytest.Metafunc, *groups: tuple[Iterable[Case], Iterable[Contender]]
) -> None:
    """Parametrize a test so that one case's contenders run next to each other, several times.

    What else the machine does drifts over seconds: contenders measured side by side, again and
    again, meet the same drift, and the ratio of two is taken repeat by repeat.
    """
    rows = [
        (case, repeat, contender)
        for cases, contenders in groups
        for case in cases
        for repeat in range(repeats_of(case, metafunc.config.getoption("--repeats")))
        for contender in contenders
        if contender.takes(case)
    ]
    ids = [
        f"{case.job}-{case.workload}-{case.variant}-{case.threads}-{repeat}-{contender.name}"
        for case, repeat, contender in rows
    ]
    metafunc.parametrize(("case", "repeat", "contender"), rows, ids=ids)
