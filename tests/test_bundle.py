"""PyInstaller: an application that brings its own Python, and all of optcore that it needs."""
from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("PyInstaller", reason="PyInstaller is missing")

APPLICATION = """
import numpy as np
import optcore

x, g = np.ones(1000, np.float32), np.full(1000, 0.5, np.float32)
v = np.zeros_like(x)
expected = x.copy()
opt = optcore.SGD({"w": x}, lr=0.1, momentum=0.9)
for _ in range(3):
    opt.step({"w": g})
    v = np.float32(0.9) * v + g
    expected = expected - np.float32(0.1) * v
assert x.tobytes() == expected.tobytes()
opt.save("state")
assert optcore.SGD.load("state", {"w": x}).step_count == 3
try:
    opt.step({"w": g[:1]})
except ValueError as error:
    assert "has shape (1,)" in str(error), error
else:
    raise AssertionError("a gradient of another shape")
import sys
print("bundled" if hasattr(sys, "_MEIPASS") else "not bundled", optcore.__file__)
optcore.show_config()
"""


def test_a_bundle_steps(tmp_path):
    source, apart = tmp_path / "trainer.py", tmp_path / "apart"
    source.write_text(APPLICATION)
    apart.mkdir()
    subprocess.run(
        [sys.executable, "-m", "PyInstaller", "--noconfirm", "--log-level=WARN", "--distpath",
         str(tmp_path / "dist"), "--workpath", str(tmp_path / "work"), "--specpath",
         str(tmp_path), str(source)],
        cwd=tmp_path, check=True,
    )
    done = subprocess.run(
        [str(tmp_path / "dist/trainer/trainer")], cwd=apart, capture_output=True, text=True,
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"bundled {tmp_path}")
