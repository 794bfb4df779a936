"""The backend `tvm`: one library, one file of weights, and a runner for the board."""

import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import tvm
from tvm import relax

from hikui.backends import kernels, toolchain
from hikui.backends.kernels.cuda import artefact as cuda
from hikui.backends.tvm import index as files
from hikui.backends.tvm.determinism import order_shape_stores
from hikui.backends.tvm.module import kernels_called, refusal, relax_module
from hikui.backends.tvm.native.build import build_runner
from hikui.backends.tvm.parameters import write_parameters
from hikui.backends.tvm.tokens import token_bytes, write_tokens
from hikui.lowering.artefact import elf
from hikui.lowering.artefact.backend import BuildResult
from hikui.lowering.artefact.target import Target
from hikui.lowering.ir.program import Program
from hikui.lowering.progress import Progress

_NO_TEXT = (
    "The tokenizer's decoder joins tokens in a way that a table of their texts cannot say, so the board's runner "
    "prints token ids and no text; `hikui run` prints text."
)


_PROGRAM = 1_200_000
"""Bytes of the library of a model of 30 blocks with all kernels, of its index, report and manifest."""


def tvm_target(target: Target) -> Any:
    """TVM's name for the target's CPU.

    Sums may be reassociated, without which LLVM adds floats one by one; infinities and NaN keep their meaning, because
    masks hold infinities.
    """
    description = {"kind": "llvm", "mtriple": target.triple, "mcpu": target.cpu, "fast-math-reassoc": True}
    return tvm.target.Target({**description, "fast-math-contract": True, "mattr": list(target.attributes)})


def _linker(triple: str) -> Callable[[str, list[str]], None]:
    def link(output: str, objects: list[str], **_: object) -> None:
        toolchain.link(triple, Path(output), ["-shared", "-fPIC", *objects, "-lm"])

    # Read by TVM where a module holds no machine code of its own.
    link.get_target_triple = lambda: triple  # type: ignore[attr-defined]
    return link


def build_library(program: Program, target: Target, path: Path) -> None:
    """Compiles a program and links it with the kernels that it calls into one library.

    Raises:
        HikuiError: an operator has no translation, or no compiler is installed.
    """
    machine = tvm_target(target)
    passes = [relax.backend.cpu_generic.get_default_pipeline(machine), order_shape_stores]
    pipeline = tvm.transform.Sequential(passes)
    module = relax_module(program)
    try:
        executable = relax.build(module, machine, relax_pipeline=pipeline)
    except Exception as error:
        raise refusal(error) from error
    with TemporaryDirectory() as scratch:
        linked = kernels.build(target.triple, target.isas, Path(scratch), kernels_called(module))
        objects = [str(path) for path in linked.paths]
        executable.export_library(path, fcompile=_linker(target.triple), addons=objects, workspace_dir=scratch)


class TvmBackend:
    """Compiles with TVM; the board needs its two runtime libraries, which come along, and no Python."""

    name = "tvm"

    def nbytes_beside_weights(self, target: Target) -> int:
        """TVM's runtime, the runner, and a program with the kernels that it calls."""
        runtime = [*toolchain.runtime_libraries(target.triple), build_runner(target.triple)]
        return sum(path.stat().st_size for path in runtime) + _PROGRAM

    def build(self, program: Program, target: Target, directory: Path, progress: Progress) -> BuildResult:
        """Writes the library, the weights, the index, the token texts, the runner and TVM's runtime.

        For a target with a GPU also the CUDA kernels, for callers of their own; the program runs on the CPU.

        Raises:
            HikuiError: an operator has no translation, no compiler is installed, or TVM's runtime for the target cannot
                be fetched.
        """
        progress("library", 0, 1)
        build_library(program, target, directory / files.LIBRARY)
        progress("library", 1, 1)
        written = [files.LIBRARY, files.PARAMETERS, files.INDEX]
        index = write_parameters(program, target, directory, progress)
        table = None if program.tokenizer is None else token_bytes(program.tokenizer, index.vocabulary)
        if table is not None:
            write_tokens(table, directory)
            written.append(files.TOKENS)
        written += self._write_runtime(target.triple, directory)
        kernel_files, described = cuda.write(target, directory)
        written += kernel_files
        entry: dict[str, object] = {
            "index": files.INDEX,
            "library": files.LIBRARY,
            "parameters": files.PARAMETERS,
            "runner": f"bin/{target.triple}/hikui-run",
            **described,
        }
        notices = () if table is not None or program.tokenizer is None else (_NO_TEXT,)
        return BuildResult(tuple(sorted(written)), entry, _requirements(directory, written), notices)

    @staticmethod
    def _write_runtime(triple: str, directory: Path) -> list[str]:
        libraries, programs = Path("lib") / triple, Path("bin") / triple
        (directory / libraries).mkdir(parents=True)
        (directory / programs).mkdir(parents=True)
        runtime = toolchain.runtime_libraries(triple)
        for path in runtime:
            shutil.copyfile(path, directory / libraries / path.name)
        shutil.copy(build_runner(triple), directory / programs / "hikui-run")
        return [
            *((libraries / path.name).as_posix() for path in runtime),
            (programs / "hikui-run").as_posix(),
        ]


def _requirements(directory: Path, written: list[str]) -> dict[str, str]:
    """What the binaries ask of the board's own libraries, the newest version of each."""
    needs: dict[str, tuple[int, ...]] = {}
    for name in written:
        if elf.is_elf(directory / name):
            for need in elf.read_elf(directory / name).needs:
                library, _, number = need.partition("_")
                if number[:1].isdigit():
                    needs[library] = max(needs.get(library, (0,)), elf.version(number))
    newest = {library: ".".join(map(str, number)) for library, number in needs.items()}
    return {
        "glibc": toolchain.GLIBC,
        "libgcc_s": f"GCC_{newest['GCC']}",
        "libstdc++": f"GLIBCXX_{newest['GLIBCXX']}, CXXABI_{newest['CXXABI']}",
        "tvm": metadata.version("apache-tvm"),
        "tvm_ffi": metadata.version("apache-tvm-ffi"),
    }
