"""Guard, fixtures and the count of compared cases."""
from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

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


# What is compiled against the installed package, once for all tests

TESTS = Path(__file__).parent
EXAMPLES = TESTS.parent / "examples"
CXX = (os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++").split()[0]
HAS_CXX = os.name == "nt" or shutil.which(CXX) is not None


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    """Return how to get a folder that holds the built extensions of ``source``, a folder too.

    All are built at the same time, for that is most of what these tests take.
    """
    for package in ("setuptools", "Cython"):
        pytest.importorskip(package, reason=f"building against optcore needs {package}")
    sources = [TESTS / "embedding", EXAMPLES / "embed_c", EXAMPLES / "embed_cython"]
    if HAS_CXX:
        sources.append(EXAMPLES / "embed_cpp")
    running = {}
    for source in sources:
        folder = tmp_path_factory.mktemp(source.name) / "build"
        shutil.copytree(source, folder)
        running[source] = folder, subprocess.Popen(
            [sys.executable, "setup.py", "build_ext", "--inplace"], cwd=folder, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, "OPTCORE_SOURCES": str(TESTS.parent),
                 **({} if HAS_CXX else {"NO_CXX": "1"})},
        )
    done = {}
    for source, (folder, process) in running.items():
        output = process.communicate(timeout=240)[0]
        done[source] = folder, process.returncode, output

    def built(source):
        folder, status, output = done[source]
        assert status == 0, output
        return folder

    return built


@pytest.fixture(scope="session")
def probes(build):
    folder = build(TESTS / "embedding")
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


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
