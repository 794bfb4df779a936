"""Builds `libhikui_ops.so`: the shared kernels behind ONNX Runtime's interface for custom operators."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from hikui.backends import kernels, toolchain
from hikui.lowering.artefact.target import Target

_FOLDER = Path(__file__).resolve().parent
_SOURCE = _FOLDER / "custom_ops.cc"
_FLAGS = (
    "-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti",
    "-Wall", "-Wextra", "-Werror",
)  # fmt: skip
# Nothing of the C++ library is used, so that neither it nor its glibc becomes a requirement of the board.
_LINK = ("-Wl,-z,defs", "-Wl,--as-needed")
_EXPORTS = "{ global: RegisterCustomOps; hikui_kernels_isa; hikui_kernels_describe; local: *; };\n"


def build(target: Target, path: Path, symbols: Sequence[str] = kernels.SYMBOLS) -> None:
    """Writes the library with kernels of all the target's instruction sets; the same bytes each time.

    Args:
        target: what it is for.
        path: the file to write.
        symbols: the kernels' public functions that operators are wanted of; the others are left out.

    Raises:
        HikuiError: no compiler for the target's triple, or it fails.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as scratch:
        objects = kernels.build(target.triple, target.isas, Path(scratch) / "kernels", symbols)
        (Path(scratch) / "symbols.inc").write_text(kernels.kept(symbols), encoding="utf-8")
        exports = Path(scratch) / "exports.map"
        exports.write_text(_EXPORTS, encoding="utf-8")
        includes = [f"-I{scratch}", f"-I{_FOLDER}", f"-I{kernels.HEADER.parent}"]
        toolchain.link(
            target.triple,
            path,
            [*_FLAGS, *includes, _SOURCE, *objects.paths, f"-Wl,--version-script={exports}", *_LINK],
        )
