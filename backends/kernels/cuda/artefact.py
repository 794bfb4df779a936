"""What an artefact carries of the CUDA kernels: the fatbin, and a small library that starts them from C."""

import shutil
from pathlib import Path

from hikui.backends import toolchain
from hikui.backends.kernels.cuda.build import NAME, MissingToolkitError, build_fatbin
from hikui.lowering.artefact.target import Target

HEADER = Path(__file__).with_name("hikui_cuda.h")
LIBRARY = "libhikui_cuda.so"

_FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti")


def build_loader(triple: str, path: Path) -> None:
    """Compiles the library of `HEADER`.

    Raises:
        HikuiError: no compiler for the triple is installed.
    """
    source = HEADER.with_name("loader.cc")
    toolchain.link(triple, path, [*_FLAGS, source, "-ldl"], library=False)


def write(target: Target, directory: Path) -> tuple[list[str], dict[str, object]]:
    """Puts fatbin, library and header under `lib/<triple>/` of an artefact, for a target with a GPU.

    Returns:
        The files, relative to the artefact, and what the manifest says of them; both empty for other targets. Without
        the CUDA toolkit there are no files, and the manifest says why.

    Raises:
        HikuiError: the CUDA toolkit fails, or no C++ compiler is installed.
    """
    if not target.cuda:
        return [], {}
    folder = Path("lib") / target.triple
    try:
        build_fatbin(target.cuda, directory / folder)
    except MissingToolkitError as error:
        return [], {"cuda": {"left_out": str(error)}}
    build_loader(target.triple, directory / folder / LIBRARY)
    shutil.copyfile(HEADER, directory / folder / HEADER.name)
    names = {"fatbin": NAME, "library": LIBRARY, "header": HEADER.name}
    files = {key: (folder / name).as_posix() for key, name in names.items()}
    entry: dict[str, object] = {
        **files,
        "architectures": [f"sm_{name}" for name in target.cuda],
        "used_by": "callers of the library; the artefact's own program runs on the CPU",
    }
    return [*files.values()], {"cuda": entry}
