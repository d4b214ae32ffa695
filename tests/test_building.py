"""The build: whatever the environment's flags say, the arithmetic is IEEE's or nothing is built.

Small libraries stand for the package: they are compiled by setup.py's own command, with the real
guards of simd.pxd in front.
"""
from __future__ import annotations

import ctypes
import importlib.util
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytest.importorskip("setuptools", reason="setuptools is missing")
pytest.importorskip("Cython", reason="Cython is missing")

from setuptools import Distribution, Extension

ROOT = Path(__file__).parent.parent
CC = (sysconfig.get_config_var("CC") or "cc").split()[0]
GCC = shutil.which(CC) is not None and b"Free Software Foundation" in subprocess.run(
    [CC, "--version"], capture_output=True, check=False
).stdout
GCC_ON_X86 = GCC and platform.machine() == "x86_64"

pytestmark = [
    pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="the sources are not here"),
    pytest.mark.skipif(shutil.which(CC) is None, reason="no compiler that takes GCC's flags"),
]

# Each loosens the arithmetic, and GCC has a macro that tells; clang for some.
LOOSE = [
    "-Ofast", "-ffast-math", "-funsafe-math-optimizations", "-ffinite-math-only",
    "-freciprocal-math", "-fno-signed-zeros",
    "-fassociative-math -fno-signed-zeros -fno-trapping-math",
]

ARITHMETIC = """
/* Each is 1 in IEEE's arithmetic; arguments, so that nothing is known when this is compiled. */
int associates_left(double a, double b) { return (a + b) - b != a; }
int knows_nan(double a) { return a != a; }
int knows_signed_zero(double a) { return 1 / (a + 0.0) > 0; }
int divides(const double *a, double b, double *to) {
  for (int i = 0; i < 64; i++) to[i] = a[i] / b;
  return to[63] == 49.0 / 49.0;
}
#if defined(__x86_64__)
__attribute__((target("fma")))
#endif
int rounds_each(double a, double b) { return a * a + b == 0; }
#if defined(OPTCORE_FLAGS)
const char *flags(void) { return OPTCORE_FLAGS; }
const char *link_flags(void) { return OPTCORE_LINK_FLAGS; }
#endif
"""


@pytest.fixture(scope="module")
def setup_py():
    spec = importlib.util.spec_from_file_location("optcore_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def guards():
    """The C block of simd.pxd, as Cython writes it."""
    source = (ROOT / "optcore/simd.pxd").read_text()
    block = re.search(r'extern from \*:\n    """\n(.*?)"""', source, flags=re.DOTALL).group(1)
    return block.replace("\\\\\n", "\\\n")


@pytest.fixture
def built(setup_py, guards, tmp_path, monkeypatch):
    """Build the arithmetic with setup.py's command under these variables, and load it."""

    def build(**environment):
        for name in ("CC", "CFLAGS", "CPPFLAGS", "LDFLAGS", "LDSHARED", "CL"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        source = tmp_path / "arithmetic.c"
        source.write_text(guards + ARITHMETIC)
        command = setup_py.BuildExt(Distribution(
            {"name": "probe", "ext_modules": [Extension("optcore.runtime", [str(source)])]}
        ))
        command.build_lib = str(tmp_path / "lib")
        command.build_temp = str(tmp_path / "temp")
        command.get_export_symbols = lambda extension: []       # of no module
        command.ensure_finalized()
        command.run()
        return Path(command.get_ext_fullpath("optcore.runtime"))

    return build


ASK = """
import ctypes, sys
from pathlib import Path
library = ctypes.CDLL(sys.argv[1])
double = ctypes.c_double
for name in ("associates_left", "knows_nan", "knows_signed_zero", "rounds_each"):
    getattr(library, name).argtypes = [double, double]
library.divides.argtypes = [ctypes.c_void_p, double, ctypes.c_void_p]
a, to = (double * 64)(*[49.0] * 64), (double * 64)()
uneven = 1 + 2.0**-30
cpu = Path("/proc/cpuinfo")
found = {
    "associates": library.associates_left(1.0, 1e20),
    "nan": library.knows_nan(float("nan"), 0),
    "signed zero": library.knows_signed_zero(-0.0, 0),
    "divides": library.divides(a, 49.0, to),
    "rounds each": (cpu.exists() and "flags" in cpu.read_text() and " fma " not in cpu.read_text())
        or library.rounds_each(uneven, -(uneven * uneven)),
    "subnormals": sys.float_info.min / 2 > 0,
}
print(*[name for name, ieee in found.items() if not ieee], sep=", ", end="")
"""


def loosened(library):
    """What is not IEEE's in a process of its own that loads the library."""
    return subprocess.run([sys.executable, "-c", ASK, str(library)], capture_output=True,
                          text=True, check=True).stdout


@pytest.mark.parametrize("environment", [
    {"CFLAGS": "-Ofast -ffp-contract=fast"},
    {"CFLAGS": "-O2 -freciprocal-math", "CPPFLAGS": "-fno-signed-zeros -ffinite-math-only"},
    {"CC": f"{CC} -ffast-math"},
    {"LDFLAGS": "-Ofast"},
    {"LDFLAGS": "-ffast-math", "CFLAGS": "-O0 -g"},
    {"LDSHARED": f"{CC} -shared -funsafe-math-optimizations"},
], ids=lambda environment: " ".join(f"{n}={v}" for n, v in environment.items()))
def test_the_build_resists(built, environment):
    assert loosened(built(**environment)) == ""


def test_the_questions_would_find_it(tmp_path):
    source, library = tmp_path / "arithmetic.c", tmp_path / "arithmetic.so"
    source.write_text(ARITHMETIC)
    subprocess.run([CC, "-O2", "-ffast-math", "-ffp-contract=fast", "-shared", "-fPIC",
                    str(source), "-o", str(library)], check=True)
    found = loosened(library).split(", ")
    assert {"associates", "nan", "signed zero", "divides"} <= set(found)
    if GCC_ON_X86:
        assert "rounds each" in found


def compiles(code, flags):
    done = subprocess.run([CC, "-fsyntax-only", *flags, "-x", "c", "-"], input=code, text=True,
                          capture_output=True, check=False)
    if "unrecognized" in done.stderr or "unknown argument" in done.stderr:
        pytest.skip(f"{CC} has no {' '.join(flags)}")
    return done.returncode == 0 or done.stderr


@pytest.mark.parametrize("flag", LOOSE)
def test_the_guards_refuse_what_our_flags_take_back(setup_py, guards, flag):
    if GCC:
        assert "IEEE" in compiles(guards, flag.split())
    assert compiles(guards, [*flag.split(), *setup_py.FLAGS["unix"]]) is True


@pytest.mark.skipif(not GCC_ON_X86, reason="GCC's flags for x86")
@pytest.mark.parametrize(("flag", "why"), [
    ("-mfpmath=387", "SSE arithmetic"), ("-mfpmath=both", "SSE arithmetic"),
    ("-fsingle-precision-constant", "constants_are_double"),
])
def test_the_guards_refuse_what_no_flag_takes_back(setup_py, guards, flag, why):
    assert why in compiles(guards, [flag, *setup_py.FLAGS["unix"]])


def test_the_guards_let_all_else_pass(setup_py, guards):
    for flags in ([], ["-O0", "-g"], ["-frounding-math"], ["-fno-trapping-math"], ["-O2"]):
        assert compiles(guards, flags) is True, flags


@pytest.mark.skipif(not GCC_ON_X86, reason="GCC's flags for x86")
def test_a_library_that_changes_the_process_is_refused(built, tmp_path):
    """A wrapper has the last word, and no flag takes -mpc32 back."""
    wrapper = tmp_path / "cc"
    wrapper.write_text(f'#!/bin/sh\nexec {CC} "$@" -ffast-math\n')
    wrapper.chmod(0o755)
    with pytest.raises(SystemExit, match=r"flushes the subnormal .* in LDSHARED='.*/cc -shared'"):
        built(LDSHARED=f"{wrapper} -shared")
    with pytest.raises(SystemExit, match=r"cuts the precision .* in LDFLAGS='-mpc32'"):
        built(LDFLAGS="-mpc32")


@pytest.mark.parametrize(("environment", "level"), [
    ({}, "-O3"),
    ({"CFLAGS": "-O2 -g"}, "-O3"),                  # of distributions: GCC's loops half as wide
    ({"CFLAGS": "-Ofast"}, "-O3"),
    ({"CFLAGS": "-O0 -Ofast"}, "-O3"),
    ({"CFLAGS": "-O0 -g"}, "-O0"),
    ({"CFLAGS": "-O3 -Og"}, "-Og"),
    ({"CFLAGS": "-O3", "CPPFLAGS": "-O1"}, "-O1"),
    ({"CC": "gcc -Os"}, "-Os"),
    ({"CFLAGS": "-DX='-O0 '"}, "-O3"),
])
def test_optimization(setup_py, environment, level):
    assert setup_py.optimization(environment) == level


def test_flags_are_recorded_as_they_were_used(built):
    library = ctypes.CDLL(str(built(
        CFLAGS="""-O0 -g -DNAME='"a b"'""", LDFLAGS="-L/nowhere", CPPFLAGS="-DOTHER"
    )))
    library.flags.restype = library.link_flags.restype = ctypes.c_char_p
    words = shlex.split(library.flags().decode())
    assert words[0] == CC
    assert [word for word in words if word.startswith("-O")][-1] == "-O0"
    assert {"-g", '-DNAME="a b"', "-DOTHER", "-fno-fast-math"} < set(words)
    assert "-L/nowhere" in shlex.split(library.link_flags().decode())


def test_a_build_without_openmp_says_so(setup_py, built, monkeypatch, caplog):
    monkeypatch.setitem(setup_py.OPENMP_FLAGS, "unix", ["-fno-such-thing"])
    library = built()
    assert caplog.text.count("WITHOUT OpenMP: every step will run on one thread") == 1
    assert "-fno-such-thing" not in flags_of(library)


PLACED = """
#include "placed.h"
const char *file(void) { return __FILE__; }
"""


@pytest.mark.skipif(not GCC, reason="knows GCC's flags")
def test_a_library_does_not_know_where_it_was_built(setup_py, tmp_path, monkeypatch):
    """Equal to the last byte from two folders, against two NumPys, debugging information too."""
    libraries = []
    for name in ("here", "somewhere/else"):
        folder, headers = tmp_path / name, tmp_path / name / "env/numpy/include"
        headers.mkdir(parents=True)
        (headers / "placed.h").write_text(
            "static const char *header(void) { return __FILE__; }\n"
            "const char *placed(void) { return header(); }\n"
        )
        (folder / "placed.c").write_text(PLACED)
        monkeypatch.setattr(setup_py.numpy, "__file__", str(headers.parent / "__init__.py"))
        monkeypatch.setenv("CFLAGS", "-g")
        monkeypatch.chdir(folder)
        command = setup_py.BuildExt(Distribution({"name": "probe", "ext_modules": [
            Extension("optcore.runtime", ["placed.c"], include_dirs=[str(headers)])
        ]}))
        command.get_export_symbols = lambda extension: []       # of no module
        command.ensure_finalized()
        command.run()
        libraries.append(Path(command.get_ext_fullpath("optcore.runtime")).read_bytes())
    assert b"placed.h" in libraries[0]      # it does say what it was built from
    assert libraries[0] == libraries[1]


def flags_of(library):
    handle = ctypes.CDLL(str(library))
    handle.flags.restype = ctypes.c_char_p
    return handle.flags().decode()
