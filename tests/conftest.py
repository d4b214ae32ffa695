"""Guard, fixtures and the count of compared cases."""
from __future__ import annotations

import importlib.util
import multiprocessing
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import optcore
from optcore.runtime import always_threaded, simd, simd_levels_available

if optcore.__file__ is None:
    raise RuntimeError(
        "optcore here is the folder of sources, not the package: install it first (make test does)"
    )

FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
if FREE_THREADED and sys._is_gil_enabled():
    raise RuntimeError("importing optcore has brought the GIL back")

_cases = pytest.StashKey[dict]()


def pytest_addoption(parser):
    parser.addoption("--apart", action="store_true",
                     help="run what else runs in a process of its own, and only that")
    parser.addoption("--times", type=int, default=1, help="so many times the random cases of bits")


def pytest_configure(config):
    config.addinivalue_line("markers", "apart: is run by a process beside, see begin_apart")
    config.stash[_cases] = {"compared": 0, "mismatched": 0}


def pytest_collection_modifyitems(config, items):
    """Leave tests that run apart to the process that runs those, where one shall be begun."""
    chosen = config.getoption("--apart")
    begins = any("apart" in getattr(item, "fixturenames", ()) for item in items)
    if chosen or begins:
        left_out = [item for item in items if (item.get_closest_marker("apart") is None) is chosen]
        config.hook.pytest_deselected(items=left_out)
        out = set(left_out)
        items[:] = [item for item in items if item not in out]
    items.sort(key=lambda item: "apart" in getattr(item, "fixturenames", ()))   # waits longest


def pytest_sessionfinish(session):
    if FREE_THREADED and sys._is_gil_enabled():     # by a module that does not declare itself
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    count = config.stash[_cases]
    terminalreporter.write_line(
        f"bits: {count['compared']} cases compared with the reference, "
        f"{count['mismatched']} mismatches; SIMD levels {', '.join(simd_levels_available())}"
        + "; no GIL" * (FREE_THREADED and not sys._is_gil_enabled())
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


@pytest.fixture
def count_cases(request):
    """Count so many cases more that agreed."""
    count = request.config.stash[_cases]
    return lambda n: count.update(compared=count["compared"] + n)


@pytest.fixture
def times(request):
    return request.config.getoption("--times")


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


# Long work of other processes, once for all tests: it begins before the first of them, and the
# fixture of that name awaits it.

TESTS = Path(__file__).parent
EXAMPLES = TESTS.parent / "examples"
CXX = (os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++").split()[0]
HAS_CXX = os.name == "nt" or shutil.which(CXX) is not None

_begun = pytest.StashKey[dict]()


def pytest_collection_finish(session):
    if session.config.option.collectonly:
        return
    wanted = {name for item in session.items for name in getattr(item, "fixturenames", ())}
    factory = session.config._tmp_path_factory
    session.config.stash[_begun] = {
        name: begin(factory) for name, begin in BEGINNINGS.items() if name in wanted
    }


def begin_gallery(factory):
    """The gallery as it is built for readers, but for the number of the network's seeds."""
    from lecture.build import build

    out = factory.mktemp("gallery")
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    done = pool.submit(build, out, seeds=2)
    pool.shutdown(wait=False)
    return out, done


@pytest.fixture(scope="session")
def gallery(request):
    """The folder of the gallery, the stories and the checks."""
    out, done = request.config.stash[_begun]["gallery"]
    return out, *done.result()


def begin_builds(factory):
    """Extensions compiled against the installed package."""
    if importlib.util.find_spec("setuptools") is None or importlib.util.find_spec("Cython") is None:
        return None
    sources = [TESTS / "embedding", EXAMPLES / "embed_c", EXAMPLES / "embed_cython"]
    if HAS_CXX:
        sources.append(EXAMPLES / "embed_cpp")
    running = {}
    for source in sources:
        folder = factory.mktemp(source.name) / "build"
        shutil.copytree(source, folder)
        running[source] = folder, subprocess.Popen(
            [sys.executable, "setup.py", "build_ext", "--inplace"], cwd=folder, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, "OPTCORE_SOURCES": str(TESTS.parent),
                 **({} if HAS_CXX else {"NO_CXX": "1"})},
        )
    return running


@pytest.fixture(scope="session")
def build(request):
    """Return how to get a folder that holds the built extensions of ``source``, a folder too."""
    running = request.config.stash[_begun]["build"]
    if running is None:
        pytest.skip("building against optcore needs setuptools and Cython")
    done = {}
    for source, (folder, process) in running.items():
        output = process.communicate(timeout=240)[0]
        done[source] = folder, process.returncode, output

    def built(source):
        folder, status, output = done[source]
        assert status == 0, output
        return folder

    return built


def begin_site(factory):
    """The documentation as readers have it, every warning being an error."""
    if any(importlib.util.find_spec(name) is None for name in ("sphinx", "myst_parser", "furo")):
        return None
    out = factory.mktemp("site")
    return out, subprocess.Popen(
        [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-d", f"{out}/.doctrees",
         TESTS.parent / "docs", out],
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )


@pytest.fixture(scope="session")
def site(request):
    """The folder of the documentation's pages."""
    begun = request.config.stash[_begun]["site"]
    if begun is None:
        pytest.skip("needs the extra 'docs'")
    out, process = begun
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output
    return out


def begin_types(factory):
    """mypy over sources and examples, then the stubs against what was compiled."""
    if any(importlib.util.find_spec(name) is None for name in ("mypy", "flwr")):
        return None
    # From a folder of its own, for the sources' package would hide the installed one. Nothing of
    # Flower's, PyTorch's or scikit-learn's is compared with the stubs; to read types takes long.
    folder = factory.mktemp("types")
    config = folder / "mypy.ini"
    config.write_text(
        "[mypy]\nstrict = True\ndisable_error_code = has-type\n"
        "[mypy-flwr.*,torch.*,sklearn.*]\nfollow_imports = skip\nfollow_imports_for_stubs = True\n"
        "ignore_missing_imports = True\n"
    )
    files = [*TESTS.parent.glob("python/optcore/*.py"), *EXAMPLES.glob("*.py")]
    pool = ThreadPoolExecutor(1)
    running = {
        command[0]: pool.submit(
            subprocess.run, [sys.executable, "-m", *map(str, command)], cwd=cwd, text=True,
            capture_output=True, check=False,
        )
        for command, cwd in [
            (["mypy", "--strict", *files], TESTS.parent),
            (["mypy.stubtest", "optcore", "--allowlist", TESTS / "stubtest_allowlist.txt",
              "--mypy-config-file", config], folder),
        ]
    }
    pool.shutdown(wait=False)
    return running


@pytest.fixture(scope="session")
def types(request):
    """The ends of mypy and mypy.stubtest."""
    begun = request.config.stash[_begun]["types"]
    if begun is None:
        pytest.skip("needs mypy, and Flower, from which a strategy takes its types")
    return {name: done.result() for name, done in begun.items()}


def begin_federation(factory):
    """The example for Flower on processes of its own, which wait most of the time."""
    if any(importlib.util.find_spec(name) is None for name in ("flwr", "sklearn")):
        return None
    command = [EXAMPLES / "digits_flower" / "loopback.py", "--clients", "2", "--rounds", "2",
               "--least-accuracy", "0.8", "--seconds", "270"]
    return subprocess.Popen([sys.executable, *map(str, command)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.fixture(scope="session")
def federation(request):
    """What the example for Flower has printed."""
    process = request.config.stash[_begun]["federation"]
    if process is None:
        pytest.skip("needs the extras 'flower' and 'sklearn'")
    output = process.communicate(timeout=285)[0]
    assert process.returncode == 0, output
    return output


def begin_apart(factory):
    """The tests that are marked so, on the other core."""
    out = factory.mktemp("apart") / "report"
    with out.open("w") as report:
        return out, subprocess.Popen(
            [sys.executable, "-m", "pytest", "--apart", "-q", "-p", "no:cacheprovider", str(TESTS)],
            cwd=TESTS.parent, text=True, stdout=report, stderr=subprocess.STDOUT,
        )


@pytest.fixture(scope="session")
def apart(request):
    """The status and the report of the tests that run apart."""
    out, process = request.config.stash[_begun]["apart"]
    return process.wait(timeout=290), out.read_text()


BEGINNINGS = {
    "gallery": begin_gallery, "build": begin_builds, "site": begin_site, "types": begin_types,
    "federation": begin_federation, "apart": begin_apart,
}


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
