"""What was compiled and what is installed."""
from __future__ import annotations

import importlib.machinery
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import optcore
import optcore.sweep
from optcore.runtime import simd_levels_built

FUSED = re.compile(r"\b(v?fn?m(add|sub)\w*|fml[as]\w*|vfm[as]\w*)\b")


def test_no_fused_multiply_add_in_the_kernels():
    if not shutil.which("objdump"):
        pytest.skip("objdump is missing")
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", optcore.sweep.__file__],
        capture_output=True, text=True, check=True,
    ).stdout
    assert re.search(r"\bv?mulps\b|\bfmul\b", listing)      # it is a listing of arithmetic
    assert not FUSED.search(listing), FUSED.search(listing).group()


def test_the_search_would_find_one():
    for name in ("vfmadd231ps", "vfnmadd132sd", "fmadd", "fmla", "vfmsub213pd", "fmls"):
        assert FUSED.search(f"  12: {name} %zmm0,%zmm1")


@pytest.mark.skipif(sys.platform != "linux" or "x86_64" not in
                    importlib.machinery.EXTENSION_SUFFIXES[0], reason="knows x86-64 Linux")
def test_every_level_is_built():
    assert simd_levels_built() == ("baseline", "avx2", "avx512")


CONTROL = """
import ctypes
fenv = ctypes.create_string_buffer(64)
libm = ctypes.CDLL(None)
def word():
    libm.fegetenv(fenv)
    # x86-64: the x87 control word, and MXCSR less its six sticky flags
    return fenv.raw[:2], int.from_bytes(fenv.raw[28:32], "little") & ~0x3F
"""


@pytest.mark.skipif(sys.platform != "linux" or "x86_64" not in
                    importlib.machinery.EXTENSION_SUFFIXES[0], reason="knows x86-64 Linux")
def test_floating_point_environment_is_left_alone():
    code = CONTROL + (
        "import numpy as np\nbefore = word()\nimport optcore\nassert word() == before\n"
        "x = np.full(200_000, 1e-40, np.float32)\n"
        "opt = optcore.SGD(x, lr=0.5, momentum=0.5, max_norm=1.0, ema_decay=0.5)\n"
        "opt.step(x.copy()); optcore.sgd_step(x, x.copy(), lr=0.5)\n"
        "assert word() == before\nassert (x != 0).all()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_package_carries_what_others_compile_and_check_against():
    folder = Path(optcore.__file__).parent
    for name in ("include/optcore.h", "kernels.pxd", "py.typed", "functional.pyi", "kernels.pyi",
                 "plan.pyi", "runtime.pyi"):
        assert (folder / name).is_file(), name
    assert not list(folder.glob("*.c"))


def test_installed_package_is_under_test():
    assert optcore.__file__ is not None
    assert Path(optcore.sweep.__file__).parent == Path(optcore.__file__).parent or (
        "site-packages" not in optcore.__file__
    )


def test_a_star_brings_the_public_names_alone():
    names = {}
    exec("from optcore import *", names)
    assert "__version__" in names
    assert set(names) - {"__builtins__"} == set(optcore.__all__)
    assert {"SGD", "momentum_step", "set_num_threads"} < set(names)
    assert not {"plan", "functional", "TYPE_CHECKING"} & set(names)
    assert dir(optcore) == sorted(optcore.__all__)


def test_numpy_is_the_only_dependency():
    from importlib.metadata import requires

    required = [r for r in requires("optcore") if "extra ==" not in r]
    assert [re.split(r"[<>=!~ ]", r)[0] for r in required] == ["numpy"]


def test_import_needs_only_numpy():
    code = (
        "import sys, optcore\n"
        "roots = {m.split('.')[0] for m in sys.modules}\n"
        "extra = {'sklearn', 'scipy', 'matplotlib', 'rich', 'torch', 'hypothesis'} & roots\n"
        "assert not extra, extra\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_docstring_examples():
    import doctest

    from optcore.kernels import make_options

    for target in (optcore.sgd_step, optcore.SGD, optcore.get_include, make_options):
        finder = doctest.DocTestFinder(recurse=False)
        for case in finder.find(target, target.__name__, globs={"np": np, "optcore": optcore}):
            assert doctest.DocTestRunner().run(case).failed == 0


def test_import_analysis_finds_every_module():
    """What bundles applications reads Python alone; what the compiled modules import, it misses."""
    from modulefinder import ModuleFinder

    code = "import sys, optcore; print(*(m for m in sys.modules if m.startswith('optcore.')))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                            check=True).stdout.split()
    folder = Path(optcore.__file__).parent
    compiled = [f"optcore.{path.name.split('.')[0]}" for path in folder.iterdir()
                if path.name.endswith(tuple(importlib.machinery.EXTENSION_SUFFIXES))]
    assert {"optcore.kernels", "optcore.plan"} <= set(loaded) & set(compiled)
    finder = ModuleFinder([str(folder.parent)], excludes=["numpy"])
    finder.import_hook("optcore")
    assert set(loaded) | set(compiled) <= set(finder.modules)
