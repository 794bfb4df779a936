"""Where the values of a packed weight lie, as docs/architecture.md has it: what every instruction set starts from.

A line is 64 bytes, 16 output rows × 4 neighbouring input columns; as 16 int32 values, lane r holds the bytes of row r.
A step is 32 input columns. A field is what a line's bytes hold of 4 neighbouring columns.
"""

from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from hikui.lowering.formats.kinds import KINDS, TERNARY_COLUMNS

Expression = Any
"""A TIR expression; TVM ships no types for them."""

QUADS = 8
"""Activation quads (4 neighbouring int8 values) in a step."""

LINES = {name: kind.lines for name, kind in KINDS.items() if kind.lines is not None}
"""Lines in a step, for the kinds that are stored in steps."""

DIGITS = TERNARY_COLUMNS // 4
"""Quads in a line of `ternary`, which is stored in lines of so many whatever the steps; see `isa.ternary`."""

SEGMENTS = {name: (name,) for name in KINDS} | {"mixed": ("int4", "sign")}
"""The formats with integer codes, which kernels are named after: the parts of a row of each, in order."""

CODEBOOKS: dict[str, tuple[int, ...]] = {name: KINDS[name].codes or () for name in ("nf4", "fp4")}
"""Codes by index, for the kinds whose codes are not evenly spaced."""

_UNIFORM = {name: kind.codes for name, kind in KINDS.items() if kind.codes and name in LINES and name not in CODEBOOKS}

FACTOR = {name: codes[1] - codes[0] for name, codes in _UNIFORM.items()}
OFFSET = {name: -codes[0] for name, codes in _UNIFORM.items()}
"""A code of these kinds is FACTOR · u − OFFSET for the stored field u."""


@dataclass(frozen=True)
class Piece:
    """Bits of a field: `width` bits from bit `bit` of the bytes of line `line` of the step, put at bit `to`."""

    line: int
    bit: int
    width: int
    to: int = 0


def turn_lines(kind: str) -> int:
    """Lines that a kernel takes at a turn: a step, or of `ternary` one."""
    return LINES.get(kind, 1)


def turn_quads(kind: str) -> int:
    """Quads of these lines."""
    return QUADS if kind in LINES else DIGITS


def group_lines(kind: str, group_steps: Expression) -> Expression:
    """Lines of a group of so many steps."""
    return group_steps * LINES[kind] if kind in LINES else (group_steps * QUADS + (DIGITS - 1)) // DIGITS


def pieces(kind: str) -> list[tuple[Piece, ...]]:
    """The 8 fields of a step, in the order of their columns."""
    if kind == "int3":
        whole = [(Piece(line, bit, 3),) for line in range(3) for bit in (0, 3)]
        return [*whole, (Piece(0, 6, 2), Piece(1, 7, 1, 2)), (Piece(2, 6, 2), Piece(1, 6, 1, 2))]
    width = KINDS[kind].bits
    return [(Piece(line, bit, width),) for line in range(LINES[kind]) for bit in range(0, 8, width)]


def constant(values: Any, dtype: str) -> Expression:
    """A vector of constants."""
    return tirx.Shuffle([tirx.const(value, dtype) for value in values], list(range(len(values))))


def splat(value: Expression, lanes: int) -> Expression:
    """A vector of one value; the value itself for one lane."""
    return value if lanes == 1 else T.broadcast(value, lanes)
