"""Rotary embedding and attention over a key-value cache.

Plain vector loops: at the lengths of a small board's context the products with the weights take nearly all of the time.
"""
# TVMScript's annotations are TIR types, which a Python type checker cannot know.
# mypy: disable-error-code="valid-type, no-untyped-def, no-untyped-call, no-any-return, untyped-decorator, misc"

from typing import Any, NamedTuple

from tvm.script import tirx as T

from hikui.backends.kernels.cache import ELEMENT, PARTS, floats
from hikui.backends.kernels.isa.base import Expression, splat, unrolled, vector
from hikui.backends.kernels.mathematics import exponential, sum_of

KEYS = 64
"""Keys whose scores are held at once; between such blocks the softmax is rescaled."""

LOWEST = -3.0e38
"""Less than any score: its exponential, the smallest there is, adds nothing to a sum of at least one."""


def rotary(name: str) -> Any:
    """Rows [first, last) of heads · tokens: y = x · cos + rotate_half(x) · sin."""

    @T.prim_func(s_tir=True)
    def kernel(
        x_data: T.handle("float32"),
        cos_data: T.handle("float32"),
        sin_data: T.handle("float32"),
        y_data: T.handle("float32"),
        tokens: T.int64,
        size: T.int64,
        first: T.int64,
        last: T.int64,
    ):
        T.func_attr({"global_symbol": name, "tirx.noalias": True})
        x = T.decl_buffer((last * size,), "float32", data=x_data)
        cos = T.decl_buffer((tokens * size,), "float32", data=cos_data)
        sin = T.decl_buffer((tokens * size,), "float32", data=sin_data)
        y = T.decl_buffer((last * size,), "float32", data=y_data)
        half = size // 2
        for row in range(first, last):
            token = row % tokens
            for k in range(half):
                y[row * size + k] = (
                    x[row * size + k] * cos[token * size + k] - x[row * size + half + k] * sin[token * size + k]
                )
            for k in range(half):
                y[row * size + half + k] = (
                    x[row * size + half + k] * cos[token * size + half + k]
                    + x[row * size + k] * sin[token * size + half + k]
                )

    return kernel


class _Keys(NamedTuple):
    """A row of heads · tokens, and the keys whose scores are held for it: `width` tokens of a cache from `token` on.

    An element of the cache stands for `parts` columns; `stored` elements are a token's `size` columns.
    """

    fmt: str
    parts: int
    row: Expression
    size: Expression
    stored: Expression
    token: Expression
    width: Expression


@T.inline
def _score(at, q, key, key_scale, factor, lanes, scores, state):
    """The scores of the keys, and their largest so far in state[2]."""
    for j in range((at.width + 3) // 4):
        for i in unrolled(4):
            lanes[T.ramp(i * 8, 1, 8)] = splat(T.float32(0), 8)
        for d in range(at.stored // 8):
            for i in unrolled(4):
                for part in unrolled(at.parts):
                    lanes[T.ramp(i * 8, 1, 8)] = vector(lanes, i * 8, 8) + vector(
                        q, at.row * at.size + part * at.stored + d * 8, 8
                    ) * floats(
                        vector(key, (at.token + T.min(j * 4 + i, at.width - 1)) * at.stored + d * 8, 8),
                        at.fmt,
                        part,
                        8,
                    )
        for i in unrolled(4):
            # Beyond the last key its score is repeated, which changes no maximum and is not read again.
            state[3] = sum_of(vector(lanes, i * 8, 8), 8)
            for d in range(at.stored // 8 * 8, at.stored):
                for part in unrolled(at.parts):
                    state[3] = state[3] + q[at.row * at.size + part * at.stored + d] * floats(
                        key[(at.token + T.min(j * 4 + i, at.width - 1)) * at.stored + d], at.fmt, part, 1
                    )
            if at.fmt != "float32":
                state[3] = state[3] * T.cast(key_scale[at.token + T.min(j * 4 + i, at.width - 1)], "float32")
            scores[j * 4 + i] = state[3] * factor
            state[2] = T.max(state[2], state[3] * factor)


@T.inline
def _weigh(at, value_scale, total, scores, state):
    """Scores become weights below the maximum, state[0]; the sum of all weights so far is state[1]."""
    for j in range(at.width, KEYS):
        scores[j] = T.float32(LOWEST)
    total[T.ramp(0, 1, 16)] = splat(T.float32(0), 16)
    for j in unrolled(KEYS // 16):
        scores[T.ramp(j * 16, 1, 16)] = exponential(vector(scores, j * 16, 16) - splat(state[0], 16), 16)
        total[T.ramp(0, 1, 16)] = vector(total, T.int64(0), 16) + vector(scores, j * 16, 16)
    state[1] = state[1] + sum_of(vector(total, T.int64(0), 16), 16)
    if at.fmt != "float32":
        for j in range(at.width):
            scores[j] = scores[j] * T.cast(value_scale[at.token + j], "float32")
        # Weights of 1e-38 times a scale would be subnormal numbers, which some CPUs are slow with.
        for j in range(at.width, (at.width + 3) // 4 * 4):
            scores[j] = T.float32(0)


@T.inline
def _add_values(at, value, out, total, scores, state):
    """Rescales the output by state[3] and adds the weighted values."""
    for part in unrolled(at.parts):
        for d in range(at.stored // 16):
            total[T.ramp(0, 1, 16)] = vector(out, at.row * at.size + part * at.stored + d * 16, 16) * splat(
                state[3], 16
            )
            for i in unrolled(3):
                total[T.ramp((i + 1) * 16, 1, 16)] = splat(T.float32(0), 16)
            # The last keys of four may lie beyond the width: their weight is about 1e-38.
            for j in range((at.width + 3) // 4):
                for i in unrolled(4):
                    total[T.ramp(i * 16, 1, 16)] = vector(total, i * 16, 16) + (
                        splat(scores[j * 4 + i], 16)
                        * floats(
                            vector(value, (at.token + T.min(j * 4 + i, at.width - 1)) * at.stored + d * 16, 16),
                            at.fmt,
                            part,
                            16,
                        )
                    )
            out[T.ramp(at.row * at.size + part * at.stored + d * 16, 1, 16)] = (
                vector(total, T.int64(0), 16) + vector(total, T.int64(16), 16)
            ) + (vector(total, T.int64(32), 16) + vector(total, T.int64(48), 16))
        for d in range(at.stored // 16 * 16, at.stored):
            state[2] = out[at.row * at.size + part * at.stored + d] * state[3]
            for j in range(at.width):
                state[2] = state[2] + scores[j] * floats(value[(at.token + j) * at.stored + d], at.fmt, part, 1)
            out[at.row * at.size + part * at.stored + d] = state[2]


def attention(fmt: str, name: str) -> Any:
    """Causal attention of rows [first, last) of heads · tokens over the first past + token + 1 keys of the caches.

    Softmax in one sweep over the keys: a running maximum and sum, the output rescaled when the maximum grows. The
    output row itself is the accumulator. A quantised cache is widened where it is read: a key's scale multiplies its
    score, a value's its weight. A float32 cache has no scales, and the pointers to them are not read.
    """
    element, parts = ELEMENT[fmt], PARTS[fmt]

    @T.prim_func(s_tir=True)
    def kernel(
        q_data: T.handle("float32"),
        key_data: T.handle(element),
        value_data: T.handle(element),
        key_scale_data: T.handle("float16"),
        value_scale_data: T.handle("float16"),
        out_data: T.handle("float32"),
        heads: T.int64,
        kv_heads: T.int64,
        tokens: T.int64,
        context: T.int64,
        size: T.int64,
        past: T.int64,
        factor: T.float32,
        first: T.int64,
        last: T.int64,
    ):
        T.func_attr({"global_symbol": name, "tirx.noalias": True})
        stored = size // parts
        q = T.decl_buffer((last * size,), "float32", data=q_data)
        key = T.decl_buffer((kv_heads * context * stored,), element, data=key_data)
        value = T.decl_buffer((kv_heads * context * stored,), element, data=value_data)
        key_scale = T.decl_buffer((kv_heads * context,), "float16", data=key_scale_data)
        value_scale = T.decl_buffer((kv_heads * context,), "float16", data=value_scale_data)
        out = T.decl_buffer((last * size,), "float32", data=out_data)
        scores = T.alloc_buffer((KEYS,), "float32", scope="local")
        lanes = T.alloc_buffer((32,), "float32", scope="local")
        total = T.alloc_buffer((64,), "float32", scope="local")
        state = T.alloc_buffer((4,), "float32", scope="local")
        for row in range(first, last):
            head = row // tokens // (heads // kv_heads)
            columns = past + row % tokens + 1
            state[0] = T.float32(LOWEST)
            state[1] = T.float32(0)
            for d in range(size):
                out[row * size + d] = T.float32(0)
            for block in range((columns + (KEYS - 1)) // KEYS):
                width = T.min(columns - block * KEYS, KEYS)
                token = head * context + block * KEYS
                state[2] = state[0]
                at = T.meta_var(_Keys(fmt, parts, row, size, stored, token, width))
                _score(at, q, key, key_scale, factor, lanes, scores, state)
                state[3] = exponential(state[0] - state[2], 1)
                state[0] = state[2]
                state[1] = state[1] * state[3]
                _weigh(at, value_scale, total, scores, state)
                _add_values(at, value, out, total, scores, state)
            for d in range(size):
                out[row * size + d] = out[row * size + d] / state[1]

    return kernel
