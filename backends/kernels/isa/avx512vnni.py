"""AVX-512 with VNNI: 16 output rows × 4 input columns in one register, unsigned × signed products."""

from collections.abc import Callable, Sequence

from tvm.script import tirx as T

from hikui.backends.kernels.fields import CODEBOOKS, LINES, SEGMENTS, pieces
from hikui.backends.kernels.isa import ternary
from hikui.backends.kernels.isa.base import (
    Expression,
    Isa,
    Place,
    Scheme,
    Special,
    Tile,
    constant,
    field_values,
    intrinsic,
    line_bytes,
    splat,
    uniform,
)
from hikui.backends.kernels.isa.panel import with_panel

_LANES = 16


def _accumulate(total: Expression, codes: Expression, quad: Expression) -> Expression:
    return intrinsic(
        "int32x16",
        "llvm.x86.avx512.vpdpbusd.512",
        total,
        T.reinterpret("int8x64", codes),
        T.reinterpret("int8x64", splat(quad, _LANES)),
    )


def _lines(kind: str, place: Place) -> list[Expression]:
    return [line_bytes(place, i, _LANES) for i in range(LINES[kind])]


def _masked(codes: Expression, mask: int) -> Expression:
    return codes & splat(T.uint8(mask), 64)


def _high(codes: Expression) -> Expression:
    """The upper nibbles in the lower ones' place; the bits of a neighbour above them are masked off by the user."""
    words = T.reinterpret("uint16x32", codes) >> T.broadcast(T.uint16(4), 32)
    return T.reinterpret("uint8x64", words)


Operands = Sequence[tuple[Expression, int]]
"""What is multiplied with each of the step's quads, and the accumulator that it goes to."""


def _scheme_dot(operands: Callable[[list[Expression]], Operands], kind: str) -> Callable[..., list[Expression]]:
    def dot(totals: Sequence[Expression], place: Place) -> list[Expression]:
        sums = list(totals)
        for i, (codes, to) in enumerate(operands(_lines(kind, place))):
            sums[to] = _accumulate(sums[to], codes, place.quad(i))
        return sums

    return dot


def _brought_down(kind: str) -> Callable[[list[Expression]], Operands]:
    return lambda lines: [(codes, 0) for codes in field_values(lines, pieces(kind), 64)]


def _sign_in_place(lines: list[Expression]) -> Operands:
    return [(_masked(codes, 1 << bit), bit) for codes in (lines[0], _high(lines[0])) for bit in range(4)]


def _int2_in_place(lines: list[Expression]) -> Operands:
    return [
        (_masked(codes, mask), to)
        for line in lines
        for codes in (line, _high(line))
        for to, mask in enumerate((0x03, 0x0C))
    ]


def _int3_in_place(lines: list[Expression]) -> Operands:
    brought = field_values(lines, pieces("int3"), 64)
    whole = [(_masked(line, mask), to) for line in lines for to, mask in enumerate((0x07, 0x38))]
    return [*whole, (brought[6], 0), (brought[7], 0)]


def _int4_in_place(lines: list[Expression]) -> Operands:
    return [(_masked(line, mask), to) for line in lines for to, mask in enumerate((0x0F, 0xF0))]


def _codebook(kind: str) -> Callable[[list[Expression]], Operands]:
    """The codes lie in a table of 16 bytes, brought above zero as the unsigned operand must be."""
    lowest = min(CODEBOOKS[kind])
    table = T.reinterpret("int8x64", constant([code - lowest for code in CODEBOOKS[kind]] * 4, "uint8"))

    def operands(lines: list[Expression]) -> Operands:
        indices = field_values(lines, pieces(kind), 64)
        shuffle = "llvm.x86.avx512.pshuf.b.512"
        return [(intrinsic("int8x64", shuffle, table, T.reinterpret("int8x64", index)), 0) for index in indices]

    return operands


def _int8(lines: list[Expression]) -> Operands:
    return [(codes ^ splat(T.uint8(128), 64), 0) for codes in lines]


def _ternary_single(totals: Sequence[Expression], place: Place) -> list[Expression]:
    """Products of states, all of them plus 128, as they must not be below zero."""
    whole, rest = totals
    above = line_bytes(place, 0, _LANES) ^ splat(T.uint8(128), 64)
    for i, (state, after) in enumerate(ternary.pairs(above, 64)):
        whole, rest = (_accumulate(total, each, place.quad(i)) for total, each in ((whole, state), (rest, after)))
    return [whole, rest]


def _ternary_fields(totals: Sequence[Expression], place: Place) -> list[Expression]:
    total = totals[0]
    above = line_bytes(place, 0, _LANES) ^ splat(T.uint8(128), 64)
    for i, field in enumerate(ternary.fields(above, 64)):
        total = _accumulate(total, field, place.quad(i))
    return [total]


_IN_PLACE: dict[str, tuple[Callable[[list[Expression]], Operands], tuple[int, ...]]] = {
    "sign": (_sign_in_place, (0, 1, 2, 3)),
    "int2": (_int2_in_place, (0, 2)),
    "int3": (_int3_in_place, (0, 3)),
    "int4": (_int4_in_place, (0, 4)),
}


def _scheme(kind: str, size: str) -> Scheme:
    if kind == "ternary":
        if size == "single":
            return Scheme(f"vnni {ternary.NAME}", _ternary_single, (0, 0), 1, 1, sum=ternary.of_differences)
        return Scheme("vnni", _ternary_fields, (ternary.FIELD,), 1, 1)
    if kind == "int8":
        return Scheme("vnni", _scheme_dot(_int8, kind), (0,), 1, 128)
    if kind in CODEBOOKS:
        return Scheme("vnni table", _scheme_dot(_codebook(kind), kind), (0,), 1, -min(CODEBOOKS[kind]))
    if size == "single":
        operands, shifts = _IN_PLACE[kind]
        return uniform(kind, "vnni in place", _scheme_dot(operands, kind), shifts)
    return uniform(kind, "vnni", _scheme_dot(_brought_down(kind), kind))


def _tile(kind: str, size: str) -> Tile:
    # Weights in memory, 4096×4096 on Zen 4: 1 block 1.3–1.6, 2 blocks 1.1, 8 blocks 1.4–1.6 times the time of 4;
    # software prefetch only cost time.
    # Sixteen accumulators are what leaves registers for the weights; 8 rows of 2 blocks were slower by a tenth.
    # Codes of ternary take more to bring down, and serve twice as many rows: 1.3 times as fast with 8
    # and more, .7 with two.
    if kind == "ternary" and size != "single":
        return Tile(rows=8, blocks=2)
    return Tile(rows=1, blocks=4) if size == "single" else Tile(rows=4, blocks=4)


def _panels() -> dict[tuple[str, str], Special]:
    """Several rows of activations are read side by side."""
    names = {kind: " + ".join(dict.fromkeys(_scheme(part, "few").name for part in SEGMENTS[kind])) for kind in SEGMENTS}
    return {(kind, "few"): with_panel(names[kind], _tile(kind, "few")) for kind in SEGMENTS}


ISA = Isa(
    name="avx512vnni",
    triple="x86_64-linux-gnu",
    cpu="x86-64-v4",
    attributes=("+avx512vnni",),
    lanes=_LANES,
    scheme=_scheme,
    tile=_tile,
    float_single=Tile(rows=1, blocks=4),
    float_many=Tile(rows=4, blocks=4),
    special=_panels(),
    classes={"many": "few"},
)
