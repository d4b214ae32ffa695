"""Build the extension in place: ``python setup.py build_ext --inplace``."""
import os

from Cython.Build import cythonize
from setuptools import Extension, setup

import optcore

setup(
    name="logistic",
    py_modules=[],
    ext_modules=cythonize(
        Extension(
            "logistic",
            ["logistic.pyx"],
            include_dirs=[optcore.get_include()],
            # So that a gradient has the same bits wherever the compiler inlines it.
            extra_compile_args=[] if os.name == "nt" else ["-ffp-contract=off"],
        ),
        compiler_directives={"language_level": "3", "boundscheck": False, "wraparound": False},
    ),
)
