"""Builds the board's runner, once a triple and version of its sources."""

import hashlib
import os
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory

from hikui.backends import toolchain

_SOURCES = Path(__file__).parent
_OPTIONS = (
    "-std=c++17", "-O2", "-Wall", "-Wextra", "-fno-exceptions", "-fno-rtti",
    "-Wl,-rpath,$ORIGIN/../../lib/{triple}", "-Wl,--no-as-needed", "-ldl",
)  # fmt: skip


def _includes() -> list[Path]:
    """TVM's C interface, in the installed wheel."""
    return [Path(str(metadata.distribution("apache-tvm-ffi").locate_file("tvm_ffi/include")))]


def build_runner(triple: str) -> Path:
    """The program `hikui-run` for a triple, from the user's cache where it has been built before.

    Raises:
        HikuiError: no compiler for the triple is installed, or TVM's runtime for it cannot be fetched.
    """
    libraries = toolchain.runtime_libraries(triple)
    sources = sorted([*_SOURCES.glob("*.h"), *_SOURCES.glob("*.cc"), *libraries])
    digest = hashlib.sha256(f"{triple} {toolchain.GLIBC} {_OPTIONS}".encode())
    for path in sources:
        digest.update(path.read_bytes())
    program = toolchain.cache_folder(f"runner/{triple}-{digest.hexdigest()[:16]}") / "hikui-run"
    if program.is_file():
        return program
    with TemporaryDirectory(dir=program.parent) as scratch:
        options = [option.format(triple=triple) for option in _OPTIONS]
        includes = [f"-I{path}" for path in _includes()]
        built = Path(scratch) / "hikui-run"
        toolchain.link(triple, built, [*options, *includes, _SOURCES / "hikui_run.cc", *libraries], library=False)
        os.replace(built, program)
    return program
