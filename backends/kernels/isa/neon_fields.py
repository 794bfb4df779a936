"""How the lines of packed weights become operands of NEON's products: registers of 4 output rows × 4 input columns."""

from collections.abc import Callable, Sequence

from tvm import tirx
from tvm.script import tirx as T

from hikui.backends.kernels.fields import CODEBOOKS, pieces
from hikui.backends.kernels.isa import ternary
from hikui.backends.kernels.isa.base import Expression, Scheme, constant, field_values, intrinsic, splat, uniform

Operands = Sequence[tuple[Expression, int]]
"""What is multiplied with each of the step's quads, and the accumulator that it goes to."""


def _masked(codes: Expression, mask: int) -> Expression:
    return codes & splat(T.uint8(mask), 16)


def _down(codes: Expression, bits: int) -> Expression:
    return codes >> splat(T.uint8(bits), 16)


def sign_operands(lines: list[Expression]) -> Operands:
    """−1 where a bit is set, else 0: one cmtst a field."""
    ones, zeros = splat(T.int8(-1), 16), splat(T.int8(0), 16)
    return [(tirx.Select(_masked(lines[0], 1 << bit) != splat(T.uint8(0), 16), ones, zeros), 0) for bit in range(8)]


def _int2_in_place(lines: list[Expression]) -> Operands:
    return [
        operand
        for line in lines
        for operand in (
            (_masked(line, 0x03), 0),
            (_masked(line, 0x0C), 1),
            (_masked(line, 0x30), 2),
            (_down(line, 6), 0),
        )
    ]


def cut_fields(lines: list[Expression]) -> list[Expression]:
    """The two fields of int3 that lie in two bytes: their third bit goes to bit 7, the others are inserted below it."""
    insert = "llvm.aarch64.neon.vsri"
    low, middle, high = (T.reinterpret("int8x16", line) for line in lines)
    left = T.reinterpret("int8x16", lines[1] << splat(T.uint8(1), 16))
    pairs = ((middle, low), (left, high))
    return [
        _down(T.reinterpret("uint8x16", intrinsic("int8x16", insert, above, below, T.int32(1))), 5)
        for above, below in pairs
    ]


def _int3_in_place(lines: list[Expression]) -> Operands:
    whole = [(_masked(line, mask), to) for line in lines for to, mask in enumerate((0x07, 0x38))]
    return [*whole, *((field, 0) for field in cut_fields(lines))]


def _int3(lines: list[Expression]) -> Operands:
    brought = field_values(lines, pieces("int3"), 16)[:6]
    return [(field, 0) for field in [*brought, *cut_fields(lines)]]


def _brought_down(kind: str) -> Callable[[list[Expression]], Operands]:
    return lambda lines: [(codes, 0) for codes in field_values(lines, pieces(kind), 16)]


def _codebook(kind: str) -> Callable[[list[Expression]], Operands]:
    """The codes are looked up in a table of 16 bytes that stays in a register."""
    table = constant(CODEBOOKS[kind], "int8")

    def operands(lines: list[Expression]) -> Operands:
        indices = field_values(lines, pieces(kind), 16)
        look = "llvm.aarch64.neon.tbl1"
        return [(intrinsic("int8x16", look, table, T.reinterpret("int8x16", index)), 0) for index in indices]

    return operands


def operands_of(kind: str, size: str) -> tuple[Callable[[list[Expression]], Operands], tuple[int, ...]]:
    """How the lines of a step, or of `ternary` a line, become operands of sdot, and the shifts of the accumulators."""
    if kind == "sign":
        return sign_operands, (0,)
    if kind == "int8":
        return lambda lines: [(line, 0) for line in lines], (0,)
    if kind == "ternary":
        return lambda lines: [(code, 0) for code in ternary.codes(lines[0], 16)], (0,)
    if kind in CODEBOOKS:
        return _codebook(kind), (0,)
    if size == "single" and kind == "int2":
        return _int2_in_place, (0, 2, 4)
    if kind == "int3":
        return (_int3_in_place, (0, 3)) if size == "single" else (_int3, (0,))
    return _brought_down(kind), (0,)


def described(kind: str, name: str, dot: Callable[..., Sequence[Expression]], shifts: tuple[int, ...]) -> Scheme:
    """A scheme that multiplies what `operands_of` gives."""
    if kind == "sign":
        return Scheme(f"{name} cmtst", dot, shifts, -2, 1)
    if kind in ("int8", "ternary"):
        return Scheme(name, dot, shifts, 1, 0)
    if kind in CODEBOOKS:
        return Scheme(f"{name} table", dot, shifts, 1, 0)
    return uniform(kind, f"{name} in place" if len(shifts) > 1 else name, dot, shifts)
