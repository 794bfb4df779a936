"""Products of float activations with low-bit weights: what a model without activation quantisation runs.

Plain vector code, the same for every instruction set: 16 lanes, one an output row, which LLVM splits into registers.
A code is unpacked and converted once for all the rows of activations that are computed at once.
"""
# TVMScript's annotations are TIR types, which a Python type checker cannot know.
# mypy: disable-error-code="valid-type, no-untyped-def, no-untyped-call, no-any-return, untyped-decorator, misc"

from typing import Any

from tvm.script import tirx as T

from hikui.backends.kernels.fields import CODEBOOKS, FACTOR, LINES, OFFSET, SEGMENTS
from hikui.backends.kernels.isa.base import Place, splat, to_float, unrolled, vector
from hikui.backends.kernels.isa.generic import codes_of

_STEP = 32


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

    def group_of(segment, buffers, group, first_group, first_line, group_steps, columns):
        x, weight, row, sums, code, codebook, block_line = buffers
        part = SEGMENTS[kind][segment]
        with T.serial(T.int64(0), T.max(group_steps, 1)) as step:
            line = block_line + first_line + ((group - first_group) * group_steps + step) * LINES[part]
            place = Place(weight, line, T.int64(0), None, None, codebook=codebook)
            for i in range(_STEP):
                values = codes_of(part, place, i // 4, i % 4, 16)
                if part in FACTOR:
                    values = values * splat(T.int32(FACTOR[part]), 16) - splat(T.int32(OFFSET[part]), 16)
                T.buffer_store(code, to_float(values, 16), [T.ramp(0, 1, 16)])
                for j in range(rows):
                    at = row[j] * columns + (group * group_steps + step) * _STEP + i
                    after = vector(sums, j * 16, 16) + vector(code, 0, 16) * splat(x[at], 16)
                    T.buffer_store(sums, after, [T.ramp(j * 16, 1, 16)])

    def groups_of(segment, buffers, total, scale, scale_at, first_group, last_group, first_line, group_steps, columns):
        sums = buffers[3]
        with T.serial(first_group, last_group) as group:
            with unrolled(rows) as i:
                T.buffer_store(sums, splat(T.float32(0), 16), [T.ramp(i * 16, 1, 16)])
            group_of(segment, buffers, group, first_group, first_line, group_steps, columns)
            with unrolled(rows) as i:
                factors = to_float(vector(scale, (scale_at + group) * 16, 16), 16)
                after = vector(total, i * 16, 16) + vector(sums, i * 16, 16) * factors
                T.buffer_store(total, after, [T.ramp(i * 16, 1, 16)])

    def all_groups(buffers, total, scale, scale_at, groups, split, group_steps, columns):
        if len(SEGMENTS[kind]) == 1:
            groups_of(0, buffers, total, scale, scale_at, T.int64(0), groups, T.int64(0), group_steps, columns)
            return
        behind = split * group_steps * LINES[SEGMENTS[kind][0]]
        groups_of(0, buffers, total, scale, scale_at, T.int64(0), split, T.int64(0), group_steps, columns)
        groups_of(1, buffers, total, scale, scale_at, split, groups, behind, group_steps, columns)

    def fill(codebook):
        for index, value in enumerate(CODEBOOKS.get(kind) or ()):
            T.buffer_store(codebook, T.int32(value), [index])

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
        fill(codebook)
        for block in range(first, last):
            for chunk in range((m_size + (rows - 1)) // rows):
                for i in unrolled(rows):
                    row[i] = T.min(chunk * rows + i, m_size - 1)
                    total[T.ramp(i * 16, 1, 16)] = splat(T.float32(0), 16)
                all_groups(
                    (x, weight, row, sums, code, codebook, block * lines),
                    total,
                    scale,
                    block * groups,
                    groups,
                    split,
                    group_steps,
                    columns,
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
