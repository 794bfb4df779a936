"""Row-wise kernels: quantisation of activations, RMS norm, SwiGLU.

Each works on the rows [first, last) of a matrix of `k_size` columns. The fused forms of the dialect are these kernels
one after the other on the same rows, which the dispatcher does while a row is in cache.
"""
# TVMScript's annotations are TIR types, which a Python type checker cannot know.
# mypy: disable-error-code="valid-type, no-untyped-def, no-untyped-call, no-any-return, untyped-decorator, misc"

from typing import Any

from tvm.script import tirx as T

from hikui.backends.kernels.isa.base import splat, unrolled, vector
from hikui.backends.kernels.mathematics import maximum_of, sigmoid, sum_of

PADDING = 128
"""Columns of q are a multiple of this."""

TINY = 2.0**-100
"""Rows whose largest magnitude is no more than this count as zero: its inverse would not be finite."""


MODES = {"int8": 127, "int4": 7, "static": 127}
"""The quantisers of activations and the largest code of each; `static` takes its step from the caller."""


@T.inline
def _take_largest(x, start, k_size, lanes, largest):
    """The largest magnitude of a row of x."""
    for i in unrolled(2):
        lanes[T.ramp(i * 16, 1, 16)] = splat(T.float32(0), 16)
    for chunk in range(k_size // 32):
        for i in unrolled(2):
            lanes[T.ramp(i * 16, 1, 16)] = T.max(
                vector(lanes, i * 16, 16), T.abs(vector(x, start + chunk * 32 + i * 16, 16))
            )
    largest[0] = maximum_of(T.max(vector(lanes, T.int64(0), 16), vector(lanes, T.int64(16), 16)), 16)
    for k in range(k_size // 32 * 32, k_size):
        largest[0] = T.max(largest[0], T.abs(x[start + k]))


def quantize_activation(mode: str, name: str) -> Any:
    """Q = round(x · L/max|x|), scale = max|x|/L, sums of 32 neighbours of q, for the largest code L.

    `static`: q = round(x / step), clipped, and scale = step.
    """
    most, static = MODES[mode], mode == "static"

    @T.prim_func(s_tir=True)
    def kernel(
        x_data: T.handle("float32"),
        step_data: T.handle("float32"),
        q_data: T.handle("int8"),
        scale_data: T.handle("float32"),
        sums_data: T.handle("int32"),
        k_size: T.int64,
        first: T.int64,
        last: T.int64,
    ):
        T.func_attr({"global_symbol": name, "tirx.noalias": True})
        padded = (k_size + (PADDING - 1)) // PADDING * PADDING
        x = T.decl_buffer((last * k_size,), "float32", data=x_data)
        step = T.decl_buffer((1,), "float32", data=step_data)
        q = T.decl_buffer((last * padded,), "int8", data=q_data)
        scale = T.decl_buffer((last,), "float32", data=scale_data)
        sums = T.decl_buffer((last * (padded // 32),), "int32", data=sums_data)
        lanes = T.alloc_buffer((32,), "float32", scope="local")
        largest = T.alloc_buffer((1,), "float32", scope="local")
        factor = T.alloc_buffer((1,), "float32", scope="local")
        count = T.alloc_buffer((1,), "int32", scope="local")
        for row in range(first, last):
            if static:
                scale[row] = step[0]
                factor[0] = step[0]
            else:
                _take_largest(x, row * k_size, k_size, lanes, largest)
                scale[row] = largest[0] / T.float32(most)
                factor[0] = T.float32(0)
                if largest[0] > T.float32(TINY):
                    factor[0] = T.float32(most) / largest[0]
            for chunk in range(k_size // 32):
                q[T.ramp(row * padded + chunk * 32, 1, 32)] = T.cast(
                    _codes(vector(x, row * k_size + chunk * 32, 32), factor[0], most, static, 32), "int8x32"
                )
            for k in range(k_size // 32 * 32, k_size):
                q[row * padded + k] = T.cast(_codes(x[row * k_size + k], factor[0], most, static, 1), "int8")
            for k in range(k_size, padded):
                q[row * padded + k] = T.int8(0)
            for chunk in range(padded // 32):
                count[0] = 0
                for k in range(32):
                    count[0] = count[0] + T.cast(q[row * padded + chunk * 32 + k], "int32")
                sums[row * (padded // 32) + chunk] = count[0]

    return kernel


def _codes(values: Any, factor: Any, most: int, static: bool, lanes: int) -> Any:
    low, high, zero = (T.float32(value) for value in (-most, most, 0))
    if lanes > 1:
        low, high, zero, factor = (splat(value, lanes) for value in (low, high, zero, factor))
    # A step of zero stands for activations that were always zero.
    scaled = T.Select(factor > zero, values / factor, zero) if static else values * factor
    return T.cast(T.max(T.min(T.nearbyint(scaled), high), low), f"int32x{lanes}" if lanes > 1 else "int32")


def rms_norm(name: str) -> Any:
    """RMS norm: y = x / √(mean(x²) + eps) · weight."""

    @T.prim_func(s_tir=True)
    def kernel(
        x_data: T.handle("float32"),
        weight_data: T.handle("float32"),
        y_data: T.handle("float32"),
        k_size: T.int64,
        eps: T.float32,
        first: T.int64,
        last: T.int64,
    ):
        T.func_attr({"global_symbol": name, "tirx.noalias": True})
        x = T.decl_buffer((last * k_size,), "float32", data=x_data)
        weight = T.decl_buffer((k_size,), "float32", data=weight_data)
        y = T.decl_buffer((last * k_size,), "float32", data=y_data)
        lanes = T.alloc_buffer((32,), "float32", scope="local")
        total = T.alloc_buffer((1,), "float32", scope="local")
        for row in range(first, last):
            for i in unrolled(2):
                lanes[T.ramp(i * 16, 1, 16)] = splat(T.float32(0), 16)
            for chunk in range(k_size // 32):
                for i in unrolled(2):
                    lanes[T.ramp(i * 16, 1, 16)] = vector(lanes, i * 16, 16) + vector(
                        x, row * k_size + chunk * 32 + i * 16, 16
                    ) * vector(x, row * k_size + chunk * 32 + i * 16, 16)
            total[0] = sum_of(vector(lanes, T.int64(0), 16) + vector(lanes, T.int64(16), 16), 16)
            for k in range(k_size // 32 * 32, k_size):
                total[0] = total[0] + x[row * k_size + k] * x[row * k_size + k]
            total[0] = T.float32(1) / T.sqrt(total[0] / T.cast(k_size, "float32") + eps)
            for k in range(k_size):
                y[row * k_size + k] = x[row * k_size + k] * total[0] * weight[k]

    return kernel


def swiglu(name: str) -> Any:
    """SwiGLU: y = silu(gate) · up."""

    @T.prim_func(s_tir=True)
    def kernel(
        gate_data: T.handle("float32"),
        up_data: T.handle("float32"),
        y_data: T.handle("float32"),
        k_size: T.int64,
        first: T.int64,
        last: T.int64,
    ):
        T.func_attr({"global_symbol": name, "tirx.noalias": True})
        gate = T.decl_buffer((last * k_size,), "float32", data=gate_data)
        up = T.decl_buffer((last * k_size,), "float32", data=up_data)
        y = T.decl_buffer((last * k_size,), "float32", data=y_data)
        count = (last - first) * k_size
        start = first * k_size
        for chunk in range(count // 16):
            y[T.ramp(start + chunk * 16, 1, 16)] = (
                vector(gate, start + chunk * 16, 16)
                * sigmoid(vector(gate, start + chunk * 16, 16), 16)
                * vector(up, start + chunk * 16, 16)
            )
        for k in range(start + count // 16 * 16, start + count):
            y[k] = gate[k] * sigmoid(gate[k], 1) * up[k]

    return kernel
