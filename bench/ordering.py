"""In which order a suite runs."""
from __future__ import annotations

from collections.abc import Iterable

import pytest
from cases import Case
from contenders import Contender

# From here on a step takes a tenth of a second: one repeat less, for it drifts less too.
LONG_BYTES = 1_000_000_000


def interleave(
    metafunc: pytest.Metafunc, cases: Iterable[Case], contenders: Iterable[Contender]
) -> None:
    """Parametrize a test so that one case's contenders run next to each other, several times.

    What else the machine does drifts over seconds: contenders measured side by side, again and
    again, meet the same drift, and the ratio of two is taken repeat by repeat.
    """
    most = metafunc.config.getoption("--repeats")
    rows = [
        (case, repeat, contender)
        for case in cases
        for repeat in range(most if case.n_bytes < LONG_BYTES else max(1, most - 1))
        for contender in contenders
        if contender.takes(case)
    ]
    ids = [
        f"{case.job}-{case.workload}-{case.dtype}-{case.threads}-{repeat}-{contender.name}"
        for case, repeat, contender in rows
    ]
    metafunc.parametrize(("case", "repeat", "contender"), rows, ids=ids)
