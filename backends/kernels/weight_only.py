"""Products of float activations with low-bit weights: what a model without activation quantisation runs.

Plain vector code, the same for every instruction set: 16 lanes, one an output row, which LLVM splits into registers.
A code is unpacked and converted once for all the rows of activations that are computed at once.
"""
# TVMScript's annotations are TIR types, which a Python type checker cannot know.
# mypy: disable-error-code="valid-type, no-untyped-def, no-untyped-call, no-any-return, untyped-decorator, misc"

from dataclasses import dataclass
from typing import Any, NamedTuple

from tvm import tirx
from tvm.script import tirx as T

from hikui.backends.kernels.fields import (
    CODEBOOKS,
    FACTOR,
    OFFSET,
    QUADS,
    SEGMENTS,
    group_lines,
    turn_lines,
    turn_quads,
)
from hikui.backends.kernels.isa.base import Buffer, Expression, Place, splat, to_float, unrolled, vector
from hikui.backends.kernels.isa.generic import codes_of
from hikui.backends.kernels.isa.product import Run, each_turn, runs, store


class _Operands(NamedTuple):
    """What the sums are made of; see `weight_only`."""

    x: Buffer
    weight: Buffer
    scale: Buffer
    columns: Expression
    groups: Expression
    split: Expression
    group_steps: Expression


class _Held(NamedTuple):
    """Local buffers: the rows, the sums of a group and of all groups, 16 codes of a column, the codebook."""

    row: Buffer
    sums: Buffer
    total: Buffer
    code: Buffer
    codebook: Buffer


@dataclass(frozen=True)
class _Sums:
    """The sums of a block of output rows, for so many rows of activations."""

    kind: str
    rows: int

    def fill(self, codebook: Buffer) -> None:
        for index, value in enumerate(CODEBOOKS.get(self.kind) or ()):
            T.buffer_store(codebook, T.int32(value), [index])

    def add_groups(self, operands: _Operands, held: _Held, block: Expression, first_line: Expression) -> None:
        for run in runs(self.kind, operands.groups, operands.split, operands.group_steps):
            with T.serial(run.first, run.last) as group:
                with unrolled(self.rows) as i:
                    store(held.sums, splat(T.float32(0), 16), i * 16, 16)
                self.add_steps(run, operands, held, group, first_line)
                with unrolled(self.rows) as i:
                    factors = to_float(vector(operands.scale, (block * operands.groups + group) * 16, 16), 16)
                    after = vector(held.total, i * 16, 16) + vector(held.sums, i * 16, 16) * factors
                    store(held.total, after, i * 16, 16)

    def add_steps(self, run: Run, operands: _Operands, held: _Held, group: Expression, first_line: Expression) -> None:
        """Adds the products of a group's steps to its sums."""
        kind = SEGMENTS[self.kind][run.segment]
        line = first_line + run.line + (group - run.first) * group_lines(kind, operands.group_steps)
        quad = group * operands.group_steps * QUADS

        def add(turn: Expression, left: Expression) -> None:
            here = line + turn * turn_lines(kind)
            place = Place(operands.weight, here, T.int64(0), None, None, codebook=held.codebook, left=left)
            self.add_turn(kind, place, (quad + turn * turn_quads(kind)) * 4, operands, held)

        each_turn(kind, operands.group_steps, add)

    def add_turn(self, kind: str, place: Place, column: Expression, operands: _Operands, held: _Held) -> None:
        """Adds the products of a step or line, whose first column is given."""
        for i in range(turn_quads(kind) * 4):
            values = codes_of(kind, place, i // 4, i % 4, 16)
            if kind in FACTOR:
                values = values * splat(T.int32(FACTOR[kind]), 16) - splat(T.int32(OFFSET[kind]), 16)
            store(held.code, to_float(values, 16), 0, 16)
            for j in range(self.rows):
                at = held.row[j] * operands.columns + column
                if place.left is None:
                    value = operands.x[at + i]
                else:
                    there = operands.x[at + T.min(T.int64(i // 4), place.left - 1) * 4 + i % 4]
                    value = tirx.Select(T.int64(i // 4) < place.left, there, T.float32(0))
                after = vector(held.sums, j * 16, 16) + vector(held.code, 0, 16) * splat(value, 16)
                store(held.sums, after, j * 16, 16)


def weight_only(kind: str, rows: int, name: str) -> Any:
    """y[m, n] = Σ_g scale[n, g] · Σ_k x[m, k]·w[n, k] + bias[n] with float32 x.

    Args:
        kind: a key of `fields.SEGMENTS`.
        rows: rows of activations computed at once.
        name: symbol of the C function.

    The function's parameters after the pointers: M, N, columns of a row of x (a multiple of 32, and zero where the
    matrix has none), weight lines a block, groups, those of them in the first segment, steps of 32 columns a group,
    whether there is a bias, first and last position; a position is one block of 16 rows.
    """
    sums_of = _Sums(kind, rows)

    @T.prim_func(s_tir=True)
    def kernel(
        x_data: T.handle("float32"),
        weight_data: T.handle("int32"),
        scale_data: T.handle("float16"),
        bias_data: T.handle("float32"),
        y_data: T.handle("float32"),
        m_size: T.int64,
        n_size: T.int64,
        columns: T.int64,
        lines: T.int64,
        groups: T.int64,
        split: T.int64,
        group_steps: T.int64,
        has_bias: T.int64,
        first: T.int64,
        last: T.int64,
    ):
        T.func_attr({"global_symbol": name, "tirx.noalias": True})
        n_blocks = (n_size + 15) // 16
        x = T.decl_buffer((m_size * columns,), "float32", data=x_data)
        weight = T.decl_buffer((n_blocks * lines * 16,), "int32", data=weight_data)
        scale = T.decl_buffer((n_blocks * groups * 16,), "float16", data=scale_data)
        bias = T.decl_buffer((n_size,), "float32", data=bias_data)
        y = T.decl_buffer((m_size * n_size,), "float32", data=y_data)
        row = T.alloc_buffer((rows,), "int64", scope="local")
        sums = T.alloc_buffer((rows * 16,), "float32", scope="local")
        total = T.alloc_buffer((rows * 16,), "float32", scope="local")
        code = T.alloc_buffer((16,), "float32", scope="local")
        codebook = T.alloc_buffer((16,), "int32", scope="local")
        sums_of.fill(codebook)
        for block in range(first, last):
            for chunk in range((m_size + (rows - 1)) // rows):
                for i in unrolled(rows):
                    row[i] = T.min(chunk * rows + i, m_size - 1)
                    total[T.ramp(i * 16, 1, 16)] = splat(T.float32(0), 16)
                sums_of.add_groups(
                    _Operands(x, weight, scale, columns, groups, split, group_steps),
                    _Held(row, sums, total, code, codebook),
                    block,
                    block * lines,
                )
                for i in range(T.min(m_size - chunk * rows, rows)):
                    for n in range(T.min(n_size - block * 16, 16)):
                        y[(chunk * rows + i) * n_size + block * 16 + n] = total[i * 16 + n]
                    if has_bias != 0:
                        for n in range(T.min(n_size - block * 16, 16)):
                            y[(chunk * rows + i) * n_size + block * 16 + n] = (
                                y[(chunk * rows + i) * n_size + block * 16 + n] + bias[block * 16 + n]
                            )

    return kernel
