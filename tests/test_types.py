"""The types: strict over sources and examples, and the stubs against what was compiled."""
from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("mypy", reason="mypy is missing")


def check(done):
    assert done.returncode == 0, done.stdout + done.stderr


def test_mypy_strict(types):
    pytest.importorskip("numba", reason="numba is missing; an example takes its types from it")
    check(types["mypy"])


def test_stubs_are_what_was_compiled(types):
    check(types["mypy.stubtest"])


def test_wrong_use_is_an_error(tmp_path):
    """The stubs say enough for mypy to refuse what the package refuses."""
    source = tmp_path / "wrong.py"
    source.write_text(
        "import numpy as np\nimport optcore\nfrom optcore import kernels\n"
        "x, y = np.ones(3, np.float32), np.ones(3)\n"
        "half, bits = x.astype(np.float16), np.ones(3, np.uint16).view(optcore.bfloat16)\n"
        "optcore.sgd_step(x, x.copy())\n"
        "optcore.sgd_step(x, x.copy(), 0.1)\n"
        "optcore.sgd_step(x, np.ones(3, np.int64), lr=0.1)\n"
        "kernels.make_options(learning_rate=0.1)\n"
        "optcore.SGD(x, lr='0.1')\n"
        # and take what it takes
        "optcore.momentum_step(bits, half, x, lr=0.1, momentum=0.9, rounding='nearest')\n"
        "optcore.SGD([half, bits, x, y], lr=0.1).step([x, half, bits, y])\n"
        "optcore.SGD(x, lr=0.1).step(bits)\n"
    )
    done = subprocess.run([sys.executable, "-m", "mypy", "--strict", str(source)],
                          cwd=tmp_path, capture_output=True, text=True, check=False)
    assert [int(line.split(":")[1]) for line in done.stdout.splitlines()
            if ": error:" in line] == [6, 7, 8, 9, 10], done.stdout
