"""Functions in TIR for what has no kernel of its own, in programs that were not fused or not quantised.

The token count stays symbolic. Sums run over neighbouring values and LLVM may reassociate them (see `backend.py`), so
they use whole vectors.
"""

from functools import cache
from typing import Any

from tvm import tirx
from tvm.script import tirx as T


def _extents(*values: int) -> list[Any]:
    """Constants of the type that Relax gives to shapes; buffers of another type cannot be fused."""
    return [tirx.const(value, "int64") for value in values]


@cache
def dense(n: int, k: int) -> tirx.PrimFunc:
    """y[m, n] = Σ x[m, k]·weight[n, k] in float32, with M symbolic.

    Threads share the rows of the weight, and each row serves every token while it is in cache.
    """
    rows, columns = _extents(n, k)

    @T.prim_func(private=True, s_tir=True)  # type: ignore[untyped-decorator]
    def function(x_handle: T.handle, weight_handle: T.handle, y_handle: T.handle):  # type: ignore[no-untyped-def]
        T.func_attr({"tirx.noalias": True})
        m = T.int64()
        x = T.match_buffer(x_handle, (m, columns), "float32")
        weight = T.match_buffer(weight_handle, (rows, columns), "float32")
        y = T.match_buffer(y_handle, (m, rows), "float32")
        for j in T.parallel(rows):
            for i, c in T.grid(m, columns):
                with T.sblock("product"):
                    vj, vi, vc = T.axis.remap("SSR", [j, i, c])
                    with T.init():
                        y[vi, vj] = T.float32(0)
                    y[vi, vj] += x[vi, vc] * weight[vj, vc]

    return function


@cache
def cache_update(heads: int, context: int, size: int) -> tirx.PrimFunc:
    """Writes new [1, heads, T, size] into rows past…past+T−1 of a cache [1, heads, context, size], in place."""
    one, h_, c_, d_ = _extents(1, heads, context, size)

    @T.prim_func(private=True, s_tir=True)  # type: ignore[untyped-decorator]
    def function(cache_handle: T.handle, new_handle: T.handle, past_handle: T.handle):  # type: ignore[no-untyped-def]
        T.func_attr({"tirx.noalias": True})
        tokens = T.int64()
        cache = T.match_buffer(cache_handle, (one, h_, c_, d_), "float32")
        new = T.match_buffer(new_handle, (one, h_, tokens, d_), "float32")
        past = T.match_buffer(past_handle, (one,), "int64")
        for h, t, d in T.grid(h_, tokens, d_):
            with T.sblock("write"):
                vh, vt, vd = T.axis.remap("SSS", [h, t, d])
                cache[0, vh, past[0] + vt, vd] = new[0, vh, vt, vd]

    return function


@cache
def attention_scores(heads: int, kv_heads: int, context: int, size: int, scale: float) -> tirx.PrimFunc:
    """Scores [1, heads, T, context] = scale · q·kᵀ, for q [1, heads, T, size] and k [1, kv_heads, context, size]."""
    share = heads // kv_heads
    one, h_, kv_, c_, d_ = _extents(1, heads, kv_heads, context, size)

    @T.prim_func(private=True, s_tir=True)  # type: ignore[untyped-decorator]
    def function(q_handle: T.handle, k_handle: T.handle, scores_handle: T.handle):  # type: ignore[no-untyped-def]
        T.func_attr({"tirx.noalias": True})
        tokens = T.int64()
        q = T.match_buffer(q_handle, (one, h_, tokens, d_), "float32")
        k = T.match_buffer(k_handle, (one, kv_, c_, d_), "float32")
        scores = T.match_buffer(scores_handle, (one, h_, tokens, c_), "float32")
        for h in T.parallel(h_):
            for t, c, d in T.grid(tokens, c_, d_):
                with T.sblock("product"):
                    vh, vt, vc, vd = T.axis.remap("SSSR", [h, t, c, d])
                    with T.init():
                        scores[0, vh, vt, vc] = T.float32(0)
                    scores[0, vh, vt, vc] += T.float32(scale) * q[0, vh, vt, vd] * k[0, vh // share, vc, vd]

    return function


@cache
def attention_values(heads: int, kv_heads: int, context: int, size: int) -> tirx.PrimFunc:
    """Sums [1, heads, T, size] = p·v, for p [1, heads, T, context] and v [1, kv_heads, context, size]."""
    share = heads // kv_heads
    one, h_, kv_, c_, d_ = _extents(1, heads, kv_heads, context, size)

    @T.prim_func(private=True, s_tir=True)  # type: ignore[untyped-decorator]
    def function(p_handle: T.handle, v_handle: T.handle, out_handle: T.handle):  # type: ignore[no-untyped-def]
        T.func_attr({"tirx.noalias": True})
        tokens = T.int64()
        p = T.match_buffer(p_handle, (one, h_, tokens, c_), "float32")
        v = T.match_buffer(v_handle, (one, kv_, c_, d_), "float32")
        out = T.match_buffer(out_handle, (one, h_, tokens, d_), "float32")
        for h in T.parallel(h_):
            for t, c, d in T.grid(tokens, c_, d_):
                with T.sblock("product"):
                    vh, vt, vc, vd = T.axis.remap("SSRS", [h, t, c, d])
                    with T.init():
                        out[0, vh, vt, vd] = T.float32(0)
                    out[0, vh, vt, vd] += p[0, vh, vt, vc] * v[0, vh // share, vc, vd]

    return function
