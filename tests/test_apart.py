"""What the process beside has found; see `conftest.begin_apart`."""
from __future__ import annotations

import re


def test_what_runs_apart(apart, count_cases):
    status, report = apart
    assert status == 0, report[-20_000:]
    found = re.search(r"bits: (\d+) cases compared with the reference, 0 mismatches", report)
    count_cases(int(found[1]))
