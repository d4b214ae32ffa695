"""Build the extensions: flags by compiler, OpenMP where there is one.

Whatever CC, CFLAGS, CPPFLAGS and LDFLAGS say, the arithmetic stays IEEE's: what would loosen it is
taken back at the end of each command, simd.pxd refuses to compile where that was not enough, and
a library linked like ours is loaded to see that it leaves the process's arithmetic alone.
"""
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

MODULES = [
    "runtime", "sweep", "parallel", "options", "kernels", "arrays", "memory", "norm", "structure",
    "groups", "rows", "table", "functional", "plan", "pieces",
]

# Takes back -ffast-math and each of its parts, on whose behalf GCC also links a start-up routine
# that flushes the whole process's subnormals.
NO_FAST_MATH = ["-fno-fast-math", "-fno-unsafe-math-optimizations"]
# -ffp-contract=off: without it some targets fuse a multiply and an add into one rounding, and
# the bits would depend on the CPU. MSVC's /fp:precise does the same for its baseline.
# -funroll-loops: GCC leaves a vector an iteration otherwise, and the loop's own instructions
# are felt where a core is shared.
# -fno-math-errno: the root of what is negative sets errno otherwise, for which roots are taken one
# by one.
# -fno-tree-loop-distribute-patterns: of a loop that copies one array to four GCC makes four calls
# of memcpy, which for blocks of a hundred elements take a tenth of a step.
FLAGS = {
    "msvc": ["/fp:precise"],    # and setuptools' own /O2, or /Od for `build_ext --debug`
    "unix": [*NO_FAST_MATH, "-ffp-contract=off", "-funroll-loops", "-fno-math-errno",
             "-fno-tree-loop-distribute-patterns"],
}
# -pthread: for pthread_atfork, where OpenMP does not bring it and the C library is old
LINK_FLAGS = {"msvc": [], "unix": ["-pthread", *NO_FAST_MATH]}
OPENMP_FLAGS = {"msvc": ["/openmp"], "unix": ["-fopenmp"]}
OPENMP_PROBE = """
#include <omp.h>
int optcore_probe(void) { return omp_get_max_threads(); }
"""
# 2 and 3, for 1 is how an interpreter that cannot load the library ends.
ARITHMETIC_PROBE = """
#include <float.h>
int optcore_probe(void) {
  volatile double tiny = DBL_MIN;
  volatile long double one = 1, small = LDBL_EPSILON;
  if (tiny / 2 == 0) return 2;
  if (one + small == one) return 3;
  return 0;
}
"""
PROBE_FINDS = {
    2: "flushes the subnormal numbers of the whole process that loads it",
    3: "cuts the precision of the whole process that loads it",
}


def optimization(environment):
    """-O3, unless the environment asks for a level to debug with, or for a small library.

    Not for -O2, with which distributions build everything: GCC's loops are then half as wide.
    """
    words = shlex.split(" ".join(environment.get(n, "") for n in ("CC", "CFLAGS", "CPPFLAGS")))
    levels = [word for word in words if re.fullmatch(r"-O([0-3gsz]|fast)?", word)]
    return levels[-1] if levels and levels[-1] not in ("-O2", "-O3", "-Ofast") else "-O3"


def quoted(words):
    """A C string that shows a command's words."""
    text = shlex.join(words).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'


class BuildExt(build_ext):
    def finalize_options(self):
        super().finalize_options()
        if self.parallel is None:
            self.parallel = os.cpu_count()

    def build_extensions(self):
        kind = "msvc" if self.compiler.compiler_type == "msvc" else "unix"
        flags, link = [*FLAGS[kind]], [*LINK_FLAGS[kind]]
        if kind == "unix":
            flags.insert(0, optimization(os.environ))
            link.insert(0, optimization(os.environ))
        if self.probe(OPENMP_PROBE, OPENMP_FLAGS[kind], OPENMP_FLAGS[kind]):
            flags += OPENMP_FLAGS[kind]
            link += OPENMP_FLAGS[kind] if kind == "unix" else []
        else:
            self.warn(
                "\n*** optcore is being built WITHOUT OpenMP: every step will run on one thread."
                f"\n*** The compiler cannot build a library with {OPENMP_FLAGS[kind][0]}; GCC needs"
                " libgomp, clang libomp.\n"
            )
        self.probe(ARITHMETIC_PROBE, flags, link, self.leaves_arithmetic_alone)
        maps = self.folder_maps()
        for extension in self.extensions:
            extension.extra_compile_args = flags + maps
            extension.extra_link_args = link
            if extension.name == "optcore.runtime":     # which show_config asks
                extension.define_macros += [
                    ("OPTCORE_FLAGS", quoted(self.command("compiler_so") + flags)),
                    ("OPTCORE_LINK_FLAGS", quoted(self.command("linker_so") + link)),
                ]
        super().build_extensions()

    def command(self, name):
        """What setuptools puts before our flags; MSVC's has no name that holds in all versions."""
        return list(getattr(self.compiler, name, None) or shlex.split(os.environ.get("CL", "")))

    def folder_maps(self):
        """Flags that keep the names of temporary folders out of what is built.

        So that two builds are equal byte for byte, wherever pip has put sources and NumPy. They
        are not recorded as flags, for they would bring the names in again.
        """
        folders = {os.getcwd(): ".", str(Path(numpy.__file__).parent): "numpy"}
        maps = [f"-ffile-prefix-map={folder}={name}" for folder, name in folders.items()]
        return maps if self.probe("int optcore_probe;", maps, []) else []

    def probe(self, code, flags, link, check=lambda library: None):
        """Whether a library of this code compiles and links with these flags."""
        with tempfile.TemporaryDirectory() as folder:
            source, library = Path(folder, "probe.c"), Path(folder, "probe.so")
            source.write_text(code)
            try:
                objects = self.compiler.compile(
                    [str(source)], output_dir=folder, extra_postargs=flags
                )
                self.compiler.link_shared_object(objects, str(library), extra_postargs=link)
            except Exception:  # each compiler class has errors of its own
                return False
            check(library)
        return True

    def leaves_arithmetic_alone(self, library):
        code = "import ctypes, sys; sys.exit(ctypes.CDLL(sys.argv[1]).optcore_probe())"
        done = subprocess.run(
            [sys.executable, "-c", code, str(library)], stderr=subprocess.DEVNULL, check=False
        )
        if done.returncode in PROBE_FINDS:      # else fine, or of a machine that is not this one
            named = " and ".join(
                f"{name}={os.environ[name]!r}"
                for name in ("CC", "LDSHARED", "CFLAGS", "CPPFLAGS", "LDFLAGS")
                if name in os.environ
            )
            raise SystemExit(
                f"optcore: what this links {PROBE_FINDS[done.returncode]}; its arithmetic is "
                "IEEE's, bit for bit. Build it without -Ofast, -ffast-math, -mdaz-ftz, -mpc32 and "
                f"-mpc64 in {named or 'the compiler'}"
            )


def main():
    extensions = [
        Extension(
            f"optcore.{module}",
            [f"optcore/{module}.pyx"],
            include_dirs=[numpy.get_include(), "python/optcore/include"],
            define_macros=[("NPY_NO_DEPRECATED_API", "NPY_1_23_API_VERSION")],
        )
        for module in MODULES
    ]
    setup(
        ext_modules=cythonize(
            extensions,
            include_path=["python", "."],
            force=True,
            build_dir="build/cython",
            compiler_directives={
                "language_level": "3",
                "cdivision": True,
                "boundscheck": False,
                "initializedcheck": False,
                "embedsignature": True,
                "freethreading_compatible": True,
            },
        ),
        cmdclass={"build_ext": BuildExt},
    )


if __name__ == "__main__":
    main()
