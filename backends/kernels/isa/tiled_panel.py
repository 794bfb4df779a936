"""How an instruction set with narrow registers multiplies a step of a tile; `tiled` makes products of it."""
# TVMScript's annotations are TIR types, which a Python type checker cannot know.
# mypy: disable-error-code="valid-type, no-untyped-def, no-untyped-call, no-any-return, untyped-decorator, misc"

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm.script import tirx as T

from hikui.backends.kernels.isa.base import Expression, splat

LANES = 4
"""Of an accumulator, an int32x4."""


@dataclass(frozen=True)
class Panel:
    """How an instruction set multiplies a step of a tile: `rows` of activations × `parts` quarters of a block.

    Attributes:
        name: what `hikui targets --kernels` calls it.
        kind: of the weights.
        rows, parts: of the tile; parts is 1, 2 or 4.
        accumulators: registers that a tile sums in, for each block; held as int32x4.
        step: `step(totals, line, quads)` adds the products of 32 columns to the accumulators, a list for each block;
            `line(block, part, i)` is a quarter of the step's i-th line, uint8x16 (part None: all of it, uint8x64), and
            `quads(row, first)` four neighbouring activation quads of a row, int32x4. With `prepared`, quads(0, i) is
            the i-th register of what the tile's rows were made into.
        sums: `sums(totals)` are rows · parts vectors, int32x4, in an order and with lanes of the panel's own: the sums
            of products of codes, but for what `behind` is for.
        by_row: `by_row(values)` brings vectors of one value each, by row, to the lanes of `sums`.
        by_part: `by_part(values)` the same with vectors of the output rows of each part.
        in_rows: `in_rows(values)` brings vectors like those of `sums` to rows: those of a row, part after part.
        start: the sum of a row's activations times this is where the last rows · parts accumulators start, the others
            at 0.
        behind: the sum of a row's activations times this comes to the sums.
        prepared: quads that a `prepare_kernel` made of a step of a row, `rows` rows at a time; 0: q itself is read. 8:
            those of q, quad by quad of all rows.
        prefix: whether the last of them is the sum of the activations from the first column on.
        longest: the most steps that the accumulators hold the sum of; 0: any number, as of kinds not stored in steps.
        first: `first(steps)` are the first values of the accumulators that do not depend on the activations.
    """

    name: str
    kind: str
    rows: int
    parts: int
    accumulators: int
    step: Callable[..., Sequence[Expression]]
    sums: Callable[[Sequence[Expression]], Sequence[Expression]]
    by_row: Callable[[Sequence[Expression]], Sequence[Expression]]
    by_part: Callable[[Sequence[Expression]], Sequence[Expression]]
    in_rows: Callable[[Sequence[Expression]], Sequence[Expression]]
    start: int = 0
    behind: int = 0
    prepared: int = 0
    prefix: bool = False
    longest: int = 0
    first: Callable[[Expression], Sequence[Expression]] | None = None


def summed(shifts: Sequence[int], factor: int, held: Sequence[Expression]) -> Expression:
    """Factor times the sum of accumulators that hold 2^shift times their share, shifts ascending from 0; exact."""
    value = held[-1]
    for k in reversed(range(len(shifts) - 1)):
        value = (value >> splat(T.int32(shifts[k + 1] - shifts[k]), LANES)) + held[k]
    return value if factor == 1 else value * splat(T.int32(factor), LANES)


def starting_offset(shifts: Sequence[int], factor: int, offset: int) -> int | None:
    """What the highest accumulator starts at, times the sum of the activations, to take the offset off; if integer."""
    whole = offset << shifts[-1]
    return -(whole // factor) if whole % factor == 0 else None
