"""NEON of ARMv8.0, no dot product: products of bytes summed in 16 bits, then widened pair by pair."""

from collections.abc import Callable, Sequence

from tvm import tirx
from tvm.script import tirx as T

from hikui.backends.kernels.fields import turn_lines
from hikui.backends.kernels.isa import lookup
from hikui.backends.kernels.isa.base import SIZES, Expression, Isa, Place, Scheme, Tile, intrinsic, line_bytes, splat
from hikui.backends.kernels.isa.neon_fields import Operands, described, operands_of


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


def _narrow(totals: Sequence[Expression], operands: Operands, quad: Callable[[int], Expression]) -> list[Expression]:
    """For values up to 16: a step's products, and then the sums of two of these, stay within int16 (16 · 16 · 127)."""
    halves = []
    for half in range(2):
        sums = None
        for i, (codes, _) in enumerate(operands):
            product = _products(codes, quad(i), half)
            sums = product if sums is None else sums + product
        halves.append(sums)
    return [totals[0] + _widened(intrinsic("int16x8", "llvm.aarch64.neon.addp", *halves))]


def _wide(totals: Sequence[Expression], operands: Operands, quad: Callable[[int], Expression]) -> list[Expression]:
    """For values up to 127: two products fit 16 bits, four do not, so every two are widened."""
    wide = []
    for half in range(2):
        sums = None
        for i in range(0, len(operands), 2):
            pair = _products(operands[i][0], quad(i), half) + _products(operands[i + 1][0], quad(i + 1), half)
            sums = _widened(pair) if sums is None else sums + _widened(pair)
        wide.append(sums)
    return [totals[0] + intrinsic("int32x4", "llvm.aarch64.neon.addp", *wide)]


def _scheme(kind: str, size: str) -> Scheme:
    operands, shifts = operands_of(kind, "few")
    add = _wide if kind in ("int8", "nf4") else _narrow

    def dot(totals: Sequence[Expression], place: Place) -> list[Expression]:
        lines = [line_bytes(place, i, 4) for i in range(turn_lines(kind))]
        return add(totals, operands(lines), place.quad)

    return described(kind, "smull", dot, shifts)


ISA = Isa(
    name="neon",
    triple="aarch64-linux-gnu",
    # Of the CPUs of ARMv8.0, LLVM spills least with the schedule of this one; no instruction is newer than Cortex-A72.
    cpu="exynos-m3",
    attributes=("+neon",),
    lanes=4,
    scheme=_scheme,
    tile=lambda kind, size: Tile(rows=1, blocks=2) if size == "single" else Tile(rows=2, blocks=1),
    special={("sign", size): lookup.SIGN for size in SIZES},
    float_single=Tile(rows=1, blocks=4),
    float_many=Tile(rows=4, blocks=1),
)
