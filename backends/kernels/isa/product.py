"""What products share: the arguments of the integer ones, how a tile takes its rows and blocks, and its epilogue.

TVMScript reads a function's parameters from its text, so a signature that several kernels have must stand in one
function: `integer_product` is that function, and the structures give it what they do with a tile. The pieces are
`T.inline` functions, which the parser puts where they are called; helpers in plain Python run as it meets the call.
Kernels of other C types, alike as their first lines look, keep their signatures, for the parser takes none from a list.
"""
# TVMScript's annotations are TIR types, which a Python type checker cannot know.
# mypy: disable-error-code="valid-type, no-untyped-def, no-untyped-call, no-any-return, untyped-decorator, misc"

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder

from hikui.backends.kernels.fields import LINES, QUADS, SEGMENTS, group_lines, turn_quads
from hikui.backends.kernels.isa.base import Buffer, Expression, prefetch, splat, to_float, unrolled, vector


class Outputs(NamedTuple):
    """Where the outputs of a tile go, and what is added to them.

    Attributes:
        y, bias, has_bias, m_size, n_size: as the kernel is given them.
        n_blocks: blocks of 16 output rows.
        streams: how many blocks apart those of a tile lie.
        position: the tile's first block.
        block: the tile's blocks; in place of one that is not there, the last.
        chunk: the tile's rows of activations are the chunk-th so many.
        row: the tile's rows; in place of one that is not there, the last.
    """

    y: Buffer
    bias: Buffer
    has_bias: Expression
    m_size: Expression
    n_size: Expression
    n_blocks: Expression
    streams: Expression
    position: Expression
    block: Buffer
    chunk: Expression
    row: Buffer


class Operands(NamedTuple):
    """What an integer product is given, but for what has to do with outputs alone; see `linear.integer`."""

    q: Buffer
    q_scale: Buffer
    q_sums: Buffer
    weight: Buffer
    scale: Buffer
    b: Buffer
    t: Buffer
    row_quads: Expression
    lines: Expression
    groups: Expression
    split: Expression
    group_steps: Expression
    rank: Expression


class Run(NamedTuple):
    """The groups of one segment: from which to which, and the first one's first line in a block."""

    segment: int
    first: Expression
    last: Expression
    line: Expression


def runs(kind: str, groups: Expression, split: Expression, group_steps: Expression) -> list[Run]:
    """The segments of a kind, a key of `fields.SEGMENTS`, the first of them with `split` groups."""
    zero = T.int64(0)
    if len(SEGMENTS[kind]) == 1:
        return [Run(0, zero, groups, zero)]
    behind = split * group_lines(SEGMENTS[kind][0], group_steps)
    return [Run(0, zero, split, zero), Run(1, split, groups, behind)]


def each_turn(kind: str, steps: Expression, add: Callable[[Expression, Expression], None]) -> None:
    """Goes through neighbouring steps of a group: `add(turn, left)` adds what one turn takes.

    Args:
        kind: of the weights.
        steps: how many; at least one.
        add: given the turn's number, and where only so many of its quads are there, how many; else None.
    """
    turns = steps if kind in LINES else steps * QUADS // turn_quads(kind)
    # There is at least one; said so, LLVM keeps the conversion to float out of the loop.
    with T.serial(T.int64(0), T.max(turns, 1)) as turn:
        add(turn, None)
    if kind not in LINES:
        left = steps * QUADS - turns * turn_quads(kind)
        with T.If(left > 0), T.Then():
            add(turns, left)


@dataclass(frozen=True)
class Grid:
    """The vectors of a tile, as they lie in a local buffer: rows of activations × blocks × parts of a block."""

    rows: int
    blocks: int
    parts: int
    lanes: int

    def number(self, row: Expression, block: Expression, part: Expression) -> Expression:
        """How many vectors lie before one; a part may lie beyond its block, in the next."""
        return (row * self.blocks + block) * self.parts + part

    def at(self, row: Expression, block: Expression, part: Expression) -> Expression:
        """Where a vector starts."""
        return self.number(row, block, part) * self.lanes

    @property
    def size(self) -> int:
        """Elements of all of them."""
        return self.rows * self.blocks * self.parts * self.lanes


@dataclass(frozen=True)
class Structure:
    """How an integer product is computed.

    Attributes:
        rows, blocks: of a tile.
        element, elements: what the weights are read as, and how many of that a line has.
        q_size: `q_size(m_size, row_quads)` is how many quads there are of the activations.
        allocate: allocates the local buffers and fills those that stay as they are.
        tile: `tile(operands, outputs, held)` computes and stores a tile; `held` is what `allocate` returned.
    """

    rows: int
    blocks: int
    element: str
    elements: int
    q_size: Callable[[Expression, Expression], Expression]
    allocate: Callable[[], Any]
    tile: Callable[[Operands, Outputs, Any], None]


def local(name: str, size: int, dtype: str) -> Buffer:
    """A local buffer, allocated here."""
    buffer = T.alloc_buffer((size,), dtype, scope="local")
    IRBuilder.name(name, buffer)
    return buffer


def store(buffer: Buffer, value: Expression, start: Expression, lanes: int) -> None:
    """Stores a vector into neighbouring elements of a buffer."""
    T.buffer_store(buffer, value, [T.ramp(start, 1, lanes)])


@T.inline
def take_blocks(block, blocks, position, streams, n_blocks):
    """The blocks of a position; one that is not there is replaced by the last."""
    for j in unrolled(blocks):
        block[j] = T.min(position + j * streams, n_blocks - 1)


@T.inline
def take_rows(row, rows, chunk, m_size):
    """The rows of a chunk; one that is not there is replaced by the last."""
    for i in unrolled(rows):
        row[i] = T.min(chunk * rows + i, m_size - 1)


@T.inline
def clear(buffer, vectors, lanes):
    """Zeros in the first vectors of a local buffer of float32."""
    for i in unrolled(vectors):
        buffer[T.ramp(i * lanes, 1, lanes)] = splat(T.float32(0), lanes)


@T.inline
def prefetch_branch(operands, block, blocks):
    """Asks for the branch: it is small and lies far from the streams, and nothing else would fetch it in time."""
    for r in range(operands.rank):
        for j in unrolled(blocks):
            prefetch(operands.b, (block[j] * operands.rank + r) * 16)


def kept(value: Expression, buffer: Buffer | None, lanes: int) -> Expression:
    """A vector that is used several times: as it is stored in a local buffer, if one is given, else computed anew."""
    if buffer is None:
        return value
    store(buffer, value, 0, lanes)
    return vector(buffer, 0, lanes)


@T.inline
def scale_and_branch(total, grid, first_part, factor, operands, outputs):
    """Brings the sums of a tile into the unit of its activations and adds the branch.

    `first_part` is which part of a block the first of the grid is; `factor` is as `kept` takes it.
    """
    for i in unrolled(grid.rows):
        for j in unrolled(grid.blocks * grid.parts):
            total[T.ramp(grid.at(i, 0, j), 1, grid.lanes)] = vector(total, grid.at(i, 0, j), grid.lanes) * splat(
                operands.q_scale[outputs.row[i]], grid.lanes
            )
    for r in range(operands.rank):
        for j in unrolled(grid.blocks):
            for part in unrolled(grid.parts):
                at_b = T.meta_var((outputs.block[j] * operands.rank + r) * 16 + (first_part + part) * grid.lanes)
                of_part = T.meta_var(
                    kept(to_float(vector(operands.b, at_b, grid.lanes), grid.lanes), factor, grid.lanes)
                )
                for i in unrolled(grid.rows):
                    total[T.ramp(grid.at(i, j, part), 1, grid.lanes)] = vector(
                        total, grid.at(i, j, part), grid.lanes
                    ) + of_part * splat(operands.t[outputs.row[i] * operands.rank + r], grid.lanes)


@T.inline
def store_elements(values, first, count, at_y, start, outputs):
    """Adds the bias to `count` neighbouring outputs, the first of them output row `start`, and stores them."""
    if outputs.has_bias != 0:
        for n in range(count):
            values[first + n] = values[first + n] + outputs.bias[start + n]
    for n in range(count):
        outputs.y[at_y + n] = values[first + n]


@T.inline
def store_tile(total, grid, parts, tail, outputs):
    """Stores the first `parts` vectors of each block of a tile, which are its 16 output rows.

    `tail` is a local buffer of 16 values, from which elements are picked one by one: picked from `total`, they would
    keep it out of registers.
    """
    for i in unrolled(grid.rows):
        for j in unrolled(grid.blocks):
            if (
                outputs.chunk * grid.rows + i < outputs.m_size
                and outputs.position + j * outputs.streams < outputs.n_blocks
            ):
                for part in unrolled(parts):
                    tail[T.ramp(part * grid.lanes, 1, grid.lanes)] = vector(total, grid.at(i, j, part), grid.lanes)
                start = outputs.block[j] * 16
                store_elements(
                    tail,
                    0,
                    T.min(outputs.n_size - start, 16),
                    outputs.row[i] * outputs.n_size + start,
                    start,
                    outputs,
                )


def integer_product(structure: Structure, name: str) -> Any:
    """The function of a product of integers, a C function `integer_kernel`; `linear.integer` says what it computes."""
    rows, blocks = structure.rows, structure.blocks

    @T.prim_func(s_tir=True)
    def kernel(
        q_data: T.handle("int32"),
        q_scale_data: T.handle("float32"),
        q_sums_data: T.handle("int32"),
        weight_data: T.handle(structure.element),
        scale_data: T.handle("float16"),
        bias_data: T.handle("float32"),
        b_data: T.handle("float16"),
        t_data: T.handle("float32"),
        y_data: T.handle("float32"),
        m_size: T.int64,
        n_size: T.int64,
        row_quads: T.int64,
        lines: T.int64,
        groups: T.int64,
        split: T.int64,
        group_steps: T.int64,
        rank: T.int64,
        has_bias: T.int64,
        first: T.int64,
        last: T.int64,
    ):
        T.func_attr({"global_symbol": name, "tirx.noalias": True})
        n_blocks = (n_size + 15) // 16
        q = T.decl_buffer((structure.q_size(m_size, row_quads),), "int32", data=q_data)
        q_scale = T.decl_buffer((m_size,), "float32", data=q_scale_data)
        q_sums = T.decl_buffer((m_size * (row_quads // QUADS),), "int32", data=q_sums_data)
        weight = T.decl_buffer((n_blocks * lines * structure.elements,), structure.element, data=weight_data)
        scale = T.decl_buffer((n_blocks * groups * 16,), "float16", data=scale_data)
        bias = T.decl_buffer((n_size,), "float32", data=bias_data)
        b = T.decl_buffer((n_blocks * rank * 16,), "float16", data=b_data)
        t = T.decl_buffer((m_size * rank,), "float32", data=t_data)
        y = T.decl_buffer((m_size * n_size,), "float32", data=y_data)
        row = T.alloc_buffer((rows,), "int64", scope="local")
        block = T.alloc_buffer((blocks,), "int64", scope="local")
        held = T.meta_var(structure.allocate())
        streams = (n_blocks + (blocks - 1)) // blocks
        operands = T.meta_var(
            Operands(q, q_scale, q_sums, weight, scale, b, t, row_quads, lines, groups, split, group_steps, rank)
        )
        for position in range(first, last):
            take_blocks(block, blocks, position, streams, n_blocks)
            for chunk in range((m_size + (rows - 1)) // rows):
                take_rows(row, rows, chunk, m_size)
                outputs = T.meta_var(
                    Outputs(y, bias, has_bias, m_size, n_size, n_blocks, streams, position, block, chunk, row)
                )
                structure.tile(operands, outputs, held)

    return kernel
