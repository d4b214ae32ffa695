"""The types: strict over sources and examples, and the stubs against what was compiled."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy", reason="mypy is missing")

ROOT = Path(__file__).parent.parent


def run_clean(*command, cwd):
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_mypy_strict():
    pytest.importorskip("numba", reason="numba is missing; an example takes its types from it")
    files = [*ROOT.glob("python/optcore/*.py"), *ROOT.glob("examples/*.py")]
    run_clean("mypy", "--strict", *map(str, files), cwd=ROOT)


def test_stubs_are_what_was_compiled(tmp_path):
    allowlist = Path(__file__).with_name("stubtest_allowlist.txt")
    # Nothing of PyTorch's or scikit-learn's is compared; to read their types takes long.
    config = tmp_path / "mypy.ini"
    config.write_text(
        "[mypy]\nstrict = True\ndisable_error_code = has-type\n"
        "[mypy-torch.*,sklearn.*]\nfollow_imports = skip\nfollow_imports_for_stubs = True\n"
        "ignore_missing_imports = True\n"
    )
    # From a folder of its own: the sources' package would hide the installed one.
    run_clean("mypy.stubtest", "optcore", "--allowlist", str(allowlist),
              "--mypy-config-file", str(config), cwd=tmp_path)


def test_wrong_use_is_an_error(tmp_path):
    """The stubs say enough for mypy to refuse what the package refuses."""
    source = tmp_path / "wrong.py"
    source.write_text(
        "import numpy as np\nimport optcore\nfrom optcore import kernels\n"
        "x, y = np.ones(3, np.float32), np.ones(3)\n"
        "optcore.sgd_step(x, x.copy())\n"
        "optcore.sgd_step(x, x.copy(), 0.1)\n"
        "optcore.sgd_step(np.ones(3, np.int64), np.ones(3, np.int64), lr=0.1)\n"
        "kernels.make_options(learning_rate=0.1)\n"
        "optcore.SGD(x, lr='0.1')\n"
    )
    done = subprocess.run([sys.executable, "-m", "mypy", "--strict", str(source)],
                          cwd=tmp_path, capture_output=True, text=True, check=False)
    assert [int(line.split(":")[1]) for line in done.stdout.splitlines()
            if ": error:" in line] == [5, 6, 7, 8, 9], done.stdout
