"""NEON with the dot product of ARMv8.2: 4 output rows × 4 input columns in a register, signed × signed."""

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from hikui.backends.kernels.fields import DIGITS, LINES, QUADS, SEGMENTS
from hikui.backends.kernels.isa import generic, lookup, side_by_side, ternary, tiled
from hikui.backends.kernels.isa.base import (
    SIZES,
    Expression,
    Isa,
    Special,
    Tile,
    intrinsic,
)
from hikui.backends.kernels.isa.neon_fields import described, operands_of
from hikui.backends.kernels.isa.panel import panel
from hikui.backends.kernels.isa.tiled_panel import Panel, starting_offset, summed

_ORDER = (0, 1, 2, 3, 4, 5, 7, 6)
"""Field 6 of int3 comes last, as the last use of the middle byte: its insertion may then destroy that register."""


def _accumulate(total: Expression, codes: Expression, quads: Expression, lane: int) -> Expression:
    """Uses sdot by element: LLVM folds the shuffle of one lane into the instruction."""
    quad = T.reinterpret("int8x16", tirx.Shuffle([quads], [lane] * 4))
    return intrinsic("int32x4", "llvm.aarch64.neon.sdot", total, T.reinterpret("int8x16", codes), quad)


def _panel(kind: str, size: str, rows: int, parts: int, prepared: bool) -> Panel:
    """Tiles of sdot: an accumulator for each row and quarter, times the shifts of the fields used in place."""
    operands, shifts = operands_of(kind, size)
    of = described(kind, "sdot", list, shifts)
    share = rows * parts
    orders = (range(parts), _ORDER) if rows == 1 else (_ORDER, range(parts))

    def step(totals: Sequence[Expression], line: Callable[..., Expression], quads: Callable[..., Expression]) -> Any:
        held = [list(of_block) for of_block in totals]
        for block in range(len(held)):
            unpacked = [operands([line(block, part, i) for i in range(LINES[kind])]) for part in range(parts)]
            # The order is LLVM's first idea of what is in registers at a time.
            for outer, inner, row in product(*orders, range(rows)):
                field, part = (inner, outer) if rows == 1 else (outer, inner)
                quad, lane = (field * rows + row, row % 4) if prepared else (field, field % 4)
                four = quads(0, quad // 4) if prepared else quads(row, quad // 4 * 4)
                codes, to = unpacked[part][field]
                k = to * share + row * parts + part
                held[block][k] = _accumulate(held[block][k], codes, four, lane)
        return held

    def sums(totals: Sequence[Expression]) -> list[Expression]:
        return [summed(shifts, of.factor, totals[k::share]) for k in range(share)]

    start = starting_offset(shifts, of.factor, of.offset)
    return Panel(
        name=of.name,
        kind=kind,
        rows=rows,
        parts=parts,
        accumulators=share * len(shifts),
        step=step,
        sums=sums,
        start=start or 0,
        by_row=lambda values: [values[row] for row in range(rows) for _ in range(parts)],
        by_part=lambda values: list(values) * rows,
        in_rows=list,
        behind=-of.offset if start is None else 0,
        prepared=side_by_side.STEP if prepared else 0,
        prefix=prepared and (start is None or start != 0),
    )


def _ternary_panel(rows: int, parts: int, prepared: bool) -> Panel:
    """As `_panel`; one row of activations is multiplied with states, several with the codes that they give."""
    differences = rows == 1
    share = rows * parts

    def operands(line: Expression) -> list[list[Expression]]:
        if differences:
            return [list(pair) for pair in ternary.pairs(line, 16)]
        return [[code] for code in ternary.codes(line, 16)]

    def step(totals: Sequence[Any], line: Callable[..., Expression], quads: Callable[..., Expression]) -> Any:
        held = [list(of_block) for of_block in totals]
        for block in range(len(held)):
            unpacked = [operands(line(block, part, 0)) for part in range(parts)]
            for field, part, row in product(range(DIGITS), range(parts), range(rows)):
                if prepared:
                    quad = field * rows + row
                    four, lane = quads(0, quad // 4), quad % 4
                else:
                    # Four quads from the first on, and from the second on for the last of five.
                    four, lane = (quads(row, 0), field) if field < 4 else (quads(row, 1), 3)
                for to, codes in enumerate(unpacked[part][field]):
                    k = to * share + row * parts + part
                    held[block][k] = _accumulate(held[block][k], codes, four, lane)
        return held

    def sums(totals: Sequence[Expression]) -> list[Expression]:
        return [ternary.of_differences(totals[k::share], 4) for k in range(share)] if differences else list(totals)

    return Panel(
        name=f"sdot {ternary.NAME}" if differences else "sdot",
        kind="ternary",
        rows=rows,
        parts=parts,
        accumulators=share * (2 if differences else 1),
        step=step,
        sums=sums,
        by_row=lambda values: [values[row] for row in range(rows) for _ in range(parts)],
        by_part=lambda values: list(values) * rows,
        in_rows=list,
        prepared=QUADS if prepared else 0,
    )


def _special(kind: str, size: str) -> Special:
    if (kind, size) == ("sign", "single"):
        return lookup.SIGN
    # 16 accumulators of 4 lanes at most: the other half of the registers is for weights, masks and activations.
    if size == "single":
        rows, parts, blocks = 1, 4, {"int2": 1, "ternary": 1, "int3": 1}.get(kind, 4)
    else:
        rows, parts, blocks = (4, 2, 1) if size == "few" else (8, 2, 1)
    prepared = size == "many"
    if kind == "ternary":
        panels = [_ternary_panel(rows, parts, prepared)]
    else:
        panels = [_panel(segment, size, rows, parts, prepared) for segment in SEGMENTS[kind]]
    name = " + ".join(dict.fromkeys(panel.name for panel in panels))

    def build(isa: Isa, kind: str, size: str, symbol: str) -> Any:
        return tiled.integer(panels, kind, blocks, symbol)

    if not prepared:
        return Special(name, blocks, build)

    if kind == "ternary":
        return Special(name, blocks, build, f"panel_{rows}", lambda isa, symbol: panel(rows, symbol), 4 * QUADS)

    def prepare(isa: Isa, symbol: str) -> Any:
        return side_by_side.prepare(rows, lambda field: (field * rows, 1), symbol)

    return Special(name, blocks, build, f"side_by_side_{rows}", prepare, side_by_side.PREPARED_BYTES)


ISA = Isa(
    name="dotprod",
    triple="aarch64-linux-gnu",
    # The core of Cortex-A76 too, with a better schedule in LLVM.
    cpu="neoverse-n1",
    attributes=("+neon", "+dotprod"),
    lanes=4,
    # Every format has a kernel of its own below.
    scheme=lambda kind, size: generic.scheme(kind, 4),
    tile=lambda kind, size: Tile(rows=1, blocks=1),
    float_single=Tile(rows=1, blocks=4),
    float_many=Tile(rows=4, blocks=1),
    special={(kind, size): _special(kind, size) for kind in SEGMENTS for size in SIZES},
)
