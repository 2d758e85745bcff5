"""The compiled part of odirect; everything else is in pyproject.toml."""

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext as _build_ext
from setuptools.errors import BaseError, CCompilerError

try:
    from Cython.Build import cythonize
except ImportError:
    raise SystemExit("odirect is built with Cython: run `pip install .` here, which fetches it") from None


class build_ext(_build_ext):
    """Building the extensions; what is missing on the machine is named with its Debian package."""

    def build_extensions(self):
        try:
            super().build_extensions()
        except (BaseError, CCompilerError, OSError) as error:
            raise SystemExit(
                f"odirect's compiled modules could not be built: {error}\n"
                "They need a C compiler (Debian: gcc libc6-dev), Python's headers (python3-dev) "
                "and the kernel's headers (linux-libc-dev), and nothing else."
            ) from None


setup(
    cmdclass={"build_ext": build_ext},
    ext_modules=cythonize(
        [
            Extension(
                "odirect.ring._uring",
                ["src/odirect/ring/_uring.pyx"],
                depends=["src/odirect/ring/kernel_uring.h"],
            ),
            Extension(
                "odirect.ring._calls",
                ["src/odirect/ring/_calls.pyx"],
                depends=["src/odirect/ring/kernel_calls.h"],
            ),
        ],
        language_level=3,
    ),
)
