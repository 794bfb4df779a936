"""NEON with the dot product of ARMv8.2: 4 output rows × 4 input columns in a register, signed × signed."""

from tvm import tirx
from tvm.script import tirx as T

from hikui.backends.kernels.isa.base import LINES, Buffer, Expression, Isa, Tile, intrinsic, nibbles, vector


def _accumulate(total: Expression, codes: Expression, quads: Expression, lane: int) -> Expression:
    """Uses sdot by element: LLVM folds the shuffle of one lane into the instruction."""
    quad = T.reinterpret("int8x16", tirx.Shuffle([quads], [lane] * 4))
    return intrinsic("int32x4", "llvm.aarch64.neon.sdot", total, T.reinterpret("int8x16", codes), quad)


def _dot(
    kind: str, total: Expression, weight: Buffer, line: Expression, part: Expression, quads: Buffer, first: Expression
) -> Expression:
    halves = [vector(quads, first + 4 * half, 4) for half in range(2)]
    for i in range(LINES[kind]):
        codes = vector(weight, (line + i) * 64 + part * 16, 16)
        for j, operand in enumerate(nibbles(codes, 16) if kind == "int4" else (codes,)):
            quad = 2 * i + j if kind == "int4" else i
            total = _accumulate(total, operand, halves[quad // 4], quad % 4)
    return total


ISA = Isa(
    name="dotprod",
    triple="aarch64-linux-gnu",
    cpu="cortex-a76",
    attributes=("+neon", "+dotprod"),
    lanes=4,
    offsets={"int4": 8, "int8": 0},
    dot=_dot,
    single=Tile(rows=1, blocks=4),
    many=Tile(rows=4, blocks=1),
    float_single=Tile(rows=1, blocks=4),
    float_many=Tile(rows=4, blocks=1),
)
