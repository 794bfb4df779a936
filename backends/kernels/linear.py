"""Products with low-bit weights and int8 activations, and with float weights.

All kernels are serial over a range of positions [first, last): the dispatcher cuts the range into tasks. A position
stands for `blocks` blocks of 16 output rows that lie ⌈N16 / blocks⌉ blocks apart, so that one task reads as many
separate streams of memory at once; one sequential stream reaches about 60 % of what a core can read.
"""
# TVMScript's annotations are TIR types, which a Python type checker cannot know.
# mypy: disable-error-code="valid-type, no-untyped-def, no-untyped-call, no-any-return, untyped-decorator, misc"

from typing import Any

from tvm.script import tirx as T

from hikui.backends.kernels.isa.base import LINES, QUADS, Isa, Tile, prefetch, splat, to_float, unrolled, vector


def integer(isa: Isa, kind: str, tile: Tile, name: str) -> Any:
    """y[m, n] = q_scale[m] · Σ_g scale[n, g] · Σ_k q[m, k]·w[n, k] + bias[n] + Σ_r b[n, r]·t[m, r].

    Args:
        isa: the building blocks.
        kind: `int4` or `int8`.
        tile: rows of activations and blocks of output rows computed at once.
        name: symbol of the C function.

    The function's parameters after the pointers: M, N, quads a row of q, weight lines a block, groups, steps of 32
    columns a group, rank of the branch (0: none; then b and t are not read), whether there is a bias, first and last
    position.
    """
    lanes, parts = isa.lanes, isa.parts
    rows, blocks = tile
    offset = isa.offsets[kind]
    lines_step = LINES[kind]

    def at(row, block, part):
        return ((row * blocks + block) * parts + part) * lanes

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
        weight = T.decl_buffer((n_blocks * lines * 64,), "uint8", data=weight_data)
        scale = T.decl_buffer((n_blocks * groups * 16,), "float16", data=scale_data)
        bias = T.decl_buffer((n_size,), "float32", data=bias_data)
        b = T.decl_buffer((n_blocks * rank * 16,), "float16", data=b_data)
        t = T.decl_buffer((m_size * rank,), "float32", data=t_data)
        y = T.decl_buffer((m_size * n_size,), "float32", data=y_data)
        row = T.alloc_buffer((rows,), "int64", scope="local")
        block = T.alloc_buffer((blocks,), "int64", scope="local")
        correction = T.alloc_buffer((rows,), "int32", scope="local")
        products = T.alloc_buffer((rows * blocks * 16,), "int32", scope="local")
        total = T.alloc_buffer((rows * blocks * 16,), "float32", scope="local")
        tail = T.alloc_buffer((16,), "float32", scope="local")
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
                for group in range(groups):
                    for i in unrolled(rows):
                        correction[i] = 0
                        if offset != 0:
                            for step in range(group_steps):
                                correction[i] = (
                                    correction[i]
                                    - q_sums[row[i] * (row_quads // QUADS) + group * group_steps + step] * offset
                                )
                        for j in unrolled(blocks * parts):
                            products[T.ramp(at(i, 0, j), 1, lanes)] = splat(correction[i], lanes)
                    # A group has at least one step; said so, LLVM keeps the conversion to float out of the loop.
                    for step in range(T.max(group_steps, 1)):
                        for j in unrolled(blocks):
                            for part in unrolled(parts):
                                for i in unrolled(rows):
                                    products[T.ramp(at(i, j, part), 1, lanes)] = isa.dot(
                                        kind,
                                        vector(products, at(i, j, part), lanes),
                                        weight,
                                        block[j] * lines + (group * group_steps + step) * lines_step,
                                        part,
                                        q,
                                        row[i] * row_quads + (group * group_steps + step) * QUADS,
                                    )
                    for j in unrolled(blocks):
                        for part in unrolled(parts):
                            for i in unrolled(rows):
                                total[T.ramp(at(i, j, part), 1, lanes)] = vector(total, at(i, j, part), lanes) + (
                                    to_float(
                                        vector(scale, (block[j] * groups + group) * 16 + part * lanes, lanes), lanes
                                    )
                                    * to_float(vector(products, at(i, j, part), lanes), lanes)
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
