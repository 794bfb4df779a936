"""Products with float weights: the head of a model, and A x of a low-rank branch."""
# TVMScript's annotations are TIR types, which a Python type checker cannot know.
# mypy: disable-error-code="valid-type, no-untyped-def, no-untyped-call, no-any-return, untyped-decorator, misc"

from typing import Any

from tvm.script import tirx as T

from hikui.backends.kernels.cuda.block import THREADS, WARP, WARPS, finish, start

_AHEAD = 4
"""Weights of 16 bytes that a lane asks for before it uses the first."""


def dense(kind: str, rows: int, name: str) -> Any:
    """y[m, n] = Σ_k x[m, k]·w[n, k] + bias[n] with float weights of the layout [N16, K, 16].

    Args:
        kind: `float16` or `float32`; x, sums and y are float32.
        rows: rows of activations that share a weight, at most 16.
        name: symbol of the kernel.

    The kernel's parameters after the pointers: M, N, K, whether there is a bias. Grid: ⌈N/16⌉ × ⌈M/rows⌉ blocks of
    32 × 8 threads.
    """
    wide = 8 if kind == "float16" else 4  # Weights in 16 bytes.
    runs = 16 // wide
    places = THREADS // runs
    vector = f"{kind}x{wide}"

    @T.prim_func(s_tir=True)
    def kernel(
        x_data: T.handle("float32"),
        weight_data: T.handle(vector),
        bias_data: T.handle("float32"),
        y_data: T.handle("float32"),
        m_size: T.int32,
        n_size: T.int32,
        k_size: T.int32,
        has_bias: T.int32,
    ):
        T.func_attr({"global_symbol": name, "tirx.noalias": True, "calling_conv": 2, "tirx.is_global_func": True})
        n_blocks = (n_size + 15) // 16
        x = T.decl_buffer((m_size * k_size,), "float32", data=x_data)
        weight = T.decl_buffer((n_blocks * k_size * runs,), vector, data=weight_data)
        bias = T.decl_buffer((n_size,), "float32", data=bias_data)
        y = T.decl_buffer((m_size * n_size,), "float32", data=y_data)
        block = T.launch_thread("blockIdx.x", n_blocks)
        chunk = T.launch_thread("blockIdx.y", (m_size + (rows - 1)) // rows)
        lane = T.launch_thread("threadIdx.x", WARP)
        warp = T.launch_thread("threadIdx.y", WARPS)
        partial = T.alloc_buffer((WARPS * rows * 16,), "float32", scope="shared")
        total = T.alloc_buffer((rows * wide,), "float32", scope="local")
        row = T.alloc_buffer((rows,), "int32", scope="local")
        packed = T.alloc_buffer((_AHEAD * wide,), kind, scope="local")
        activation = T.alloc_buffer((1,), "float32", scope="local")
        column = T.alloc_buffer((_AHEAD,), "int32", scope="local")
        place = warp * (WARP // runs) + lane // runs
        start(total, row, wide, rows, chunk, m_size)
        for turn in range((k_size + (places * _AHEAD - 1)) // (places * _AHEAD)):
            for u in T.unroll(_AHEAD):
                # Beyond the end the last column is read again, and its activation taken as 0.
                column[u] = T.min((turn * _AHEAD + u) * places + place, k_size - 1)
                packed[T.ramp(u * wide, 1, wide)] = weight[
                    (T.cast(block, "int64") * k_size + column[u]) * runs + lane % runs
                ]
            for u in T.unroll(_AHEAD):
                for i in T.unroll(rows):
                    activation[0] = T.Select(
                        (turn * _AHEAD + u) * places + place < k_size,
                        x[T.cast(row[i], "int64") * k_size + column[u]],
                        T.float32(0),
                    )
                    for r in T.unroll(wide):
                        total[i * wide + r] = (
                            total[i * wide + r] + T.cast(packed[u * wide + r], "float32") * activation[0]
                        )
        finish(total, wide, rows, block, chunk, lane, warp, partial, bias, has_bias, y, m_size, n_size)

    return kernel
