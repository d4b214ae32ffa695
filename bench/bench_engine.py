"""The engine against NumPy: each rule, dtype, length and SIMD level, on one thread."""
from __future__ import annotations

from cases import RULES, Case
from contenders import ENGINE
from ordering import interleave

LENGTHS = ["1e3", "1e5", "1e6", "1e7", "5e7"]
QUICK_LENGTHS = ["1e3", "1e6"]


def pytest_generate_tests(metafunc):
    lengths = QUICK_LENGTHS if metafunc.config.getoption("--quick") else LENGTHS
    interleave(
        metafunc,
        ([
            Case(job, length, dtype)
            for dtype in ("float32", "float64") for length in lengths for job in RULES
        ], ENGINE),
    )


def test_step(measure, case, repeat, contender):
    measure(case, repeat, contender)
