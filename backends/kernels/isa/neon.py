"""NEON of ARMv8.0, no dot product: products of bytes summed in 16 bits, then widened pair by pair."""

from tvm import tirx
from tvm.script import tirx as T

from hikui.backends.kernels.isa.base import LINES, Buffer, Expression, Isa, Tile, intrinsic, nibbles, splat, vector


def _products(codes: Expression, quad: Expression, half: int) -> Expression:
    """The 8 products of two of the 4 output rows with one quad, int16: smull or smull2.

    LLVM takes smull2 only where both operands are upper halves of registers. The maximum of the repeated quad with
    itself keeps it from seeing too early that the two halves are the same; no instruction is left of it.
    """
    repeated = T.reinterpret("int8x16", splat(quad, 4))
    repeated = intrinsic("int8x16", "llvm.aarch64.neon.smax", repeated, repeated)
    lanes = list(range(8 * half, 8 * half + 8))
    halves = (tirx.Shuffle([value], lanes) for value in (T.reinterpret("int8x16", codes), repeated))
    return intrinsic("int16x8", "llvm.aarch64.neon.smull", *halves)


def _widened(pairs: Expression) -> Expression:
    """Sums of two neighbouring int16 values, int32; LLVM folds an addition to it into sadalp."""
    return intrinsic("int32x4", "llvm.aarch64.neon.saddlp", pairs)


def _dot(
    kind: str, total: Expression, weight: Buffer, line: Expression, part: Expression, quads: Buffer, first: Expression
) -> Expression:
    lines = [vector(weight, (line + i) * 64 + part * 16, 16) for i in range(LINES[kind])]
    if kind == "int4":
        # 8 products of at most 15 · 127, and then the sum of two such sums, stay within int16: 16 · 1905 = 30480.
        operands = [nibble for line_ in lines for nibble in nibbles(line_, 16)]
        halves = []
        for half in range(2):
            sums = _products(operands[0], quads[first], half)
            for i, codes in enumerate(operands[1:], start=1):
                sums = sums + _products(codes, quads[first + i], half)
            halves.append(sums)
        return total + _widened(intrinsic("int16x8", "llvm.aarch64.neon.addp", *halves))
    # Two products of at most 127 · 127 fit 16 bits, four do not: widen every two lines.
    wide = []
    for half in range(2):
        sums = None
        for i in range(0, len(lines), 2):
            pair = _products(lines[i], quads[first + i], half) + _products(lines[i + 1], quads[first + i + 1], half)
            sums = _widened(pair) if sums is None else sums + _widened(pair)
        wide.append(sums)
    return total + intrinsic("int32x4", "llvm.aarch64.neon.addp", *wide)


ISA = Isa(
    name="neon",
    triple="aarch64-linux-gnu",
    cpu="cortex-a72",
    attributes=("+neon",),
    lanes=4,
    offsets={"int4": 8, "int8": 0},
    dot=_dot,
    single=Tile(rows=1, blocks=2),
    many=Tile(rows=2, blocks=1),
    float_single=Tile(rows=1, blocks=4),
    float_many=Tile(rows=4, blocks=1),
)
