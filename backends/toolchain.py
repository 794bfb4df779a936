"""Compilers and runtime libraries for the boards.

What is built here must run on glibc 2.28. Debian's cross compilers link against the glibc of their own release, which
is harmless for most libraries and not for programs, so every result is measured and, where it asks for too new a glibc,
built again by Zig, which carries the symbol tables of every release. Nothing that depends on time or place goes into
the files: two builds give the same bytes.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from tempfile import TemporaryDirectory

from platformdirs import user_cache_dir

from hikui.lowering.artefact import elf
from hikui.lowering.errors import HikuiError

GLIBC = "2.28"
"""The oldest glibc that artefacts run on."""

_DEBIAN_PACKAGE = {"aarch64-linux-gnu": "g++-aarch64-linux-gnu", "x86_64-linux-gnu": "g++-x86-64-linux-gnu"}
_MANYLINUX = {"aarch64-linux-gnu": "manylinux_2_28_aarch64", "x86_64-linux-gnu": "manylinux_2_28_x86_64"}
_RUNTIME = {"apache-tvm": "tvm/lib/libtvm_runtime.so", "apache-tvm-ffi": "tvm_ffi/lib/libtvm_ffi.so"}
_REPRODUCIBLE = ("-s", "-Wl,--build-id=none")


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler driver for one triple.

    Attributes:
        without_library: options that leave out the C++ standard library.
    """

    triple: str
    command: tuple[str, ...]
    without_library: tuple[str, ...]

    def __call__(self, arguments: Sequence[str | Path]) -> None:
        """Runs the compiler.

        Raises:
            HikuiError: it failed; the message holds the first line of its complaint.
        """
        command = [*self.command, *map(str, arguments)]
        # The caller's flags stay out: the same sources give the same bytes everywhere.
        environment = {key: value for key, value in os.environ.items() if key not in ("CFLAGS", "CXXFLAGS", "LDFLAGS")}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            complaint = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
            raise HikuiError(f"{' '.join(self.command)} failed for {self.triple}: {complaint}")


def native_compiler(triple: str) -> Compiler | None:
    """The distribution's g++ for the triple, if it is installed."""
    names = [f"{triple}-g++"]
    if triple == f"{os.uname().machine}-linux-gnu":
        names.append("g++")
    found = next((path for name in names if (path := shutil.which(name))), None)
    return Compiler(triple, (found,), ("-nodefaultlibs", "-lc", "-lgcc")) if found else None


def portable_compiler(triple: str) -> Compiler | None:
    """Zig's C++ compiler, which links against the glibc that artefacts promise, if it is installed."""
    if util.find_spec("ziglang") is None:
        return None
    command = (sys.executable, "-m", "ziglang", "c++", "-target", f"{triple}.{GLIBC}")
    return Compiler(triple, command, ("-nostdlib++",))


def compilers(triple: str) -> list[Compiler]:
    """Every compiler for the triple, the quickest first.

    Raises:
        HikuiError: there is none.
    """
    found = [compiler for compiler in (native_compiler(triple), portable_compiler(triple)) if compiler]
    if not found:
        raise HikuiError(
            f"No C++ compiler for {triple} is installed; install Debian's package {_DEBIAN_PACKAGE[triple]} or run "
            "pip install 'hikui[cross]'."
        )
    return found


def link(triple: str, output: Path, arguments: Sequence[str | Path], *, library: bool = True) -> None:
    """Compiles and links a program or library that runs on glibc 2.28, with the same bytes each time.

    Args:
        triple: the board's.
        output: the file to write.
        arguments: sources, objects and options; `-shared` makes a library.
        library: link the C++ standard library.

    Raises:
        HikuiError: no compiler can do it.
    """
    needed: tuple[int, ...] = (0,)
    for compiler in compilers(triple):
        standard = () if library else compiler.without_library
        compiler([*arguments, *standard, *_REPRODUCIBLE, "-o", output])
        needed = elf.read_elf(output).glibc()
        if needed <= elf.version(GLIBC):
            return
    output.unlink()
    raise HikuiError(
        f"{output.name} would need glibc {'.'.join(map(str, needed))}, newer than {GLIBC}; "
        "pip install 'hikui[cross]' brings a compiler that links against older ones."
    )


def cache_folder(name: str) -> Path:
    """A folder in the user's cache, made if absent.

    Raises:
        HikuiError: it cannot be made.
    """
    folder = Path(user_cache_dir("hikui")) / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HikuiError(
            f"The cache folder {folder} cannot be made: {error.strerror}; set XDG_CACHE_HOME to one that can."
        ) from None
    return folder


def runtime_libraries(triple: str) -> list[Path]:
    """TVM's runtime libraries for a triple, in the version that is installed here.

    For the machine's own triple they are the installed ones; for another they are taken from its wheels, which are
    fetched once into the user's cache.

    Raises:
        HikuiError: the wheels cannot be fetched.
    """
    if triple == f"{os.uname().machine}-linux-gnu":
        return [Path(str(metadata.distribution(wheel).locate_file(name))) for wheel, name in _RUNTIME.items()]
    versions = "-".join(metadata.version(wheel) for wheel in _RUNTIME)
    folder = cache_folder("tvm-runtime") / f"{triple}-{versions}"
    if not folder.is_dir():
        _fetch_runtime(triple, folder)
    return [folder / Path(name).name for name in _RUNTIME.values()]


def _fetch_runtime(triple: str, folder: Path) -> None:
    with TemporaryDirectory(dir=folder.parent) as scratch:
        wheels, partial = Path(scratch) / "wheels", Path(scratch) / "libraries"
        partial.mkdir()
        for wheel, name in _RUNTIME.items():
            _download(f"{wheel}=={metadata.version(wheel)}", _MANYLINUX[triple], wheels)
            path = next(wheels.glob(f"{wheel.replace('-', '_')}-*.whl"))
            with zipfile.ZipFile(path) as archive:
                (partial / Path(name).name).write_bytes(archive.read(name))
        try:
            partial.rename(folder)
        except OSError:
            # Another build put it there first, with the same content.
            if not folder.is_dir():
                raise


def _download(requirement: str, platform: str, destination: Path) -> None:
    arguments = ["--platform", platform, "--only-binary=:all:", "--no-deps", "--dest", str(destination), requirement]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["pip fails"]
        complaint = next((line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR")), lines[-1])
        raise HikuiError(
            f"TVM's runtime library for {platform} ({requirement}) cannot be fetched: {complaint}; "
            "it is needed once, so try again with a network."
        )
