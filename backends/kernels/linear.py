"""Products with low-bit weights and int8 activations, and with float weights.

All kernels are serial over a range of positions [first, last): the dispatcher cuts the range into tasks. A position
stands for `blocks` blocks of 16 output rows that lie ⌈N16 / blocks⌉ blocks apart, so that one task reads as many
separate streams of memory at once; one sequential stream reaches about 60 % of what a core can read.
"""
# TVMScript's annotations are TIR types, which a Python type checker cannot know.
# mypy: disable-error-code="valid-type, no-untyped-def, no-untyped-call, no-any-return, untyped-decorator, misc"

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tvm.script import tirx as T

from hikui.backends.kernels.fields import QUADS, SEGMENTS, group_lines, turn_lines, turn_quads
from hikui.backends.kernels.isa.base import (
    Buffer,
    Expression,
    Isa,
    Place,
    Scheme,
    Tile,
    splat,
    to_float,
    unrolled,
    vector,
)
from hikui.backends.kernels.isa.product import (
    Grid,
    Operands,
    Outputs,
    Run,
    Structure,
    clear,
    each_turn,
    integer_product,
    local,
    prefetch_branch,
    runs,
    scale_and_branch,
    store,
    store_tile,
    take_blocks,
    take_rows,
)


class _Held(NamedTuple):
    """The local buffers of an integer product.

    Attributes:
        correction: by row, what a group's sums are off by.
        products: the accumulators of a group.
        total: the sums of the groups, times their scales.
        tail: a block's outputs.
        codebook: the scheme's table.
    """

    correction: Buffer
    products: Buffer
    total: Buffer
    tail: Buffer
    codebook: Buffer


def integer(isa: Isa, kind: str, size: str, name: str, panel: bool = False) -> Any:
    """y[m, n] = q_scale[m] · Σ_g scale[n, g] · Σ_k q[m, k]·w[n, k] + bias[n] + Σ_r b[n, r]·t[m, r].

    Args:
        isa: the building blocks.
        kind: a key of `fields.SEGMENTS`.
        size: one of `isa.base.SIZES`.
        name: symbol of the C function.
        panel: q is as `isa.panel` prepares it for the rows of the tile, not as it came.

    The function's parameters after the pointers: M, N, quads a row of q, weight lines a block, groups, those of them
    in the first segment (all but for `mixed`), steps of 32 columns a group, rank of the branch (0: none; then b and t
    are not read), whether there is a bias, first and last position.
    """
    rows, blocks = isa.tile(kind, size)
    grid = Grid(rows, blocks, isa.parts, isa.lanes)
    schemes = tuple(isa.scheme(segment, size) for segment in SEGMENTS[kind])
    product = _Integer(grid, kind, schemes, panel)
    return integer_product(
        Structure(
            rows,
            blocks,
            element="int32",
            elements=16,
            q_size=lambda m_size, row_quads: m_size * row_quads,
            allocate=product.allocate,
            tile=product.tile,
        ),
        name,
    )


@dataclass(frozen=True)
class _Integer:
    """An integer product whose accumulators are vectors of whole output rows.

    Attributes:
        grid: the sums of a tile.
        kind: of the weights.
        schemes: one a segment of the kind.
        panel: as of `integer`.
    """

    grid: Grid
    kind: str
    schemes: Sequence[Scheme]
    panel: bool

    @property
    def sums(self) -> int:
        """Accumulators of a vector."""
        return max(len(scheme.shifts) for scheme in self.schemes)

    def held_at(self, i, j, part, k):
        return (self.grid.number(i, j, part) * self.sums + k) * self.grid.lanes

    def allocate(self) -> _Held:
        held = _Held(
            correction=local("correction", self.grid.rows, "int32"),
            products=local("products", self.grid.size * self.sums, "int32"),
            total=local("total", self.grid.size, "float32"),
            tail=local("tail", 16, "float32"),
            codebook=local("codebook", 16, "int32"),
        )
        for index, code in enumerate(self.schemes[0].codebook or ()):
            T.buffer_store(held.codebook, T.int32(code), [index])
        return held

    def tile(self, operands: Operands, outputs: Outputs, held: _Held) -> None:
        grid = self.grid
        clear(held.total, grid.rows * grid.blocks * grid.parts, grid.lanes)
        prefetch_branch(operands, outputs.block, grid.blocks)
        for run in runs(self.kind, operands.groups, operands.split, operands.group_steps):
            self.add_groups(run, operands, outputs, held)
        scale_and_branch(held.total, grid, 0, None, operands, outputs)
        store_tile(held.total, grid, grid.parts, held.tail, outputs)

    def add_groups(self, run: Run, operands: Operands, outputs: Outputs, held: _Held) -> None:
        rows, blocks, parts, lanes = self.grid.rows, self.grid.blocks, self.grid.parts, self.grid.lanes
        scheme = self.schemes[run.segment]
        with T.serial(run.first, run.last) as group:
            with unrolled(rows * blocks * parts * self.sums) as i:
                store(held.products, splat(T.int32(0), lanes), i * lanes, lanes)
            self.add_steps(run, group, operands, outputs, held)
            self.correct(scheme, group, operands, outputs, held)
            with unrolled(blocks) as j, unrolled(parts) as part, unrolled(rows) as i:
                of_part = [vector(held.products, self.held_at(i, j, part, k), lanes) for k in range(self.sums)]
                value = summed(scheme, of_part, lanes) + splat(held.correction[i], lanes)
                at_scale = (outputs.block[j] * operands.groups + group) * 16 + part * lanes
                at = self.grid.at(i, j, part)
                factors = to_float(vector(operands.scale, at_scale, lanes), lanes)
                store(held.total, vector(held.total, at, lanes) + factors * to_float(value, lanes), at, lanes)

    def add_steps(self, run: Run, group: Expression, operands: Operands, outputs: Outputs, held: _Held) -> None:
        """Adds the products of a group's steps to the accumulators."""
        kind = SEGMENTS[self.kind][run.segment]
        line = run.line + (group - run.first) * group_lines(kind, operands.group_steps)
        quad = group * operands.group_steps * QUADS

        def add(turn: Expression, left: Expression) -> None:
            here = line + turn * turn_lines(kind), quad + turn * turn_quads(kind)
            self.add_turn(self.schemes[run.segment], *here, left, operands, outputs, held)

        each_turn(kind, operands.group_steps, add)

    def add_turn(
        self,
        scheme: Scheme,
        line: Expression,
        quad: Expression,
        left: Expression,
        operands: Operands,
        outputs: Outputs,
        held: _Held,
    ) -> None:
        """Adds the products of a step or line of each block; `left` is as `Place` has it."""
        rows, lanes = self.grid.rows, self.grid.lanes
        with unrolled(self.grid.blocks) as j, unrolled(self.grid.parts) as part, unrolled(rows) as i:
            if self.panel:
                first, stride = (outputs.chunk * operands.row_quads + quad) * rows + i, rows
            else:
                first, stride = outputs.row[i] * operands.row_quads + quad, 1
            at_line = outputs.block[j] * operands.lines + line
            place = Place(operands.weight, at_line, part, operands.q, first, stride, held.codebook, left)
            starts = [self.held_at(i, j, part, k) for k in range(len(scheme.shifts))]
            before = [vector(held.products, start, lanes) for start in starts]
            for start, after in zip(starts, scheme.dot(before, place), strict=True):
                store(held.products, after, start, lanes)

    def correct(self, scheme: Scheme, group: Expression, operands: Operands, outputs: Outputs, held: _Held) -> None:
        """The sum of a group's activations, times the offset of the codes."""
        with unrolled(self.grid.rows) as i:
            T.buffer_store(held.correction, T.int32(0), [i])
            if scheme.offset:
                with T.serial(T.int64(0), operands.group_steps) as step:
                    at_step = outputs.row[i] * (operands.row_quads // QUADS) + group * operands.group_steps + step
                    after = held.correction[i] - operands.q_sums[at_step] * scheme.offset
                    T.buffer_store(held.correction, after, [i])


def summed(scheme: Scheme, held: list[Any], lanes: int) -> Any:
    """Factor · Σ of the accumulators of a scheme, each brought down by its shift, or what it makes of them; exact."""
    if scheme.sum:
        return scheme.sum(held, lanes)
    value = None
    for k in sorted(range(len(scheme.shifts)), key=lambda k: -scheme.shifts[k]):
        if value is None:
            value, above = held[k], scheme.shifts[k]
        else:
            value = (value >> splat(T.int32(above - scheme.shifts[k]), lanes)) + held[k]
            above = scheme.shifts[k]
    if above:
        value = value >> splat(T.int32(above), lanes)
    return value if scheme.factor == 1 else value * splat(T.int32(scheme.factor), lanes)


@T.inline
def _add_column(total, grid, first, chain, x, weight, k_size, outputs):
    """Adds the products of the column of a chain, of the columns from `first` on, to its sums."""
    for j in unrolled(grid.blocks):
        for i in unrolled(grid.rows):
            total[T.ramp(grid.at(i, j, chain), 1, 16)] = vector(total, grid.at(i, j, chain), 16) + (
                to_float(vector(weight, (outputs.block[j] * k_size + first + chain) * 16, 16), 16)
                * splat(x[outputs.row[i] * k_size + first + chain], 16)
            )


def floating(kind: str, tile: Tile, chains: int, name: str) -> Any:
    """y[m, n] = Σ_k x[m, k]·w[n, k] + bias[n] with float weights of the layout [N16, K, 16].

    The vectors are 16 lanes wide on every instruction set; LLVM splits them into registers.

    Args:
        kind: `float16` or `float32`.
        tile: rows of activations and blocks of output rows computed at once.
        chains: sums that each output is computed in, over every chains-th k; more than one keeps the multipliers busy
            where a tile alone has too few independent sums.
        name: symbol of the C function.

    The function's parameters after the pointers: M, N, K, whether there is a bias, first and last position.
    """
    rows, blocks = tile
    # A chain has the place of a part, of which a block has but one.
    grid = Grid(rows, blocks, chains, 16)

    @T.prim_func(s_tir=True)
    def kernel(
        x_data: T.handle("float32"),
        weight_data: T.handle(kind),
        bias_data: T.handle("float32"),
        y_data: T.handle("float32"),
        m_size: T.int64,
        n_size: T.int64,
        k_size: T.int64,
        has_bias: T.int64,
        first: T.int64,
        last: T.int64,
    ):
        T.func_attr({"global_symbol": name, "tirx.noalias": True})
        n_blocks = (n_size + 15) // 16
        x = T.decl_buffer((m_size * k_size,), "float32", data=x_data)
        weight = T.decl_buffer((n_blocks * k_size * 16,), kind, data=weight_data)
        bias = T.decl_buffer((n_size,), "float32", data=bias_data)
        y = T.decl_buffer((m_size * n_size,), "float32", data=y_data)
        row = T.alloc_buffer((rows,), "int64", scope="local")
        block = T.alloc_buffer((blocks,), "int64", scope="local")
        total = T.alloc_buffer((grid.size,), "float32", scope="local")
        tail = T.alloc_buffer((16,), "float32", scope="local")
        streams = (n_blocks + (blocks - 1)) // blocks
        for position in range(first, last):
            take_blocks(block, blocks, position, streams, n_blocks)
            for chunk in range((m_size + (rows - 1)) // rows):
                take_rows(row, rows, chunk, m_size)
                outputs = T.meta_var(
                    Outputs(y, bias, has_bias, m_size, n_size, n_blocks, streams, position, block, chunk, row)
                )
                clear(total, rows * blocks * chains, 16)
                for k in range(k_size // chains):
                    for chain in unrolled(chains):
                        _add_column(total, grid, k * chains, chain, x, weight, k_size, outputs)
                for k in range(k_size // chains * chains, k_size):
                    _add_column(total, grid, k, 0, x, weight, k_size, outputs)
                for chain in unrolled(chains - 1):
                    for i in unrolled(rows * blocks):
                        total[T.ramp(grid.at(0, i, 0), 1, 16)] = vector(total, grid.at(0, i, 0), 16) + vector(
                            total, grid.at(0, i, chain + 1), 16
                        )
                store_tile(total, grid, 1, tail, outputs)

    return kernel
