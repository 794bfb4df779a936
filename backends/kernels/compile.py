"""From TIR to an object file with plain C functions."""

from pathlib import Path
from typing import Any

import tvm
from tvm import tirx

from hikui.backends.kernels import activation, attention, linear
from hikui.backends.kernels.isa import ISAS
from hikui.backends.kernels.isa.base import Isa, Tile

SYMBOL = "hikui_{kernel}__{isa}"


def kernels(isa: Isa) -> dict[str, Any]:
    """Every kernel of one instruction set, by C symbol."""

    def symbol(kernel: str) -> str:
        return SYMBOL.format(kernel=kernel, isa=isa.name)

    table = {}
    for size, tile in (("single", isa.single), ("many", isa.many)):
        for kind in ("int4", "int8"):
            name = symbol(f"linear_a8_{kind}_{size}")
            table[name] = linear.integer(isa, kind, tile, name)
    for size, tile, chains in (
        ("single", isa.float_single, 1),
        ("many", isa.float_many, 1),
        ("few_single", Tile(rows=1, blocks=1), 4),
        ("few_many", Tile(rows=4, blocks=1), 1),
    ):
        for kind in ("float16", "float32"):
            name = symbol(f"linear_{kind}_{size}")
            table[name] = linear.floating(kind, tile, chains, name)
    for make in (
        activation.quantize_activation,
        activation.rms_norm,
        activation.swiglu,
        attention.rotary,
        attention.attention,
    ):
        name = symbol(make.__name__)
        table[name] = make(name)
    return table


def lower(isa: Isa) -> Any:
    """The kernels of one instruction set as a TIR module ready for code generation.

    The functions keep their C signature: no packed-function wrapper, so that the objects need no symbol of TVM.
    Checking arguments is the dispatcher's work.
    """
    target = tvm.target.Target({"kind": "llvm", "mtriple": isa.triple, "mcpu": isa.cpu, "mattr": list(isa.attributes)})
    passes = [
        tirx.transform.BindTarget(target),
        tirx.transform.FlattenBuffer(),
        tirx.transform.UnrollLoop(),
        tirx.transform.StmtSimplify(),
        tirx.transform.RemoveNoOp(),
        tirx.transform.LowerIntrin(),
    ]
    return tvm.ir.transform.Sequential(passes)(tvm.IRModule(kernels(isa))), target


def compile_isa(name: str, path: Path) -> Path:
    """Writes the object file of one instruction set.

    Args:
        name: one of `isa.ISAS`.
        path: the file to write, ending in `.o`.
    """
    module, target = lower(ISAS[name])
    tvm.get_global_func("target.build.llvm")(module, target).write_to_file(str(path), "o")
    return path
