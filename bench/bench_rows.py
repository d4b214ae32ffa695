"""Rows of a table: beside dense steps, PyTorch, NumPy and the limit of random rows."""
from __future__ import annotations

import peers
import pytest
from cases import ROWS, TOUCHED, WIDTH, Case, length_of
from contenders import NUMPY_ROWS, OPTCORE_DENSE, OPTCORE_ROWS
from limit import NoCompilerError, rows_limit_contender
from machine import free_memory
from ordering import interleave

LENGTHS = ["1e5", "1e6", "1e7"]
QUICK_LENGTHS = ["1e5"]
QUICK_ROWS = ["1,000 rows, Zipf"]
# A table and, until it is freed, that of the case before; the limit's two, or velocity and gradient
TABLES = 4


@pytest.fixture(scope="session", autouse=True)
def threads(request):
    """Tell PyTorch once how many threads this run is about."""
    peers.set_threads(request.config.getoption("--threads"))


def fits(case: Case) -> bool:
    """Return whether there is memory for all tables that are there at once."""
    return 4 * WIDTH * length_of(case.workload) * TABLES < free_memory()


def pytest_generate_tests(metafunc):
    option = metafunc.config.getoption
    quick = option("--quick")
    cases = [
        Case(ROWS, length, threads=option("--threads"), touched=name)
        for length in (QUICK_LENGTHS if quick else LENGTHS)
        for name in (QUICK_ROWS if quick else TOUCHED)
    ]
    # The limit goes right before optcore: the two are compared most closely.
    everyone = [
        rows_limit_contender(option("--build-folder")), *OPTCORE_ROWS,
        *peers.with_torch(peers.IN_ROWS), *NUMPY_ROWS, OPTCORE_DENSE,
    ]
    interleave(metafunc, (filter(fits, cases), everyone))


def test_step(measure, case, repeat, contender):
    try:
        measure(case, repeat, contender)
    except NoCompilerError as reason:
        pytest.skip(str(reason))
