"""Build the extension in place: ``python setup.py build_ext --inplace``."""
import os

from setuptools import Extension, setup

import optcore

setup(
    name="perceptron",
    py_modules=[],
    ext_modules=[
        Extension(
            "perceptron",
            ["perceptron.cpp"],
            language="c++",
            include_dirs=[optcore.get_include()],
            # So that a gradient has the same bits wherever the compiler inlines it.
            extra_compile_args=[] if os.name == "nt" else ["-std=c++11", "-ffp-contract=off"],
        )
    ],
)
