"""optcore, PyTorch, scikit-learn and Numba in one process, in whatever order they are imported.

Where OPTCORE_RUNS is 20, each of the 24 orders has twenty runs; else two of them have one, in which
optcore is the first and the last. tests/wheels.sh does the former, on a wheel that brings a copy
of libgomp.
"""
from __future__ import annotations

import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import optcore

if sys.platform != "linux":
    pytest.skip("looks into /proc", allow_module_level=True)
if optcore.show_config("dicts")["openmp"].startswith("missing"):
    pytest.skip("built without OpenMP", allow_module_level=True)
PACKAGES = ("optcore", "torch", "sklearn", "numba")
for name in (*PACKAGES, "threadpoolctl"):
    pytest.importorskip(name, reason=f"{name} is missing")

RUNS = os.environ.get("OPTCORE_RUNS")
ORDERS = list(itertools.permutations(PACKAGES)) if RUNS else [
    PACKAGES, PACKAGES[::-1]
]
GRAFTED = list(Path(optcore.__file__).parent.with_name("optcore.libs").glob("libgomp*"))


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """Return how to wait for a process with that order; a few run at once."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("OMP_")},
        "NUMBA_CACHE_DIR": str(tmp_path_factory.mktemp("numba")),
    }

    def run(order):
        program = Path(__file__).with_name("one_process.py")
        return subprocess.run(
            [sys.executable, str(program), RUNS or "1", *order],
            capture_output=True, text=True, check=False, env=environment,
        )

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        running = {order: pool.submit(run, order) for order in ORDERS}
        yield lambda order: running[order].result()


@pytest.mark.parametrize("order", ORDERS, ids=", ".join)
def test_import_order(outcome, order):
    done = outcome(order)
    assert done.returncode == 0, done.stdout + done.stderr
    for library in GRAFTED:
        assert str(library) in done.stdout
