"""What the kernels share: how a block of threads divides a product, and how it brings its sums together.

A block of threads computes 16 output rows, one block of the packed layout, for a tile of activation rows. Its warps
divide the input columns; within a warp, lane l works on row quarter l % 4 and on the (l / 4)-th of eight neighbouring
steps. So a lane's 16-byte loads are the words of 4 rows, no sum crosses lanes before the end, and every weight is read
by one lane. Activations are read from global memory: within a block no two warps read the same ones.
"""
# TVMScript's annotations are TIR types, which a Python type checker cannot know.
# mypy: disable-error-code="valid-type, no-untyped-def, no-untyped-call, no-any-return, untyped-decorator, misc"

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tvm.script import tirx as T

from hikui.backends.kernels.fields import Expression

WARP = 32
WARPS = 8
THREADS = WARP * WARPS
PLACES = THREADS // 4
"""Steps that a block of threads works on at once."""

ALL_LANES = 0xFFFFFFFF


@T.inline
def add_over_lanes(values, count, first, stop):
    """Sums `count` values of each lane over the lanes that differ in the bits from `first` up to below `stop`."""
    for i in T.unroll(count):
        if first <= 1 and stop > 1:
            values[i] = values[i] + T.tvm_warp_shuffle_xor(T.uint32(ALL_LANES), values[i], 1, 32, 32)
        if first <= 2 and stop > 2:
            values[i] = values[i] + T.tvm_warp_shuffle_xor(T.uint32(ALL_LANES), values[i], 2, 32, 32)
        if first <= 4 and stop > 4:
            values[i] = values[i] + T.tvm_warp_shuffle_xor(T.uint32(ALL_LANES), values[i], 4, 32, 32)
        if first <= 8 and stop > 8:
            values[i] = values[i] + T.tvm_warp_shuffle_xor(T.uint32(ALL_LANES), values[i], 8, 32, 32)
        if first <= 16 and stop > 16:
            values[i] = values[i] + T.tvm_warp_shuffle_xor(T.uint32(ALL_LANES), values[i], 16, 32, 32)


class Lane(NamedTuple):
    """What a lane works on.

    Attributes:
        total: its sums, for each row of activations 4 neighbouring output rows.
        row: the rows of activations.
        quarter: which 4 of the block's 16 output rows.
        place: which of neighbouring steps.
        block: the block of output rows.
    """

    total: Any
    row: Any
    quarter: Expression
    place: Expression
    block: Expression


@T.inline
def start(total, row, per_row, rows, chunk, m_size):
    """Takes the rows of a chunk, the last in place of those that are not there, and sets the sums to zero."""
    for i in T.unroll(rows):
        row[i] = T.min(chunk * rows + i, m_size - 1)
    for i in T.unroll(rows * per_row):
        total[i] = T.float32(0)


def group_of(step: Expression, factor: Expression) -> Expression:
    """The group of a step of 32 columns, ⌊step / steps in a group⌋, without a division.

    Args:
        step: int32, the step's number.
        factor: 2³¹ / steps in a group, rounded up, as an unsigned number of 32 bits; 0 where there is one group. The
            result is exact where steps · steps in a group is below 2³¹.
    """
    return T.call_pure_extern("int32", "__umulhi", step + step, factor)


Add = Callable[..., None]
"""`add(lane, first_line, first_step, count, operands)`: adds the products of `count` steps from `first_step` on, whose
weights start at line `first_line`; `operands` are the kernel's own."""


@T.inline
def add_segments(add: Sequence[Add], wide_lines: int, lane: Lane, lines: Any, steps: Any, operands: Any):
    """Adds the products of all steps: of one segment or of two, the first of which takes `wide_lines` lines a step."""
    first_line = T.cast(lane.block, "int64") * lines
    if len(add) == 1:
        add[0](lane, first_line, 0, steps, operands)
    else:
        # Every step takes a line at least; how many lines there are beyond that says how many steps are wide.
        wide = (lines - steps) // (wide_lines - 1)
        add[0](lane, first_line, 0, wide, operands)
        add[1](lane, first_line + wide * wide_lines, wide, steps - wide, operands)


@T.inline
def finish(total, per_lane, rows, block, chunk, lane, warp, partial, bias, has_bias, y, m_size, n_size):
    """Adds the sums of all lanes and warps and stores y.

    `total` holds, for each of `rows` activation rows, `per_lane` neighbouring output rows; lane l has the
    (l % (16 / per_lane))-th such run of the 16.
    """
    add_over_lanes(total, rows * per_lane, 16 // per_lane, 32)
    if lane < 16 // per_lane:
        for i in T.unroll(rows):
            for r in T.unroll(per_lane):
                partial[(warp * rows + i) * 16 + lane * per_lane + r] = total[i * per_lane + r]
    T.evaluate(T.tvm_storage_sync("shared"))
    thread = warp * WARP + lane
    if thread < rows * 16:
        total[0] = partial[thread]
        for w in T.unroll(WARPS - 1):
            total[0] = total[0] + partial[(w + 1) * (rows * 16) + thread]
        m = chunk * rows + thread // 16
        n = block * 16 + thread % 16
        if m < m_size and n < n_size:
            if has_bias != 0:
                total[0] = total[0] + bias[n]
            y[T.int64(m) * T.int64(n_size) + T.int64(n)] = total[0]
