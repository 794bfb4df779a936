"""Builds the kernel objects of a triple, once for each state of the sources and tools."""

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import platformdirs

from hikui.lowering.errors import HikuiError
from hikui.lowering.formats.format import MIXED
from hikui.lowering.formats.kinds import KINDS

_FOLDER = Path(__file__).resolve().parent
_C_SOURCES = ("arguments.c", "attention.c", "products.c", "rows.c", "runtime.c", "select.c")
_C_FLAGS = ("-std=gnu11", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-c")
_ZIG_GLIBC = "2.28"
"""The glibc that objects built by zig are meant for; GCC's objects here need no newer one either."""

HEADER = _FOLDER / "kernels.h"
"""The C interface of the objects."""

SYMBOLS = (
    *(f"hikui_linear_{form}{kind}" for form in ("a8_", "a8_branch_", "") for kind in (*KINDS, MIXED)),
    "hikui_linear_float16",
    "hikui_linear_float32",
    "hikui_quantize_activation",
    "hikui_quantize_activation_int4",
    "hikui_quantize_activation_static",
    "hikui_rms_norm",
    "hikui_rms_norm_quantize",
    "hikui_swiglu",
    "hikui_swiglu_quantize",
    "hikui_rotary",
    "hikui_attention",
    "hikui_attention_int8",
    "hikui_attention_int4",
    "hikui_cache_update_int8",
    "hikui_cache_update_int4",
)
"""The public functions; the C symbol has `__tvm_ffi_` before it."""


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


def build(triple: str, isas: Sequence[str], directory: Path) -> KernelObjects:
    """Puts the object files of a triple into a folder; the same sources and tools give the same bytes.

    Args:
        triple: `x86_64-linux-gnu` or `aarch64-linux-gnu`.
        isas: names of `isa.ISAS`, best last.
        directory: where the files go; made if absent.

    Raises:
        HikuiError: no C compiler for the triple, the compiler fails, or the cache cannot be written.
    """
    try:
        cached = _cached(triple, tuple(isas))
    except OSError as error:
        folder = platformdirs.user_cache_dir("hikui")
        raise HikuiError(
            f"The kernels cannot be kept in the cache {folder} ({error.strerror}); set XDG_CACHE_HOME to another."
        ) from error
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for source in sorted(cached.glob("*.o")):
        paths.append(directory / source.name)
        shutil.copyfile(source, paths[-1])
    return KernelObjects(tuple(paths), SYMBOLS)


def _cached(triple: str, isas: tuple[str, ...]) -> Path:
    command = compiler(triple)
    folder = Path(platformdirs.user_cache_dir("hikui")) / "kernels" / _fingerprint(triple, isas, command)
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="build-") as scratch:
        made = Path(scratch) / "objects"
        made.mkdir()
        _compile(triple, isas, command, made, Path(scratch))
        try:
            os.rename(made, folder)
        except OSError:
            # Another process was quicker; its bytes are the same.
            if not folder.is_dir():
                raise
    return folder


def _fingerprint(triple: str, isas: tuple[str, ...], command: tuple[str, ...]) -> str:
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256()
    for text in (triple, *isas, version, importlib.metadata.version("apache-tvm")):
        digest.update(text.encode() + b"\0")
    for path in sorted(p for p in _FOLDER.rglob("*") if p.suffix in (".py", ".c", ".h")):
        name = path.relative_to(_FOLDER)
        if name.parts[0] != "cuda":  # The kernels for GPUs are built apart.
            digest.update(name.as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:32]


def _compile(triple: str, isas: tuple[str, ...], command: tuple[str, ...], directory: Path, scratch: Path) -> None:
    # TVM takes seconds to import and only a fresh cache needs it.
    from hikui.backends.kernels.compile import compile_isa
    from hikui.backends.kernels.isa import ISAS
    from hikui.backends.kernels.table import c_tables

    for name in isas:
        if ISAS[name].triple not in ("", triple):
            raise HikuiError(f"Instruction set {name} belongs to {ISAS[name].triple}, not to {triple}.")
        compile_isa(name, directory / f"hikui_kernels_{name}.o", command)
    (scratch / "isas.inc").write_text(c_tables([ISAS[name] for name in isas]))
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
