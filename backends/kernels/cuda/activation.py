"""Quantisation of activations: the three tensors that every integer product takes."""
# TVMScript's annotations are TIR types, which a Python type checker cannot know.
# mypy: disable-error-code="valid-type, no-untyped-def, no-untyped-call, no-any-return, untyped-decorator, misc"

from typing import Any

from tvm.script import tirx as T

from hikui.backends.kernels.cuda.block import ALL_LANES, THREADS, WARP, WARPS
from hikui.lowering.formats import ACTIVATION_PADDING, SUM_WIDTH


@T.inline
def _take_largest(x, start, k_size, lane, warp, thread, maxima, largest):
    """The largest magnitude of a block's row of x, for all of its threads."""
    largest[0] = T.float32(0)
    for turn in range((k_size + (THREADS - 1)) // THREADS):
        if turn * THREADS + thread < k_size:
            largest[0] = T.max(largest[0], T.abs(x[start + (turn * THREADS + thread)]))
    for bit in T.unroll(5):
        largest[0] = T.max(
            largest[0], T.tvm_warp_shuffle_xor(T.uint32(ALL_LANES), largest[0], T.int32(1) << bit, 32, 32)
        )
    if lane == 0:
        maxima[warp] = largest[0]
    T.evaluate(T.tvm_storage_sync("shared"))
    for w in T.unroll(WARPS):
        largest[0] = T.max(largest[0], maxima[w])


def quantize_activation(largest_code: int, static: bool, name: str) -> Any:
    """Q = round(x / step), clipped to ±largest_code; sums of 32 neighbours of q.

    Args:
        largest_code: 127, or 7 for int4 values held in int8.
        static: whether the step is given; else it is max|x| / largest_code for each row (and q = x · its inverse).
        name: symbol of the kernel.

    The kernel's pointers: x, the given step (one float32, read only where static), q, scale, sums; then M and K. Grid:
    M blocks of 32 × 8 threads.
    """

    @T.prim_func(s_tir=True)
    def kernel(
        x_data: T.handle("float32"),
        step_data: T.handle("float32"),
        q_data: T.handle("int8"),
        scale_data: T.handle("float32"),
        sums_data: T.handle("int32"),
        m_size: T.int32,
        k_size: T.int32,
    ):
        T.func_attr({"global_symbol": name, "tirx.noalias": True, "calling_conv": 2, "tirx.is_global_func": True})
        padded = (k_size + (ACTIVATION_PADDING - 1)) // ACTIVATION_PADDING * ACTIVATION_PADDING
        x = T.decl_buffer((m_size * k_size,), "float32", data=x_data)
        step = T.decl_buffer((1,), "float32", data=step_data)
        q = T.decl_buffer((m_size * padded,), "int8", data=q_data)
        scale = T.decl_buffer((m_size,), "float32", data=scale_data)
        sums = T.decl_buffer((m_size * (padded // SUM_WIDTH),), "int32", data=sums_data)
        row = T.launch_thread("blockIdx.x", m_size)
        lane = T.launch_thread("threadIdx.x", WARP)
        warp = T.launch_thread("threadIdx.y", WARPS)
        maxima = T.alloc_buffer((WARPS,), "float32", scope="shared")
        largest = T.alloc_buffer((1,), "float32", scope="local")
        value = T.alloc_buffer((1,), "float32", scope="local")
        count = T.alloc_buffer((1,), "int32", scope="local")
        thread = warp * WARP + lane
        start = T.cast(row, "int64") * k_size
        if static:
            largest[0] = step[0]
        else:
            _take_largest(x, start, k_size, lane, warp, thread, maxima, largest)
        if thread == 0:
            if static:
                scale[row] = largest[0]
            else:
                scale[row] = largest[0] / T.float32(largest_code)
        for turn in range((padded + (THREADS - 1)) // THREADS):
            # Whole warps take part or do not: the padded width is a multiple of theirs, and of what a sum spans.
            if turn * THREADS + warp * WARP < padded:
                column = turn * THREADS + thread
                value[0] = T.float32(0)
                if column < k_size:
                    value[0] = x[start + column]
                # Of a zero the inverse of a denormal maximum, which is infinite, would make no number.
                if value[0] != T.float32(0):
                    if static:
                        value[0] = T.Select(largest[0] > T.float32(0), value[0] / largest[0], T.float32(0))
                    else:
                        value[0] = value[0] * (T.float32(largest_code) / largest[0])
                value[0] = T.max(T.min(T.nearbyint(value[0]), T.float32(largest_code)), T.float32(-largest_code))
                count[0] = T.cast(value[0], "int32")
                q[T.cast(row, "int64") * padded + column] = T.cast(count[0], "int8")
                for bit in T.unroll(5):
                    count[0] = count[0] + T.tvm_warp_shuffle_xor(
                        T.uint32(ALL_LANES), count[0], T.int32(1) << bit, 32, 32
                    )
                if lane == 0:
                    sums[row * (padded // SUM_WIDTH) + column // SUM_WIDTH] = count[0]

    return kernel
