"""Compiles the CUDA kernels to one fatbin, once for each state of the sources and tools."""

import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from hikui.lowering.errors import HikuiError

ARCHITECTURES = ("75", "80", "87", "90a")
"""What the fatbin has machine code for: Turing, A100 (and every 8.x), Jetson Orin, Hopper."""

NAME = "hikui_kernels.fatbin"

_FOLDER = Path(__file__).resolve().parent
_MODULES = ("activation", "block", "dense", "integer", "kernels", "source", "weight_only", "words")
_SOURCES = (
    *(_FOLDER / f"{name}.py" for name in _MODULES),
    _FOLDER.parent / "compile.py",
    _FOLDER.parent / "fields.py",
    _FOLDER.parents[2] / "lowering" / "formats" / "kinds.py",
)
"""What the CUDA C++ depends on, beside TVM."""

# Let pass: functions of TVM's prelude that no kernel calls, grid sizes computed in vain, and signed constants for
# `__byte_perm`, whose registers are unsigned.
_FLAGS = ("-std=c++17", "--diag-suppress", "177,550,68", "--Werror", "all-warnings")

# What ptxas says of one kernel.
_REPORT = re.compile(
    r"Compiling entry function '(\w+)' for 'sm_(\w+)'\n.*\n"
    r" +(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n.*Used (\d+) registers"
)


@dataclass(frozen=True)
class Resources:
    """What the assembler reports of a kernel: registers of a thread, and bytes it keeps in memory for lack of more."""

    kernel: str
    architecture: str
    registers: int
    spilled: int
    stack: int


class MissingToolkitError(HikuiError):
    """The CUDA toolkit is not installed."""


def tool(name: str) -> str:
    """The path of a tool of the CUDA toolkit.

    Raises:
        MissingToolkitError: it is not installed.
    """
    path = shutil.which(name) or shutil.which(f"/usr/local/cuda/bin/{name}")
    if path is None:
        raise MissingToolkitError(
            f"{name} is not here; install NVIDIA's CUDA toolkit (12.8 or later) for the CUDA kernels."
        )
    return path


def build_fatbin(architectures: Sequence[str], directory: Path) -> Path:
    """Puts the fatbin of all CUDA kernels into a folder; the same sources and tools give the same bytes.

    Args:
        architectures: compute capabilities, of `ARCHITECTURES`.
        directory: where `NAME` goes; made if absent.

    Raises:
        HikuiError: the CUDA toolkit is not there or fails, or the cache cannot be written.
    """
    fatbinary = tool("fatbinary")
    images = []
    for architecture, path in zip(architectures, _compiled(architectures), strict=True):
        images.append(f"--image3=kind=elf,sm={architecture},file={path}")
    directory.mkdir(parents=True, exist_ok=True)
    _run([fatbinary, "-64", "--compress-all", f"--create={directory.resolve() / NAME}", *images], directory)
    return directory / NAME


def resources(architectures: Sequence[str]) -> list[Resources]:
    """What each kernel takes on each architecture.

    Raises:
        HikuiError: as `build_fatbin`.
    """
    text = "".join(path.with_suffix(".log").read_text() for path in _compiled(architectures))
    return [
        Resources(kernel, architecture, int(registers), int(stores) + int(loads), int(stack))
        for kernel, architecture, stack, stores, loads, registers in _REPORT.findall(text)
    ]


def cuda_source() -> str:
    """CUDA C++ of every kernel.

    Raises:
        HikuiError: the cache cannot be written.
    """
    texts = [path.read_text() for path in _SOURCES]
    path = _cache() / f"{_fingerprint(importlib.metadata.version('apache-tvm'), *texts)}.cu"
    if not path.is_file():
        # TVM takes seconds to import and only a fresh cache needs it.
        from hikui.backends.kernels.cuda.source import generate

        with _scratch() as scratch:
            (scratch / path.name).write_text(generate())
            os.replace(scratch / path.name, path)
    return path.read_text()


def _compiled(architectures: Sequence[str]) -> list[Path]:
    """A file of machine code for each architecture, and beside each what the assembler said."""
    nvcc, source = tool("nvcc"), cuda_source()
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout

    def compiled(architecture: str) -> Path:
        path = _cache() / f"{_fingerprint(architecture, *_FLAGS, version, source)}.cubin"
        if not path.is_file():
            with _scratch() as scratch:
                (scratch / "kernels.cu").write_text(source)
                code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
                command = [nvcc, *_FLAGS, code, "-Xptxas", "-v", "-cubin", "-o", "cubin", "kernels.cu"]
                (scratch / "log").write_text(_run(command, scratch))
                # Another process that was quicker has written the same.
                os.replace(scratch / "log", path.with_suffix(".log"))
                os.replace(scratch / "cubin", path)
        return path

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compiled, architectures))


def _cache() -> Path:
    return Path(platformdirs.user_cache_dir("hikui")) / "cuda"


@contextmanager
def _scratch() -> Iterator[Path]:
    """A folder on the file system of the cache."""
    try:
        _cache().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=_cache(), prefix="build-") as folder:
            yield Path(folder)
    except OSError as error:
        raise HikuiError(
            f"The CUDA kernels cannot be kept in {_cache()} ({error.strerror}); set XDG_CACHE_HOME to another folder."
        ) from error


def _run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise HikuiError(f"{Path(command[0]).name} fails on the CUDA kernels: {(done.stderr or done.stdout).strip()}")
    return done.stdout + done.stderr


def _fingerprint(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:32]
