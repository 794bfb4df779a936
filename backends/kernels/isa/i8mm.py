"""NEON with the matrix products of ARMv8.6: 2 rows of activations × 2 output rows × 8 input columns an instruction.

One row of activations is multiplied as without them. For more, a register of weights must hold 8 columns of two rows:
quads f and f+4 of a step lie side by side, for which most formats' lines can be interleaved before they are unpacked.
"""

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from hikui.backends.kernels.fields import CODEBOOKS, LINES, SEGMENTS
from hikui.backends.kernels.isa import dotprod, side_by_side, tiled
from hikui.backends.kernels.isa.base import SIZES, Expression, Isa, Special, Tile, constant, intrinsic, splat
from hikui.backends.kernels.isa.neon_fields import cut_fields, described
from hikui.backends.kernels.isa.tiled_panel import Panel, starting_offset

_PAIRS = 4
"""Pairs of quads in a step."""

Line = Callable[[int, int, int], Expression]


def _as(dtype: str, value: Expression) -> Expression:
    return T.reinterpret(dtype, value)


def _interleaved(left: Expression, right: Expression) -> tuple[Expression, Expression]:
    """Two registers of 4 rows × 4 columns as two of 2 rows × 8 columns."""
    words = [_as("int32x4", left), _as("int32x4", right)]
    low, high = (tirx.Shuffle(words, lanes) for lanes in ([0, 4, 1, 5], [2, 6, 3, 7]))
    return _as("uint8x16", low), _as("uint8x16", high)


def _masked(codes: Expression, mask: int) -> Expression:
    return codes & splat(T.uint8(mask), 16)


def _down(codes: Expression, bits: int) -> Expression:
    return codes >> splat(T.uint8(bits), 16)


def _sign(lines: list[Expression]) -> list[Sequence[Expression]]:
    """The line beside itself, so that one cmtst takes a bit of one half and another bit of the other."""
    halves = _interleaved(lines[0], lines[0])
    ones, zeros = splat(T.int8(-1), 16), splat(T.int8(0), 16)
    masks = [constant(([1 << f] * 4 + [16 << f] * 4) * 2, "uint8") for f in range(_PAIRS)]
    return [[tirx.Select((half & mask) != splat(T.uint8(0), 16), ones, zeros) for half in halves] for mask in masks]


def _int2(lines: list[Expression]) -> list[Sequence[Expression]]:
    halves = _interleaved(lines[0], lines[1])
    return [
        [_masked(_down(half, 2 * f) if f else half, 3) if f < 3 else _down(half, 6) for half in halves]
        for f in range(_PAIRS)
    ]


def _int3(lines: list[Expression]) -> list[Sequence[Expression]]:
    ends = _interleaved(lines[0], lines[2])
    cut = cut_fields(lines)
    middle = (_masked(lines[1], 7), _masked(_down(lines[1], 3), 7))
    first = [[_masked(end, 7) for end in ends], [_masked(_down(end, 3), 7) for end in ends]]
    return [*first, *(_interleaved(whole, parts) for whole, parts in zip(middle, cut, strict=True))]


def _nibbles(lines: list[Expression]) -> list[Sequence[Expression]]:
    pairs = [_interleaved(lines[i], lines[i + 2]) for i in range(2)]
    return [
        take
        for halves in pairs
        for take in ([_masked(half, 15) for half in halves], [_down(half, 4) for half in halves])
    ]


def _codebook(kind: str) -> Callable[[list[Expression]], list[Sequence[Expression]]]:
    table = constant(CODEBOOKS[kind], "int8")
    look = "llvm.aarch64.neon.tbl1"
    return lambda lines: [
        [intrinsic("int8x16", look, table, _as("int8x16", index)) for index in indices] for indices in _nibbles(lines)
    ]


def _operands(kind: str) -> Callable[[list[Expression]], list[Sequence[Expression]]]:
    """How the lines of a step become operands of smmla: by pair of quads, rows 0 and 1, then rows 2 and 3."""
    if kind == "int8":
        return lambda lines: [_interleaved(lines[f], lines[f + _PAIRS]) for f in range(_PAIRS)]
    if kind in CODEBOOKS:
        return _codebook(kind)
    return {"sign": _sign, "int2": _int2, "int3": _int3, "int4": _nibbles}[kind]


def _panel(kind: str, rows: int, parts: int) -> Panel:
    """Accumulators hold 2 rows of activations × 2 output rows."""
    operands = _operands(kind)
    of = described(kind, "smmla", list, (0,))

    def at(pair: int, part: int, half: int) -> int:
        return (pair * parts + part) * 2 + half

    def step(totals: Sequence[Any], line: Line, quads: Callable[..., Expression]) -> list[list[Expression]]:
        held = list(totals[0])
        unpacked = [operands([line(0, part, i) for i in range(LINES[kind])]) for part in range(parts)]
        for f, pair, part, half in product(range(_PAIRS), range(rows // 2), range(parts), range(2)):
            k = at(pair, part, half)
            tokens = _as("int8x16", quads(0, f * rows // 2 + pair))
            codes = _as("int8x16", unpacked[part][f][half])
            held[k] = intrinsic("int32x4", "llvm.aarch64.neon.smmla", held[k], tokens, codes)
        return [held]

    def sums(totals: Sequence[Expression]) -> list[Expression]:
        return [total if of.factor == 1 else total * splat(T.int32(of.factor), 4) for total in totals]

    def by_row(values: Sequence[Expression]) -> list[Expression]:
        pairs = [tirx.Shuffle([values[row], values[row + 1]], [0, 0, 4, 4]) for row in range(0, rows, 2)]
        return [pair for pair in pairs for _ in range(2 * parts)]

    def by_part(values: Sequence[Expression]) -> list[Expression]:
        halves = [tirx.Shuffle([value], lanes) for value in values for lanes in ([0, 1, 0, 1], [2, 3, 2, 3])]
        return halves * (rows // 2)

    def in_rows(values: Sequence[Expression]) -> list[Expression]:
        lanes = ([0, 1, 4, 5], [2, 3, 6, 7])
        return [
            tirx.Shuffle([values[at(row // 2, part, half)] for half in range(2)], lanes[row % 2])
            for row, part in product(range(rows), range(parts))
        ]

    start = starting_offset((0,), of.factor, of.offset)
    return Panel(
        name=of.name,
        kind=kind,
        rows=rows,
        parts=parts,
        accumulators=rows * parts,
        step=step,
        sums=sums,
        start=start or 0,
        by_row=by_row,
        by_part=by_part,
        in_rows=in_rows,
        behind=-of.offset if start is None else 0,
        prepared=side_by_side.STEP,
        prefix=start is None or start != 0,
    )


def _special(kind: str, size: str) -> Special:
    # A line of ternary holds five quads, which are no pairs.
    if size == "single" or kind == "ternary":
        return dotprod.ISA.special[kind, size]
    rows, parts = (4, 2) if size == "few" else (8, 2)
    panels = [_panel(segment, rows, parts) for segment in SEGMENTS[kind]]
    name = " + ".join(dict.fromkeys(panel.name for panel in panels))

    def build(isa: Isa, kind: str, size: str, symbol: str) -> Any:
        return tiled.integer(panels, kind, 1, symbol)

    def prepare(isa: Isa, symbol: str) -> Any:
        return side_by_side.prepare(rows, lambda field: (field % 4 * (2 * rows) + field // 4, 2), symbol)

    return Special(name, 1, build, f"in_pairs_{rows}", prepare, side_by_side.PREPARED_BYTES)


ISA = Isa(
    name="i8mm",
    triple="aarch64-linux-gnu",
    # The core of Cortex-A76 too, with a better schedule in LLVM.
    cpu="neoverse-n1",
    attributes=("+neon", "+dotprod", "+i8mm"),
    lanes=4,
    # Every format has a kernel of its own below.
    scheme=dotprod.ISA.scheme,
    tile=lambda kind, size: Tile(rows=1, blocks=1),
    float_single=Tile(rows=1, blocks=4),
    float_many=Tile(rows=4, blocks=1),
    special={(kind, size): _special(kind, size) for kind in SEGMENTS for size in SIZES},
)
