"""Integer products in tiles, for instruction sets with narrow registers.

As `linear.integer`, but a tile may take a part of the 16 output rows of a block, so that what is unpacked from the
weights serves more rows of activations before the registers are used up, and an instruction set may hold its
accumulators, and read its activations, in an order of its own.
"""
# TVMScript's annotations are TIR types, which a Python type checker cannot know.
# mypy: disable-error-code="valid-type, no-untyped-def, no-untyped-call, no-any-return, untyped-decorator, misc"

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from hikui.backends.kernels.fields import LINES, QUADS, SEGMENTS
from hikui.backends.kernels.isa.base import Expression, intrinsic, prefetch, splat, to_float, unrolled, vector

_LANES = 4
_PARTS = 4
"""Registers of int32 that 16 output rows take."""


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
        prepared: quads that a `prepare_kernel` made of a step of a row, `rows` rows at a time; 0: q itself is read.
        prefix: whether the last of them is the sum of the activations from the first column on.
        longest: the most steps that the accumulators hold the sum of; 0: any number.
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
    if len(shifts) == 1:
        return value if factor == 1 else value * splat(T.int32(factor), _LANES)
    for k in reversed(range(1, len(shifts) - 1)):
        value = (value >> splat(T.int32(shifts[k + 1] - shifts[k]), _LANES)) + held[k]
    # With the factor 2 the last shift is one less, so that half an offset may lie in the highest accumulator.
    down = shifts[1] - (factor == 2)
    return (value >> splat(T.int32(down), _LANES)) + (held[0] + held[0] if factor == 2 else held[0])


def starting_offset(shifts: Sequence[int], factor: int, offset: int) -> int | None:
    """What the highest accumulator starts at, times the sum of the activations, to take the offset off; if integer."""
    whole = offset << shifts[-1]
    return -(whole // factor) if whole % factor == 0 else None


def _sum_rows(q_sums, row, rows, row_steps, first_step, group_steps, sums):
    """Stores the sums of a group's activations: four lanes a row, which are still to be added up."""

    def here(i, step):
        return vector(q_sums, row[i] * row_steps + first_step + step, _LANES)

    with T.If(group_steps % 4 == 0), T.Then():
        with unrolled(rows) as i:
            T.buffer_store(sums, here(i, 0), [T.ramp(i * _LANES, 1, _LANES)])
        with T.serial(T.int64(1), group_steps // 4) as four, unrolled(rows) as i:
            after = vector(sums, i * _LANES, _LANES) + here(i, four * 4)
            T.buffer_store(sums, after, [T.ramp(i * _LANES, 1, _LANES)])
    with T.If(group_steps % 4 != 0), T.Then():
        with unrolled(rows) as i:
            only = tirx.Shuffle([q_sums[row[i] * row_steps + first_step], *[T.int32(0)] * 3], [0, 1, 2, 3])
            T.buffer_store(sums, only, [T.ramp(i * _LANES, 1, _LANES)])
        with T.serial(T.int64(1), group_steps) as step, unrolled(rows) as i:
            more = tirx.Shuffle([q_sums[row[i] * row_steps + first_step + step], *[T.int32(0)] * 3], [0, 1, 2, 3])
            T.buffer_store(sums, vector(sums, i * _LANES, _LANES) + more, [T.ramp(i * _LANES, 1, _LANES)])


def _added(left: Expression, right: Expression) -> Expression:
    return intrinsic("int32x4", "llvm.aarch64.neon.addp", left, right)


def _added_up(sums: Any, rows: int) -> list[Expression]:
    """The sums of the lanes, by row: each an int32x4 of one value, which instructions take by element."""
    lanes = [vector(sums, i * _LANES, _LANES) for i in range(rows)]
    if rows == 1:
        pairs = _added(lanes[0], lanes[0])
        return [_added(pairs, pairs)]
    out: list[Expression] = []
    for first in range(0, rows, 4):
        four = [lanes[min(first + i, rows - 1)] for i in range(4)]
        total = _added(_added(four[0], four[1]), _added(four[2], four[3]))
        out += [tirx.Shuffle([total], [lane] * _LANES) for lane in range(min(4, rows - first))]
    return out


def _prefix_differences(q, q_before, rows, last_step_at):
    """The same for prepared activations, which hold sums from the first column on; keeps those of the group's end."""
    out: list[Expression] = []
    for first in range(0, rows, _LANES):
        upto = vector(q, last_step_at + first, _LANES)
        total = T.bind(upto - vector(q_before, first, _LANES))
        T.buffer_store(q_before, upto, [T.ramp(first, 1, _LANES)])
        out += [tirx.Shuffle([total], [lane] * _LANES) for lane in range(_LANES)]
    return out


def integer(panels: Sequence[Panel], kind: str, blocks: int, name: str) -> Any:
    """The function of `linear.integer`, with its parameters, for panels of one shape: one a segment of the kind.

    Args:
        panels: how each segment is multiplied.
        kind: a key of `fields.SEGMENTS`.
        blocks: blocks of 16 output rows, ⌈N16 / blocks⌉ apart, that a tile takes.
        name: symbol of the C function.
    """
    rows, parts, prepared = panels[0].rows, panels[0].parts, panels[0].prepared
    prefix = any(panel.prefix for panel in panels)
    most = max(panel.accumulators for panel in panels)

    share, bands = rows * parts, _PARTS // parts

    def at(band, block, i):
        """Where a tile's totals are. Those of a band have an index of their own, so that LLVM leaves them in memory,

        where it reads two at once, rather than spilling one by one what does not fit the registers.
        """
        return ((band * blocks + block) * share + i) * _LANES

    def step_of(panel, buffers, line, band, quad, chunk, row_quads):
        q, weight, row, products = buffers[0], buffers[2], buffers[4], buffers[6]

        def line_of(j, part, i):
            start = (line[j] + i) * 64
            if part is None:
                return vector(weight, start, 64)
            return vector(weight, start + (band * parts + part) * 16, 16)

        def quads_of(i, first):
            if prepared:
                return vector(q, (chunk * row_quads + quad) // QUADS * (rows * prepared) + first * _LANES, _LANES)
            return vector(q, row[i] * row_quads + quad + first, _LANES)

        before = [[vector(products, held_at(j, k), _LANES) for k in range(panel.accumulators)] for j in range(blocks)]
        for j, totals in enumerate(panel.step(before, line_of, quads_of)):
            for k, after in enumerate(totals):
                T.buffer_store(products, after, [T.ramp(held_at(j, k), 1, _LANES)])

    def held_at(j, k):
        return (j * most + k) * _LANES

    def first_values(panel, of_rows, steps):
        if panel.first:
            return panel.first(steps)
        values = [splat(T.int32(0), _LANES)] * panel.accumulators
        if panel.start:
            starts = panel.by_row([each * splat(T.int32(panel.start), _LANES) for each in of_rows])
            values[-len(starts) :] = starts
        return values

    def steps_of(
        panel, buffers, of_rows, group, first_step, steps, first_line, lines, group_steps, row_quads, chunk, band
    ):
        scale, block, products, total, groups = buffers[3], buffers[5], buffers[6], buffers[7], buffers[9]
        for k, value in enumerate(first_values(panel, of_rows, steps)):
            for j in range(blocks):
                T.buffer_store(products, value, [T.ramp(held_at(j, k), 1, _LANES)])
        # There is at least one step; said so, LLVM keeps the conversion to float out of the loop.
        with T.serial(T.int64(0), T.max(steps, 1)) as step:
            line = first_line + (first_step + step) * LINES[panel.kind]
            quad = (group * group_steps + first_step + step) * QUADS
            step_of(panel, buffers, [block[j] * lines + line for j in range(blocks)], band, quad, chunk, row_quads)
        behind = []
        if panel.behind:
            behind = panel.by_row([each * splat(T.int32(panel.behind), _LANES) for each in of_rows])
        for j in range(blocks):
            start = (block[j] * groups + group) * 16 + band * (parts * _LANES)
            factors = [to_float(vector(scale, start + part * _LANES, _LANES), _LANES) for part in range(parts)]
            spread = panel.by_part(factors)
            held = [vector(products, held_at(j, k), _LANES) for k in range(panel.accumulators)]
            for i, value in enumerate(panel.sums(held)):
                whole = value + behind[i] if behind else value
                after = vector(total, at(band, j, i), _LANES) + spread[i] * to_float(whole, _LANES)
                T.buffer_store(total, after, [T.ramp(at(band, j, i), 1, _LANES)])

    def groups_of(panel, buffers, first_group, last_group, segment_line, lines, group_steps, row_quads, chunk, band):
        q, q_sums, row, sums = buffers[0], buffers[1], buffers[4], buffers[8]
        with T.serial(first_group, last_group) as group:
            of_rows = None
            if panel.prefix:
                last_step = (chunk * row_quads // QUADS) + (group + 1) * group_steps - 1
                of_rows = _prefix_differences(q, sums, rows, last_step * (rows * prepared) + rows * QUADS)
            elif panel.start or panel.behind:
                _sum_rows(q_sums, row, rows, row_quads // QUADS, group * group_steps, group_steps, sums)
                of_rows = _added_up(sums, rows)
            line = segment_line + (group - first_group) * group_steps * LINES[panel.kind]
            rest = (line, lines, group_steps, row_quads, chunk, band)
            # One run is the common case; a loop of runs would keep more in registers than there are.
            if not panel.longest:
                steps_of(panel, buffers, of_rows, group, T.int64(0), group_steps, *rest)
            else:
                with T.If(group_steps <= panel.longest), T.Then():
                    steps_of(panel, buffers, of_rows, group, T.int64(0), group_steps, *rest)
                runs = (group_steps + (panel.longest - 1)) // panel.longest
                with T.If(group_steps > panel.longest), T.Then(), T.serial(T.int64(0), runs) as run:
                    first_step = run * panel.longest
                    steps = T.min(group_steps - first_step, panel.longest)
                    steps_of(panel, buffers, of_rows, group, first_step, steps, *rest)

    def all_groups(buffers, groups, split, lines, group_steps, row_quads, chunk, band):
        rest = (lines, group_steps, row_quads, chunk, band)
        if len(panels) == 1:
            groups_of(panels[0], buffers, T.int64(0), groups, T.int64(0), *rest)
            return
        groups_of(panels[0], buffers, T.int64(0), split, T.int64(0), *rest)
        groups_of(panels[1], buffers, split, groups, split * group_steps * LINES[SEGMENTS[kind][0]], *rest)

    def to_rows(total, result, band):
        for j in range(blocks):
            values = panels[0].in_rows([vector(total, at(band, j, i), _LANES) for i in range(share)])
            for i, value in enumerate(values):
                start = ((i // parts * blocks + j) * parts + i % parts) * _LANES
                T.buffer_store(result, value, [T.ramp(start, 1, _LANES)])

    @T.prim_func(s_tir=True)
    def kernel(
        q_data: T.handle("int32"),
        q_scale_data: T.handle("float32"),
        q_sums_data: T.handle("int32"),
        weight_data: T.handle("uint8"),
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
        q = T.decl_buffer(((m_size + (rows - 1)) * row_quads * max(1, prepared),), "int32", data=q_data)
        q_scale = T.decl_buffer((m_size,), "float32", data=q_scale_data)
        q_sums = T.decl_buffer((m_size * (row_quads // QUADS),), "int32", data=q_sums_data)
        weight = T.decl_buffer((n_blocks * lines * 64,), "uint8", data=weight_data)
        scale = T.decl_buffer((n_blocks * groups * 16,), "float16", data=scale_data)
        bias = T.decl_buffer((n_size,), "float32", data=bias_data)
        b = T.decl_buffer((n_blocks * rank * 16,), "float16", data=b_data)
        t = T.decl_buffer((m_size * rank,), "float32", data=t_data)
        y = T.decl_buffer((m_size * n_size,), "float32", data=y_data)
        row = T.alloc_buffer((rows,), "int64", scope="local")
        block = T.alloc_buffer((blocks,), "int64", scope="local")
        sums = T.alloc_buffer((rows * _LANES,), "int32", scope="local")
        products = T.alloc_buffer((blocks * most * _LANES,), "int32", scope="local")
        total = T.alloc_buffer((bands * blocks * share * _LANES,), "float32", scope="local")
        result = T.alloc_buffer((blocks * share * _LANES,), "float32", scope="local")
        factor = T.alloc_buffer((_LANES,), "float32", scope="local")
        streams = (n_blocks + (blocks - 1)) // blocks
        for position in range(first, last):
            for j in unrolled(blocks):
                block[j] = T.min(position + j * streams, n_blocks - 1)
            for chunk in range((m_size + (rows - 1)) // rows):
                for i in unrolled(rows):
                    row[i] = T.min(chunk * rows + i, m_size - 1)
                # The branch is small and lies far from the streams: nothing else would fetch it in time.
                for r in range(rank):
                    for j in unrolled(blocks):
                        prefetch(b, (block[j] * rank + r) * 16)
                for band in range(bands):
                    for i in unrolled(blocks * share):
                        total[T.ramp(at(band, 0, i), 1, _LANES)] = splat(T.float32(0), _LANES)
                    if prefix:
                        for i in unrolled(rows):
                            sums[i] = 0
                    all_groups(
                        (q, q_sums, weight, scale, row, block, products, total, sums, groups),
                        groups,
                        split,
                        lines,
                        group_steps,
                        row_quads,
                        chunk,
                        band,
                    )
                    to_rows(total, result, band)
                    for i in unrolled(rows):
                        for j in unrolled(blocks * parts):
                            result[T.ramp((i * blocks * parts + j) * _LANES, 1, _LANES)] = vector(
                                result, (i * blocks * parts + j) * _LANES, _LANES
                            ) * splat(q_scale[row[i]], _LANES)
                    for r in range(rank):
                        for j in unrolled(blocks):
                            for part in unrolled(parts):
                                factor[T.ramp(0, 1, _LANES)] = to_float(
                                    vector(b, (block[j] * rank + r) * 16 + (band * parts + part) * _LANES, _LANES),
                                    _LANES,
                                )
                                for i in unrolled(rows):
                                    result[T.ramp(((i * blocks + j) * parts + part) * _LANES, 1, _LANES)] = vector(
                                        result, ((i * blocks + j) * parts + part) * _LANES, _LANES
                                    ) + vector(factor, 0, _LANES) * splat(t[row[i] * rank + r], _LANES)
                    for i in range(T.min(m_size - chunk * rows, rows)):
                        for j in unrolled(blocks):
                            if position + j * streams < n_blocks:
                                start = block[j] * 16 + band * (parts * _LANES)
                                if n_size - start >= parts * _LANES:
                                    for part in unrolled(parts):
                                        at_y = (chunk * rows + i) * n_size + start + part * _LANES
                                        value = vector(result, ((i * blocks + j) * parts + part) * _LANES, _LANES)
                                        if has_bias != 0:
                                            y[T.ramp(at_y, 1, _LANES)] = value + vector(
                                                bias, start + part * _LANES, _LANES
                                            )
                                        else:
                                            y[T.ramp(at_y, 1, _LANES)] = value
                                else:
                                    for n in range(n_size - start):
                                        element = result[(i * blocks + j) * (parts * _LANES) + n]
                                        if has_bias != 0:
                                            y[(chunk * rows + i) * n_size + start + n] = element + bias[start + n]
                                        else:
                                            y[(chunk * rows + i) * n_size + start + n] = element

    return kernel
