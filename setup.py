"""Build the extensions: flags by compiler, OpenMP where there is one."""
import os
import tempfile
from pathlib import Path

import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

MODULES = [
    "runtime", "sweep", "parallel", "options", "kernels", "arrays", "memory", "norm", "structure",
    "groups", "table", "functional", "plan",
]

# -ffp-contract=off: without it some targets fuse a multiply and an add into one rounding, and
# the bits would depend on the CPU. MSVC's /fp:precise does the same for its baseline.
# -funroll-loops: GCC leaves a vector an iteration otherwise, and the loop's own instructions
# are felt where a core is shared.
FLAGS = {
    "msvc": ["/O2", "/fp:precise"],
    "unix": ["-O3", "-ffp-contract=off", "-funroll-loops"],
}
OPENMP_FLAGS = {"msvc": ["/openmp"], "unix": ["-fopenmp"]}
OPENMP_PROBE = """
#include <omp.h>
int optcore_probe(void) { return omp_get_max_threads(); }
"""


class BuildExt(build_ext):
    def finalize_options(self):
        super().finalize_options()
        if self.parallel is None:
            self.parallel = os.cpu_count()

    def build_extensions(self):
        kind = "msvc" if self.compiler.compiler_type == "msvc" else "unix"
        flags = list(FLAGS[kind])
        link = []
        if self.links(OPENMP_FLAGS[kind]):
            flags += OPENMP_FLAGS[kind]
            link += OPENMP_FLAGS[kind] if kind == "unix" else []
        for extension in self.extensions:
            extension.extra_compile_args = flags
            extension.extra_link_args = link
            extension.define_macros.append(("OPTCORE_FLAGS", f'"{" ".join(flags)}"'))
        super().build_extensions()

    def links(self, flags):
        """Whether a library that needs OpenMP compiles and links with these flags."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.c")
            source.write_text(OPENMP_PROBE)
            try:
                objects = self.compiler.compile(
                    [str(source)], output_dir=folder, extra_postargs=flags
                )
                self.compiler.link_shared_object(
                    objects, str(Path(folder, "probe.so")), extra_postargs=flags
                )
            except Exception:  # each compiler class has errors of its own
                return False
        return True


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
        },
    ),
    cmdclass={"build_ext": BuildExt},
)
