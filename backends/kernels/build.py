"""Builds the kernel objects of a triple, once for each state of the sources and tools.

The cache has a folder for each instruction set, with an object for each of its kernels, and one for each choice of
public functions, with the dispatcher's objects. A caller gets copies of those that its choice needs: no kernel is
compiled again for another choice, or when the dispatcher changes.
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import platformdirs

from hikui.backends.kernels.symbols import SYMBOLS
from hikui.lowering.errors import HikuiError

_FOLDER = Path(__file__).resolve().parent
_C_SOURCES = ("arguments.c", "attention.c", "embedding.c", "products.c", "rows.c", "runtime.c", "select.c")
# A choice of public functions leaves other functions of a file without a caller.
_C_FLAGS = (
    "-std=gnu11", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function",
    "-Wno-unused-variable", "-c",
)  # fmt: skip
_FORMATS = tuple((_FOLDER.parents[1] / "lowering" / "formats").glob("*.py"))
"""Kernels are made from the formats' tables too."""
_LIST = "kernels.txt"
"""In a dispatcher's folder: the kernels that it calls, a line each: instruction set and symbol."""
_NO_KERNELS = ("__init__.py", "build.py", "replay.py", "standalone.py")
"""The sources from which no kernel is made."""
_ZIG_GLIBC = "2.28"
"""The glibc that objects built by zig are meant for; GCC's objects here need no newer one either."""

HEADER = _FOLDER / "kernels.h"
"""The C interface of the objects."""


@dataclass(frozen=True)
class KernelObjects:
    """What a backend links.

    Attributes:
        paths: the object files; they need nothing but libc.
        symbols: the public functions, without the prefix `__tvm_ffi_`.
    """

    paths: tuple[Path, ...]
    symbols: tuple[str, ...]


@cache
def compiler(triple: str) -> tuple[str, ...]:
    """The command of a C compiler for a triple: Debian's GCC, else zig from PyPI (the extra `cross`).

    Raises:
        HikuiError: there is neither.
    """
    names = [f"{triple}-gcc"]
    if triple == f"{platform.machine()}-linux-gnu":
        names += ["gcc", "cc"]
    for name in names:
        if shutil.which(name):
            return (name,)
    if importlib.util.find_spec("ziglang"):
        return (sys.executable, "-m", "ziglang", "cc", "-target", f"{triple}.{_ZIG_GLIBC}")
    raise HikuiError(
        f"No C compiler for {triple} is here; install Debian's gcc-{triple.replace('_', '-')} or hikui[cross]."
    )


def build(triple: str, isas: Sequence[str], directory: Path, symbols: Sequence[str] = SYMBOLS) -> KernelObjects:
    """Puts the object files of a triple into a folder; the same sources and tools give the same bytes.

    Args:
        triple: `x86_64-linux-gnu` or `aarch64-linux-gnu`.
        isas: names of `isa.ISAS`, best last.
        directory: where the files go; made if absent.
        symbols: the public functions that are wanted; the kernels that none of them calls are left out.

    Raises:
        HikuiError: no C compiler for the triple, the compiler fails, or the cache cannot be written.
    """
    chosen = tuple(symbol for symbol in SYMBOLS if symbol in set(symbols))
    try:
        cached = _cached(triple, tuple(isas), chosen)
    except OSError as error:
        folder = platformdirs.user_cache_dir("hikui")
        raise HikuiError(
            f"The kernels cannot be kept in the cache {folder} ({error.strerror}); set XDG_CACHE_HOME to another."
        ) from error
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for source in cached:
        paths.append(directory / source.name)
        shutil.copyfile(source, paths[-1])
    return KernelObjects(tuple(paths), chosen)


def _cached(triple: str, isas: tuple[str, ...], symbols: tuple[str, ...]) -> list[Path]:
    """The objects in the cache, made where they are missing, in the order of their names."""
    command = compiler(triple)
    folder = Path(platformdirs.user_cache_dir("hikui")) / "kernels"
    state = _state(triple, command)
    choice = _fingerprint((*state, *isas, "", *symbols), _sources((".py", ".c", ".h")))
    dispatcher = _made(folder / f"dispatcher-{choice}", partial(_compile_c, isas, symbols, triple, command))
    kernels = _fingerprint(state, [path for path in _sources((".py",)) if path.name not in _NO_KERNELS])
    for name in isas:
        _made(folder / f"{name}-{kernels}", partial(_compile_isa, name, command))
    called = [line.split() for line in (dispatcher / _LIST).read_text("utf-8").splitlines()]
    paths = [folder / f"{isa}-{kernels}" / f"{kernel}.o" for isa, kernel in called]
    return sorted([*dispatcher.glob("*.o"), *paths], key=lambda path: path.name)


def _made(folder: Path, make: Callable[[Path], None]) -> Path:
    """A folder of the cache, made whole or not at all."""
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="build-") as scratch:
        made = Path(scratch) / "objects"
        made.mkdir()
        make(made)
        try:
            os.rename(made, folder)
        except OSError:
            # Another process was quicker; its bytes are the same.
            if not folder.is_dir():
                raise
    return folder


def _state(triple: str, command: tuple[str, ...]) -> tuple[str, ...]:
    """What the objects depend on beside the sources."""
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
    return triple, version, importlib.metadata.version("apache-tvm")


def _sources(suffixes: tuple[str, ...]) -> list[Path]:
    found = [path for path in _FOLDER.rglob("*") if path.suffix in suffixes]
    # The kernels for GPUs are built apart.
    return sorted([*(path for path in found if path.relative_to(_FOLDER).parts[0] != "cuda"), *_FORMATS])


def _fingerprint(texts: Sequence[str], sources: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\0")
    for path in sources:
        digest.update(path.relative_to(_FOLDER.parents[1]).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:32]


def _compile_isa(name: str, command: tuple[str, ...], directory: Path) -> None:
    from hikui.backends.kernels.compile import compile_isa

    compile_isa(name, directory, command)


def _compile_c(
    isas: tuple[str, ...], symbols: tuple[str, ...], triple: str, command: tuple[str, ...], directory: Path
) -> None:
    # TVM takes seconds to import and only a fresh cache needs it.
    from hikui.backends.kernels.isa import ISAS
    from hikui.backends.kernels.table import c_includes, objects

    for name in isas:
        if ISAS[name].triple not in ("", triple):
            raise HikuiError(f"Instruction set {name} belongs to {ISAS[name].triple}, not to {triple}.")
    called = [f"{name} {kernel}" for name in isas for kernel in objects(ISAS[name], symbols)]
    (directory / _LIST).write_text("\n".join(called), "utf-8")
    with tempfile.TemporaryDirectory() as scratch:
        for name, text in c_includes([ISAS[name] for name in isas], symbols).items():
            (Path(scratch) / name).write_text(text)
        for source in _C_SOURCES:
            target = directory / f"hikui_{Path(source).stem}.o"
            run = subprocess.run(
                [*command, *_C_FLAGS, f"-I{scratch}", source, "-o", str(target)],
                capture_output=True,
                text=True,
                cwd=_FOLDER,
            )
            if run.returncode:
                raise HikuiError(f"The C compiler {' '.join(command)} fails on {source}: {run.stderr.strip()}")
