"""The compiled modules, and nothing else: all metadata is in pyproject.toml.

LINGERX_BUILD=portable          no compiled modules (also what PyPy and Windows get)
LINGERX_SANITIZE=address|thread instrumented modules, for use under LD_PRELOAD (see CONTRIBUTING.md)
LINGERX_TRACE=1                 line coverage of Cython code; leaves the .c files beside their sources
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import BaseError, CCompilerError

SANITIZERS = {
    "": [],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-fsanitize=thread"],
}


def knob(name: str, *allowed: str) -> str:
    value = os.environ.get(name, "")
    if value not in ("", *allowed):
        sys.exit(f"{name}={value}: expected {' or '.join(allowed)}, or nothing")
    return value


tracing = knob("LINGERX_TRACE", "0", "1") == "1"
sanitizer = SANITIZERS[knob("LINGERX_SANITIZE", "address", "thread")]
portable = (
    knob("LINGERX_BUILD", "portable") == "portable" or sys.implementation.name != "cpython" or sys.platform == "win32"
)


class BuildExt(build_ext):
    """Compiles every time (a knob leaves no trace in a timestamp), and never falls back in silence."""

    def finalize_options(self):
        super().finalize_options()
        self.force = True

    def build_extensions(self):
        try:
            self.cythonize()
            super().build_extensions()
        except (BaseError, CCompilerError, OSError) as error:
            raise BaseError(
                f"lingerx could not compile its native engine: {error}\n"
                "It needs a C compiler and the Python headers (Debian: apt-get install gcc python3-dev).\n"
                "To install without them, with the slower pure Python engine, set LINGERX_BUILD=portable."
            ) from error

    def cythonize(self):
        from Cython.Build import cythonize

        compiled = cythonize(
            self.extensions,
            force=True,
            # Cython.Coverage looks for the .c file beside its source.
            build_dir=None if tracing else "build/cython",
            compiler_directives={
                "language_level": 3,
                "freethreading_compatible": True,
                "annotation_typing": False,  # annotations are for type checkers, C types stand in the .pxd files
                "autotestdict": False,
                "linetrace": tracing,
            },
        )
        for extension, result in zip(self.extensions, compiled, strict=True):
            extension.sources = result.sources


class BuildPy(build_py):
    """Starts from an empty package: what an earlier build left behind would go into the wheel."""

    def run(self):
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib, "lingerx"), ignore_errors=True)
        super().run()


def extension(module: str, source: str, **directives: bool) -> Extension:
    result = Extension(
        f"lingerx.{module}",
        [f"src/lingerx/{source}"],
        include_dirs=["src/lingerx"],  # the C is compiled elsewhere than its headers stand
        extra_compile_args=[*sanitizer, "-fno-omit-frame-pointer", "-g", "-O1"] if sanitizer else [],
        extra_link_args=sanitizer,
        # 3.13 and later would trace by sys.monitoring, which coverage's plugins cannot use.
        define_macros=[("CYTHON_TRACE_NOGIL", "1"), ("CYTHON_USE_SYS_MONITORING", "0")] if tracing else [],
    )
    result.cython_directives = directives
    return result


setup(
    cmdclass={"build_ext": BuildExt, "build_py": BuildPy},
    ext_modules=[]
    if portable
    else [
        extension("report", "report.py"),
        extension("_machine_c", "_machine.py"),
        extension("_native", "_native.pyx", boundscheck=False, wraparound=False),
    ],
)
