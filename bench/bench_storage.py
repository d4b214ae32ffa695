"""Narrow storage: each against float32, a limit of its own traffic, and PyTorch where it can."""
from __future__ import annotations

import peers
import pytest
from cases import STORAGES, Case
from contenders import OPTCORE, OPTCORE_WIDE
from limit import NoCompilerError, limit_contender
from ordering import interleave

LENGTHS = ["1e6", "5e7"]
QUICK_LENGTHS = ["1e6"]


@pytest.fixture(scope="session", autouse=True)
def threads(request):
    """Tell PyTorch once how many threads this run is about."""
    peers.set_threads(request.config.getoption("--threads"))


def pytest_generate_tests(metafunc):
    option = metafunc.config.getoption
    wrong = peers.wrong()
    right = [c for c in peers.installed() if c.name in peers.HALVES and c.name not in wrong]
    groups = []
    for name, stored in STORAGES.items():
        cases = [
            Case(job, length, threads=option("--threads"), storage=name)
            for length in (QUICK_LENGTHS if option("--quick") else LENGTHS)
            # SGD has no velocity to differ by
            for job in ("momentum", *["sgd"] * ("velocity" not in name))
        ]
        ours = [*[OPTCORE_WIDE] * (name != "float32"), *OPTCORE[:1]]
        theirs = right if stored.same == "bfloat16" else []
        groups.append((cases, [limit_contender(option("--build-folder")), *ours, *theirs]))
    interleave(metafunc, *groups)


def test_step(measure, case, repeat, contender):
    try:
        measure(case, repeat, contender)
    except NoCompilerError as reason:
        pytest.skip(str(reason))
