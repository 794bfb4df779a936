"""Products with low-bit weights and int8 activations, and with float weights.

All kernels are serial over a range of positions [first, last): the dispatcher cuts the range into tasks. A position
stands for `blocks` blocks of 16 output rows that lie ⌈N16 / blocks⌉ blocks apart, so that one task reads as many
separate streams of memory at once; one sequential stream reaches about 60 % of what a core can read.
"""
# TVMScript's annotations are TIR types, which a Python type checker cannot know.
# mypy: disable-error-code="valid-type, no-untyped-def, no-untyped-call, no-any-return, untyped-decorator, misc"

from typing import Any

from tvm.script import tirx as T

from hikui.backends.kernels.fields import LINES, QUADS, SEGMENTS
from hikui.backends.kernels.isa.base import (
    Isa,
    Place,
    Scheme,
    Tile,
    prefetch,
    splat,
    to_float,
    unrolled,
    vector,
)


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
    lanes, parts = isa.lanes, isa.parts
    rows, blocks = isa.tile(kind, size)
    schemes = [isa.scheme(segment, size) for segment in SEGMENTS[kind]]
    sums = max(len(scheme.shifts) for scheme in schemes)

    def at(row, block, part):
        return ((row * blocks + block) * parts + part) * lanes

    def groups_of(segment, buffers, first_group, last_group, first_line, group_steps, row_quads, chunk):
        """The groups of one segment; `first_line` is its first line in a block."""
        q, q_sums, weight, scale, row, block, products, total, lines, groups, correction, codebook = buffers
        scheme: Scheme = schemes[segment]
        step_lines = LINES[SEGMENTS[kind][segment]]

        def held(i, j, part, k):
            return (((i * blocks + j) * parts + part) * sums + k) * lanes

        def step_of(i, j, part, line, quad):
            place = Place(weight, line, part, q, quad, rows if panel else 1, codebook)
            before = [vector(products, held(i, j, part, k), lanes) for k in range(len(scheme.shifts))]
            for k, after in enumerate(scheme.dot(before, place)):
                T.buffer_store(products, after, [T.ramp(held(i, j, part, k), 1, lanes)])

        with T.serial(first_group, last_group) as group:
            with unrolled(rows * blocks * parts * sums) as i:
                T.buffer_store(products, splat(T.int32(0), lanes), [T.ramp(i * lanes, 1, lanes)])
            # A group has at least one step; said so, LLVM keeps the conversion to float out of the loop.
            with T.serial(T.int64(0), T.max(group_steps, 1)) as step:
                line = first_line + ((group - first_group) * group_steps + step) * step_lines
                quad = (group * group_steps + step) * QUADS
                with unrolled(blocks) as j, unrolled(parts) as part, unrolled(rows) as i:
                    at_quad = (chunk * row_quads + quad) * rows + i if panel else row[i] * row_quads + quad
                    step_of(i, j, part, block[j] * lines + line, at_quad)
            with unrolled(rows) as i:
                T.buffer_store(correction, T.int32(0), [i])
                if scheme.offset:
                    with T.serial(T.int64(0), group_steps) as step:
                        at_step = row[i] * (row_quads // QUADS) + group * group_steps + step
                        T.buffer_store(correction, correction[i] - q_sums[at_step] * scheme.offset, [i])
            with unrolled(blocks) as j, unrolled(parts) as part, unrolled(rows) as i:
                value = summed(scheme, [vector(products, held(i, j, part, k), lanes) for k in range(sums)], lanes)
                value = value + splat(correction[i], lanes)
                factors = vector(scale, (block[j] * groups + group) * 16 + part * lanes, lanes)
                after = vector(total, at(i, j, part), lanes) + to_float(factors, lanes) * to_float(value, lanes)
                T.buffer_store(total, after, [T.ramp(at(i, j, part), 1, lanes)])

    def fill(codebook):
        for index, code in enumerate(schemes[0].codebook or ()):
            T.buffer_store(codebook, T.int32(code), [index])

    def all_groups(buffers, groups, split, *where):
        if len(schemes) == 1:
            groups_of(0, buffers, T.int64(0), groups, T.int64(0), *where)
            return
        groups_of(0, buffers, T.int64(0), split, T.int64(0), *where)
        behind = split * where[0] * LINES[SEGMENTS[kind][0]]
        groups_of(1, buffers, split, groups, behind, *where)

    @T.prim_func(s_tir=True)
    def kernel(
        q_data: T.handle("int32"),
        q_scale_data: T.handle("float32"),
        q_sums_data: T.handle("int32"),
        weight_data: T.handle("int32"),
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
        q = T.decl_buffer((m_size * row_quads,), "int32", data=q_data)
        q_scale = T.decl_buffer((m_size,), "float32", data=q_scale_data)
        q_sums = T.decl_buffer((m_size * (row_quads // QUADS),), "int32", data=q_sums_data)
        weight = T.decl_buffer((n_blocks * lines * 16,), "int32", data=weight_data)
        scale = T.decl_buffer((n_blocks * groups * 16,), "float16", data=scale_data)
        bias = T.decl_buffer((n_size,), "float32", data=bias_data)
        b = T.decl_buffer((n_blocks * rank * 16,), "float16", data=b_data)
        t = T.decl_buffer((m_size * rank,), "float32", data=t_data)
        y = T.decl_buffer((m_size * n_size,), "float32", data=y_data)
        row = T.alloc_buffer((rows,), "int64", scope="local")
        block = T.alloc_buffer((blocks,), "int64", scope="local")
        correction = T.alloc_buffer((rows,), "int32", scope="local")
        products = T.alloc_buffer((rows * blocks * 16 * sums,), "int32", scope="local")
        total = T.alloc_buffer((rows * blocks * 16,), "float32", scope="local")
        tail = T.alloc_buffer((16,), "float32", scope="local")
        codebook = T.alloc_buffer((16,), "int32", scope="local")
        fill(codebook)
        streams = (n_blocks + (blocks - 1)) // blocks
        for position in range(first, last):
            for j in unrolled(blocks):
                block[j] = T.min(position + j * streams, n_blocks - 1)
            for chunk in range((m_size + (rows - 1)) // rows):
                for i in unrolled(rows):
                    row[i] = T.min(chunk * rows + i, m_size - 1)
                for i in unrolled(rows * blocks * parts):
                    total[T.ramp(i * lanes, 1, lanes)] = splat(T.float32(0), lanes)
                # The branch is small and lies far from the streams: nothing else would fetch it in time.
                for r in range(rank):
                    for j in unrolled(blocks):
                        prefetch(b, (block[j] * rank + r) * 16)
                all_groups(
                    (q, q_sums, weight, scale, row, block, products, total, lines, groups, correction, codebook),
                    groups,
                    split,
                    group_steps,
                    row_quads,
                    chunk,
                )
                for i in unrolled(rows):
                    for j in unrolled(blocks * parts):
                        total[T.ramp(at(i, 0, j), 1, lanes)] = vector(total, at(i, 0, j), lanes) * splat(
                            q_scale[row[i]], lanes
                        )
                for r in range(rank):
                    for j in unrolled(blocks):
                        for part in unrolled(parts):
                            for i in unrolled(rows):
                                total[T.ramp(at(i, j, part), 1, lanes)] = vector(total, at(i, j, part), lanes) + (
                                    to_float(vector(b, (block[j] * rank + r) * 16 + part * lanes, lanes), lanes)
                                    * splat(t[row[i] * rank + r], lanes)
                                )
                for i in unrolled(rows):
                    for j in unrolled(blocks):
                        if chunk * rows + i < m_size and position + j * streams < n_blocks:
                            for part in unrolled(parts):
                                tail[T.ramp(part * lanes, 1, lanes)] = vector(total, at(i, j, part), lanes)
                            start = block[j] * 16
                            if has_bias != 0:
                                for n in range(T.min(n_size - start, 16)):
                                    tail[n] = tail[n] + bias[start + n]
                            for n in range(T.min(n_size - start, 16)):
                                y[row[i] * n_size + start + n] = tail[n]

    return kernel


def summed(scheme: Scheme, held: list[Any], lanes: int) -> Any:
    """Factor · Σ of the accumulators of a scheme, each brought down by its shift; exact."""
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

    def at(row, block, chain):
        return ((row * blocks + block) * chains + chain) * 16

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
        total = T.alloc_buffer((rows * blocks * chains * 16,), "float32", scope="local")
        tail = T.alloc_buffer((16,), "float32", scope="local")
        streams = (n_blocks + (blocks - 1)) // blocks
        for position in range(first, last):
            for j in unrolled(blocks):
                block[j] = T.min(position + j * streams, n_blocks - 1)
            for chunk in range((m_size + (rows - 1)) // rows):
                for i in unrolled(rows):
                    row[i] = T.min(chunk * rows + i, m_size - 1)
                for i in unrolled(rows * blocks * chains):
                    total[T.ramp(i * 16, 1, 16)] = splat(T.float32(0), 16)
                for k in range(k_size // chains):
                    for chain in unrolled(chains):
                        for j in unrolled(blocks):
                            for i in unrolled(rows):
                                total[T.ramp(at(i, j, chain), 1, 16)] = vector(total, at(i, j, chain), 16) + (
                                    to_float(vector(weight, (block[j] * k_size + k * chains + chain) * 16, 16), 16)
                                    * splat(x[row[i] * k_size + k * chains + chain], 16)
                                )
                for k in range(k_size // chains * chains, k_size):
                    for j in unrolled(blocks):
                        for i in unrolled(rows):
                            total[T.ramp(at(i, j, 0), 1, 16)] = vector(total, at(i, j, 0), 16) + (
                                to_float(vector(weight, (block[j] * k_size + k) * 16, 16), 16)
                                * splat(x[row[i] * k_size + k], 16)
                            )
                for chain in unrolled(chains - 1):
                    for i in unrolled(rows * blocks):
                        total[T.ramp(at(0, i, 0), 1, 16)] = vector(total, at(0, i, 0), 16) + vector(
                            total, at(0, i, chain + 1), 16
                        )
                for i in unrolled(rows):
                    for j in unrolled(blocks):
                        if chunk * rows + i < m_size and position + j * streams < n_blocks:
                            tail[T.ramp(0, 1, 16)] = vector(total, at(i, j, 0), 16)
                            start = block[j] * 16
                            if has_bias != 0:
                                for n in range(T.min(n_size - start, 16)):
                                    tail[n] = tail[n] + bias[start + n]
                            for n in range(T.min(n_size - start, 16)):
                                y[row[i] * n_size + start + n] = tail[n]

    return kernel
