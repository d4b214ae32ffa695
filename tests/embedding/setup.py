"""Build the probes in place, against the installed package and against faked versions of it."""
import os
import shutil
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

import optcore

HEADER = Path(optcore.get_include(), "optcore.h").read_text()
OTHERS = {      # the header as another version might have it
    "other_abi": ("#define OPTCORE_ABI_VERSION 2", "#define OPTCORE_ABI_VERSION 3"),
    "other_options": ("    int first_step;", "    int first_step;\n    double extra;"),
    "other_table": ("} optcore_api;", "    void (*extra)(void);\n} optcore_api;"),
    "other_rules": ("RULE_0(sgd)", "RULE_0(sgd) RULE_0(extra)"),
}
SOURCES = os.environ["OPTCORE_SOURCES"]     # the repository: a probe uses private declarations
STANDARDS = {".c": [], ".cpp": []} if os.name == "nt" else {
    ".c": ["-std=c99"], ".cpp": ["-std=c++11"],
}


def probe(name, suffix=".c", include=None):
    """One copy of probe.c, for setuptools wants one object file an extension."""
    source = Path(name + suffix)
    shutil.copy("probe.c", source)
    return Extension(
        name,
        [str(source)],
        include_dirs=[str(include or optcore.get_include())],
        define_macros=[("PROBE", name), ("PROBE_NAME", f'"{name}"')],
        extra_compile_args=STANDARDS[suffix],
    )


def other_package(name, old, new):
    """Write what a consumer compiles against, changed in one place."""
    package = Path("packages", name, "optcore")
    include = package / "include"
    include.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").touch()
    assert HEADER.count(old) == 1, old
    (include / "optcore.h").write_text(HEADER.replace(old, new))
    declarations = Path(optcore.get_include()).with_name("kernels.pxd").read_text()
    (package / "kernels.pxd").write_text(declarations.replace("optcore_abi_2", "optcore_abi_3"))
    return include


includes = {name: other_package(name, *change) for name, change in OTHERS.items()}
shutil.copy("probe_cython.pyx", "other_cython.pyx")

setup(
    name="probes",
    py_modules=[],
    ext_modules=[
        probe("probe_c"),
        *([probe("probe_cpp", ".cpp")] if "NO_CXX" not in os.environ else []),
        *(probe(name, include=include) for name, include in includes.items()),
        Extension("shared", ["shared_a.c", "shared_b.c"], include_dirs=[optcore.get_include()]),
        *cythonize(
            Extension("probe_cython", ["probe_cython.pyx"], include_dirs=[optcore.get_include()]),
            language_level=3,
        ),
        *(cythonize(
            Extension("probe_streams", ["probe_streams.pyx"],
                      include_dirs=[optcore.get_include()]),
            include_path=[SOURCES],
            language_level=3,
        ) if Path(SOURCES, "optcore", "sweep.pxd").is_file() else []),
        *cythonize(
            Extension("other_cython", ["other_cython.pyx"],
                      include_dirs=[str(includes["other_abi"])]),
            include_path=[str(includes["other_abi"].parent.parent)],
            language_level=3,
        ),
    ],
)
