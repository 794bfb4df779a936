"""Integer products in tiles, for instruction sets with narrow registers.

As `linear.integer`, but a tile may take a part of the 16 output rows of a block, so that what is unpacked from the
weights serves more rows of activations before the registers are used up, and an instruction set may hold its
accumulators, and read its activations, in an order of its own.
"""
# TVMScript's annotations are TIR types, which a Python type checker cannot know.
# mypy: disable-error-code="valid-type, no-untyped-def, no-untyped-call, no-any-return, untyped-decorator, misc"

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from tvm import tirx
from tvm.script import tirx as T

from hikui.backends.kernels.fields import QUADS, group_lines, turn_lines, turn_quads
from hikui.backends.kernels.isa.base import Buffer, Expression, intrinsic, splat, to_float, unrolled, vector
from hikui.backends.kernels.isa.product import (
    Grid,
    Operands,
    Outputs,
    Run,
    Structure,
    each_turn,
    integer_product,
    local,
    prefetch_branch,
    runs,
    scale_and_branch,
    store,
)
from hikui.backends.kernels.isa.tiled_panel import LANES, Panel

_PARTS = 4
"""Registers of int32 that 16 output rows take."""


def _sum_rows(q_sums, row, rows, row_steps, first_step, group_steps, sums):
    """Stores the sums of a group's activations: four lanes a row, which are still to be added up."""

    def here(i, step):
        return vector(q_sums, row[i] * row_steps + first_step + step, LANES)

    with T.If(group_steps % 4 == 0), T.Then():
        with unrolled(rows) as i:
            T.buffer_store(sums, here(i, 0), [T.ramp(i * LANES, 1, LANES)])
        with T.serial(T.int64(1), group_steps // 4) as four, unrolled(rows) as i:
            after = vector(sums, i * LANES, LANES) + here(i, four * 4)
            T.buffer_store(sums, after, [T.ramp(i * LANES, 1, LANES)])
    with T.If(group_steps % 4 != 0), T.Then():
        with unrolled(rows) as i:
            only = tirx.Shuffle([q_sums[row[i] * row_steps + first_step], *[T.int32(0)] * 3], [0, 1, 2, 3])
            T.buffer_store(sums, only, [T.ramp(i * LANES, 1, LANES)])
        with T.serial(T.int64(1), group_steps) as step, unrolled(rows) as i:
            more = tirx.Shuffle([q_sums[row[i] * row_steps + first_step + step], *[T.int32(0)] * 3], [0, 1, 2, 3])
            T.buffer_store(sums, vector(sums, i * LANES, LANES) + more, [T.ramp(i * LANES, 1, LANES)])


def _added(left: Expression, right: Expression) -> Expression:
    return intrinsic("int32x4", "llvm.aarch64.neon.addp", left, right)


def _added_up(sums: Any, rows: int) -> list[Expression]:
    """The sums of the lanes, by row: each an int32x4 of one value, which instructions take by element."""
    lanes = [vector(sums, i * LANES, LANES) for i in range(rows)]
    if rows == 1:
        pairs = _added(lanes[0], lanes[0])
        return [_added(pairs, pairs)]
    out: list[Expression] = []
    for first in range(0, rows, 4):
        four = [lanes[min(first + i, rows - 1)] for i in range(4)]
        total = _added(_added(four[0], four[1]), _added(four[2], four[3]))
        out += [tirx.Shuffle([total], [lane] * LANES) for lane in range(min(4, rows - first))]
    return out


def _prefix_differences(q, q_before, rows, last_step_at):
    """The same for prepared activations, which hold sums from the first column on; keeps those of the group's end."""
    out: list[Expression] = []
    for first in range(0, rows, LANES):
        upto = vector(q, last_step_at + first, LANES)
        total = T.bind(upto - vector(q_before, first, LANES))
        T.buffer_store(q_before, upto, [T.ramp(first, 1, LANES)])
        out += [tirx.Shuffle([total], [lane] * LANES) for lane in range(LANES)]
    return out


class _Held(NamedTuple):
    """The local buffers of a tile.

    Attributes:
        sums: of the activations: of a group's by row, four lanes each, or with `Panel.prefix` those up to the group.
        products: the accumulators.
        total: the sums of the groups, times their scales, in the panel's own order.
        result: those of a band by row.
        factor: a vector of the branch.
    """

    sums: Buffer
    products: Buffer
    total: Buffer
    result: Buffer
    factor: Buffer


class _Band(NamedTuple):
    """A band of a tile: as many parts of its blocks as are computed at once."""

    operands: Operands
    outputs: Outputs
    held: _Held
    index: Expression


class _Steps(NamedTuple):
    """Neighbouring steps of a group.

    Attributes:
        group: which.
        first: the first of them, counted in the group.
        count: how many.
        line: the group's first line in a block.
        of_rows: the sums of the group's activations by row, if the panel needs them.
    """

    group: Expression
    first: Expression
    count: Expression
    line: Expression
    of_rows: list[Expression]


def integer(panels: Sequence[Panel], kind: str, blocks: int, name: str) -> Any:
    """The function of `linear.integer`, with its parameters, for panels of one shape: one a segment of the kind.

    Args:
        panels: how each segment is multiplied.
        kind: a key of `fields.SEGMENTS`.
        blocks: blocks of 16 output rows, ⌈N16 / blocks⌉ apart, that a tile takes.
        name: symbol of the C function.
    """
    tiles = _Tiles(panels, kind, Grid(panels[0].rows, blocks, panels[0].parts, LANES))
    return integer_product(
        Structure(
            panels[0].rows,
            blocks,
            element="uint8",
            elements=64,
            q_size=tiles.q_size,
            allocate=tiles.allocate,
            tile=partial(_compute, tiles),
        ),
        name,
    )


@dataclass(frozen=True)
class _Tiles:
    """An integer product in tiles; `grid` is what a band of a tile gives."""

    panels: Sequence[Panel]
    kind: str
    grid: Grid

    @property
    def share(self) -> int:
        """Vectors of a block that a band gives."""
        return self.grid.rows * self.grid.parts

    @property
    def prepared(self) -> int:
        return self.panels[0].prepared

    def at(self, band, block, i):
        """Where a tile's totals are. Those of a band have an index of their own, so that LLVM leaves them in memory,

        where it reads two at once, rather than spilling one by one what does not fit the registers.
        """
        return ((band * self.grid.blocks + block) * self.share + i) * LANES

    def held_at(self, block, k):
        return (block * max(panel.accumulators for panel in self.panels) + k) * LANES

    @property
    def bands(self) -> int:
        return _PARTS // self.grid.parts

    def q_size(self, m_size, row_quads):
        return (m_size + (self.grid.rows - 1)) * row_quads * max(1, self.prepared)

    def allocate(self) -> _Held:
        return _Held(
            sums=local("sums", self.grid.rows * LANES, "int32"),
            products=local("products", self.held_at(self.grid.blocks, 0), "int32"),
            total=local("total", self.bands * self.grid.size, "float32"),
            result=local("result", self.grid.size, "float32"),
            factor=local("factor", LANES, "float32"),
        )

    @property
    def prefix(self) -> bool:
        return any(panel.prefix for panel in self.panels)

    def add_up(self, band: _Band) -> None:
        """The sums of a band, brought to rows."""
        for run in runs(self.kind, band.operands.groups, band.operands.split, band.operands.group_steps):
            self.add_groups(run, band)
        held, parts = band.held, self.grid.parts
        for j in range(self.grid.blocks):
            totals = [vector(held.total, self.at(band.index, j, i), LANES) for i in range(self.share)]
            for i, value in enumerate(self.panels[0].in_rows(totals)):
                store(held.result, value, self.grid.at(i // parts, j, i % parts), LANES)

    def add_groups(self, run: Run, band: _Band) -> None:
        panel, group_steps = self.panels[run.segment], band.operands.group_steps
        with T.serial(run.first, run.last) as group:
            of_rows = self.sums_of_rows(panel, group, band)
            line = run.line + (group - run.first) * group_lines(panel.kind, group_steps)
            # One run is the common case; a loop of runs would keep more in registers than there are.
            if not panel.longest:
                self.add_steps(panel, _Steps(group, T.int64(0), group_steps, line, of_rows), band)
                return
            with T.If(group_steps <= panel.longest), T.Then():
                self.add_steps(panel, _Steps(group, T.int64(0), group_steps, line, of_rows), band)
            times = (group_steps + (panel.longest - 1)) // panel.longest
            with T.If(group_steps > panel.longest), T.Then(), T.serial(T.int64(0), times) as time:
                first = time * panel.longest
                count = T.min(group_steps - first, panel.longest)
                self.add_steps(panel, _Steps(group, first, count, line, of_rows), band)

    def sums_of_rows(self, panel: Panel, group: Expression, band: _Band) -> list[Expression]:
        """The sums of a group's activations by row, where the panel asks for them."""
        rows, operands, outputs = self.grid.rows, band.operands, band.outputs
        if panel.prefix:
            last_step = (outputs.chunk * operands.row_quads // QUADS) + (group + 1) * operands.group_steps - 1
            at = last_step * (rows * self.prepared) + rows * QUADS
            return _prefix_differences(operands.q, band.held.sums, rows, at)
        if panel.start or panel.behind:
            row_steps, first_step = operands.row_quads // QUADS, group * operands.group_steps
            _sum_rows(operands.q_sums, outputs.row, rows, row_steps, first_step, operands.group_steps, band.held.sums)
            return _added_up(band.held.sums, rows)
        return []

    def add_steps(self, panel: Panel, steps: _Steps, band: _Band) -> None:
        """Adds the products of steps, times the scales of their group, to the totals."""
        operands, block, held = band.operands, band.outputs.block, band.held
        blocks, parts = self.grid.blocks, self.grid.parts
        for k, value in enumerate(_first_values(panel, steps)):
            for j in range(blocks):
                store(held.products, value, self.held_at(j, k), LANES)

        def add(turn: Expression, left: Expression) -> None:
            line = steps.line + (steps.first + turn) * turn_lines(panel.kind)
            quad = (steps.group * operands.group_steps + steps.first) * QUADS + turn * turn_quads(panel.kind)
            self.add_step(panel, [block[j] * operands.lines + line for j in range(blocks)], quad, left, band)

        each_turn(panel.kind, steps.count, add)
        behind = _behind(panel, steps)
        for j in range(blocks):
            start = (block[j] * operands.groups + steps.group) * 16 + band.index * (parts * LANES)
            factors = [to_float(vector(operands.scale, start + part * LANES, LANES), LANES) for part in range(parts)]
            spread = panel.by_part(factors)
            of_block = [vector(held.products, self.held_at(j, k), LANES) for k in range(panel.accumulators)]
            for i, value in enumerate(panel.sums(of_block)):
                whole = value + behind[i] if behind else value
                at = self.at(band.index, j, i)
                store(held.total, vector(held.total, at, LANES) + spread[i] * to_float(whole, LANES), at, LANES)

    def add_step(self, panel: Panel, lines: list[Expression], quad: Expression, left: Expression, band: _Band) -> None:
        """Adds the products of a step, whose first line in each block is given, to the accumulators.

        Of quads beyond `left`, if it is given, the products are zero.
        """
        operands, products = band.operands, band.held.products

        def line_of(j, part, i):
            start = (lines[j] + i) * 64
            if part is None:
                return vector(operands.weight, start, 64)
            return vector(operands.weight, start + (band.index * self.grid.parts + part) * 16, 16)

        def quads_of(i, first):
            if left is not None:
                return self.quads_left(i, first, quad, left, band)
            if self.prepared == QUADS:
                return vector(
                    operands.q, (band.outputs.chunk * operands.row_quads + quad) * self.grid.rows + first * 4, 4
                )
            if self.prepared:
                step = (band.outputs.chunk * operands.row_quads + quad) // QUADS
                return vector(operands.q, step * (self.grid.rows * self.prepared) + first * LANES, LANES)
            return vector(operands.q, band.outputs.row[i] * operands.row_quads + quad + first, LANES)

        before = [
            [vector(products, self.held_at(j, k), LANES) for k in range(panel.accumulators)]
            for j in range(self.grid.blocks)
        ]
        for j, totals in enumerate(panel.step(before, line_of, quads_of)):
            for k, after in enumerate(totals):
                store(products, after, self.held_at(j, k), LANES)

    def quads_left(self, i: int, first: int, quad: Expression, left: Expression, band: _Band) -> Expression:
        """As `quads` of `Panel.step`, zeros in place of quads that are not there."""
        operands, rows = band.operands, self.grid.rows
        if self.prepared:
            start = (band.outputs.chunk * operands.row_quads + quad) * rows
            index = first * LANES // rows
            there = vector(operands.q, start + T.min(T.int64(index), left - 1) * rows + first * LANES % rows, LANES)
            return tirx.Select(splat(T.int64(index) < left, LANES), there, splat(T.int32(0), LANES))
        start = band.outputs.row[i] * operands.row_quads + quad
        four = [
            tirx.Select(
                T.int64(first + lane) < left,
                operands.q[start + T.min(T.int64(first + lane), left - 1)],
                T.int32(0),
            )
            for lane in range(LANES)
        ]
        return tirx.Shuffle(four, list(range(LANES)))


def _first_values(panel: Panel, steps: _Steps) -> Sequence[Expression]:
    if panel.first:
        return panel.first(steps.count)
    values = [splat(T.int32(0), LANES)] * panel.accumulators
    if panel.start:
        starts = panel.by_row([each * splat(T.int32(panel.start), LANES) for each in steps.of_rows])
        values[-len(starts) :] = starts
    return values


def _behind(panel: Panel, steps: _Steps) -> Sequence[Expression]:
    if not panel.behind:
        return []
    return panel.by_row([each * splat(T.int32(panel.behind), LANES) for each in steps.of_rows])


@T.inline
def _store_elements(result, at, at_y, start, count, outputs):
    for n in range(count):
        element = result[at + n]
        if outputs.has_bias != 0:
            outputs.y[at_y + n] = element + outputs.bias[start + n]
        else:
            outputs.y[at_y + n] = element


@T.inline
def _store_parts(result, grid, band, outputs):
    """Stores what a band gives, in vectors but for the last output rows of a matrix that ends within it.

    `product.store_tile` would not do: it picks elements of a copy that a band need not fill, and adds the bias in
    place. Here rows are looped over, and a store into `result` makes LLVM unroll that otherwise: a third more
    instructions for tiles of many rows. Vectors of the bias need not be aligned on these machines.
    """
    for i in range(T.min(outputs.m_size - outputs.chunk * grid.rows, grid.rows)):
        for j in unrolled(grid.blocks):
            if outputs.position + j * outputs.streams < outputs.n_blocks:
                start = outputs.block[j] * 16 + band * (grid.parts * LANES)
                row_of_y = T.meta_var((outputs.chunk * grid.rows + i) * outputs.n_size + start)
                if outputs.n_size - start >= grid.parts * LANES:
                    for part in unrolled(grid.parts):
                        at_y = row_of_y + part * LANES
                        value = vector(result, grid.at(i, j, part), LANES)
                        if outputs.has_bias != 0:
                            outputs.y[T.ramp(at_y, 1, LANES)] = value + vector(
                                outputs.bias, start + part * LANES, LANES
                            )
                        else:
                            outputs.y[T.ramp(at_y, 1, LANES)] = value
                else:
                    first = T.meta_var((i * grid.blocks + j) * (grid.parts * LANES))
                    _store_elements(result, first, row_of_y, start, outputs.n_size - start, outputs)


@T.inline
def _compute(tiles, operands, outputs, held):
    """Computes and stores a tile."""
    prefetch_branch(operands, outputs.block, tiles.grid.blocks)
    for band in range(tiles.bands):
        for i in unrolled(tiles.grid.blocks * tiles.share):
            held.total[T.ramp(tiles.at(band, 0, i), 1, LANES)] = splat(T.float32(0), LANES)
        if tiles.prefix:
            for i in unrolled(tiles.grid.rows):
                held.sums[i] = 0
        tiles.add_up(_Band(operands, outputs, held, band))
        scale_and_branch(held.result, tiles.grid, band * tiles.grid.parts, held.factor, operands, outputs)
        _store_parts(held.result, tiles.grid, band, outputs)
