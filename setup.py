"""The native runtime's extension; all else is in pyproject.toml.

It is optional: without a C++ compiler the package installs without it, and `gateskip doctor` says so.
"""

from glob import glob

import pybind11
from pybind11.setup_helpers import ParallelCompile
from setuptools import Extension, setup

NATIVE = "gateskip_compress/runtime/native"
# a * b + c must be rounded twice wherever it is written so: what a token gives may not depend on how many run with it
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-Wall", "-Wextra"]

ParallelCompile().install()
setup(
    ext_modules=[
        Extension(
            "gateskip_compress.runtime._native",
            sorted(glob(f"{NATIVE}/*.cpp")),
            depends=sorted(glob(f"{NATIVE}/*.h")),
            include_dirs=[pybind11.get_include()],
            extra_compile_args=[*FLAGS, "-pthread"],
            extra_link_args=["-pthread"],
            language="c++",
            optional=True,
        )
    ]
)
