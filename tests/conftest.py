"""Guard, fixtures and the count of compared cases."""
from __future__ import annotations

import numpy as np
import pytest

import optcore
from optcore.runtime import always_threaded, simd, simd_levels_available

if optcore.__file__ is None:
    raise RuntimeError(
        "optcore here is the folder of sources, not the package: install it first (make test does)"
    )

_cases = pytest.StashKey[dict]()


def pytest_configure(config):
    config.stash[_cases] = {"compared": 0, "mismatched": 0}


def pytest_terminal_summary(terminalreporter, config):
    count = config.stash[_cases]
    terminalreporter.write_line(
        f"bits: {count['compared']} cases compared with the reference, "
        f"{count['mismatched']} mismatches; SIMD levels {', '.join(simd_levels_available())}"
    )


@pytest.fixture
def cases(request):
    """Count compared cases: ``cases(True)`` for one that agreed; False fails the test."""
    count = request.config.stash[_cases]

    def compare(agrees, message="bits differ"):
        count["compared"] += 1
        if not agrees:
            count["mismatched"] += 1
            pytest.fail(str(message() if callable(message) else message))

    return compare


@pytest.fixture(params=simd_levels_available())
def simd_level(request):
    with simd(request.param):
        yield request.param


@pytest.fixture(params=[1, 2, 3, 7])
def threads(request):
    """Run with so many threads even where the arrays are too small to gain."""
    optcore.set_num_threads(request.param)
    with always_threaded():
        yield request.param
    optcore.set_num_threads(None)


@pytest.fixture
def rng():
    return np.random.default_rng(20170425)


_checkpoint_counts = {}


@pytest.fixture(scope="session")
def checkpoint_counts():
    """Counts of damaged checkpoints, for the end of the report."""
    return _checkpoint_counts


class CheckpointReport:
    """Prints what was tried on checkpoints, where anything was."""

    @staticmethod
    def pytest_terminal_summary(terminalreporter):
        if _checkpoint_counts:
            terminalreporter.write_line("checkpoints: " + ", ".join(
                f"{count} {what}" for what, count in _checkpoint_counts.items()
            ))


def pytest_sessionstart(session):
    session.config.pluginmanager.register(CheckpointReport(), "optcore-checkpoints")
