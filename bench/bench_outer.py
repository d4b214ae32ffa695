"""Outer steps: towards the mean of replicas, beside NumPy as Flower has it, PyTorch, the limit."""
from __future__ import annotations

import peers
import pytest
from cases import OUTER, OUTERS, Case, count_of
from contenders import NUMPY_OUTER
from contenders import OUTERS as OPTCORE_OUTERS
from limit import NoCompilerError, limit_contender
from machine import free_memory
from ordering import interleave

LENGTHS = ["1e6", "2.5e7", "1e8"]
QUICK_LENGTHS = ["1e6"]


@pytest.fixture(scope="session", autouse=True)
def threads(request):
    """Tell PyTorch once how many threads this run is about."""
    peers.set_threads(request.config.getoption("--threads"))


def fits(case: Case) -> bool:
    """Return whether there is memory for the replicas twice, as PyTorch stacks them, and more."""
    return 4 * count_of(case.workload) * (2 * case.replicas.n + 6) < free_memory()


def pytest_generate_tests(metafunc):
    option = metafunc.config.getoption
    cases = [
        Case(OUTER, length, threads=option("--threads"), outer=replicas)
        for length in (QUICK_LENGTHS if option("--quick") else LENGTHS) for replicas in OUTERS
    ]
    # The limit goes right before optcore: the two are compared most closely.
    everyone = [
        limit_contender(option("--build-folder")), *OPTCORE_OUTERS, *peers.with_torch(peers.OUTERS),
        NUMPY_OUTER,
    ]
    interleave(metafunc, (filter(fits, cases), everyone))


def test_step(measure, case, repeat, contender):
    try:
        measure(case, repeat, contender)
    except NoCompilerError as reason:
        pytest.skip(str(reason))
