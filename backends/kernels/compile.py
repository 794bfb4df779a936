"""From TIR to an object file with plain C functions, by LLVM or through C."""

import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tvm
from tvm import tirx

from hikui.backends.kernels import table
from hikui.backends.kernels.isa import ISAS
from hikui.backends.kernels.isa.base import Isa
from hikui.backends.kernels.scalar import scalarise
from hikui.lowering.errors import HikuiError

# -ffp-contract=off: the same sums on every machine. The generator leaves variables that turn out not to be needed.
_C_FLAGS = (
    "-std=gnu11", "-O2", "-fPIC", "-fno-math-errno", "-ffp-contract=off", "-Wall", "-Werror", "-Wno-unused-variable",
    "-Wno-unused-but-set-variable", "-c",
)  # fmt: skip

_C_HEAD = """/* Written by TVM from the kernels' TIR. */
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

typedef _Float16 half;

static inline float hikui_float32_bits(int32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

/* Halves go to the even neighbour, and no mathematical library is asked; beyond 2^22 a value stays about there. */
static inline float hikui_nearest(float value) {
  const float magic = 12582912.0f; /* 1.5 · 2^23: the sum has no bits below one */
  return (value + magic) - magic;
}
"""


def lower_functions(functions: dict[str, Any], target: Any) -> Any:
    """TIR functions, by symbol, as a module ready for the code generation of a target."""
    passes = [
        tirx.transform.BindTarget(target),
        tirx.transform.FlattenBuffer(),
        tirx.transform.UnrollLoop(),
        tirx.transform.StmtSimplify(),
        tirx.transform.RemoveNoOp(),
        tirx.transform.LowerIntrin(),
    ]
    return tvm.ir.transform.Sequential(passes)(tvm.IRModule(functions))


def lower(isa: Isa, kernels: Iterable[table.Kernel] | None = None) -> Any:
    """Kernels of one instruction set as a TIR module ready for code generation, and its target.

    The functions keep their C signature: no packed-function wrapper, so that the objects need no symbol of TVM.
    Checking arguments is the dispatcher's work.

    Args:
        isa: the instruction set.
        kernels: some of its kernels; all where None.
    """
    functions = {kernel.symbol: kernel.build() for kernel in (table.kernels(isa) if kernels is None else kernels)}
    target: Any
    if isa.triple:
        target = {"kind": "llvm", "mtriple": isa.triple, "mcpu": isa.cpu, "mattr": list(isa.attributes)}
    else:
        target = {"kind": "c"}
        functions = {symbol: scalarise(function) for symbol, function in functions.items()}
    target = tvm.target.Target(target)
    return lower_functions(functions, target), target


def c_source(isa: Isa, kernels: Iterable[table.Kernel] | None = None) -> str:
    """Kernels of the portable instruction set (all where None) in C that needs no header of TVM."""
    module, target = lower(isa, kernels)
    text = tvm.get_global_func("target.build.c")(module, target).inspect_source()
    head = ("#include", "#define TVM_EXPORTS", "void* __tvm_ffi__library_ctx", "//")
    lines = (line.replace("TVM_DLL ", "") for line in text.splitlines() if not line.startswith(head))
    return _C_HEAD + "\n".join(lines) + "\n"


def compile_isa(name: str, directory: Path, compiler: Sequence[str]) -> None:
    """Writes an object file for each kernel of an instruction set, named by its symbol.

    Args:
        name: one of `isa.ISAS`.
        directory: where they go.
        compiler: command of the C compiler that the portable kernels go through.

    Raises:
        HikuiError: the C compiler fails.
    """
    isa = ISAS[name]
    for kernel in table.kernels(isa):
        path = directory / f"{kernel.symbol}.o"
        if isa.triple:
            module, target = lower(isa, [kernel])
            tvm.get_global_func("target.build.llvm")(module, target).write_to_file(str(path), "o")
            continue
        flags = [*_C_FLAGS, "-x", "c", "-", "-o", str(path)]
        run = subprocess.run([*compiler, *flags], input=c_source(isa, [kernel]), capture_output=True, text=True)
        if run.returncode:
            raise HikuiError(f"The C compiler {' '.join(compiler)} fails on the portable kernels: {run.stderr.strip()}")
