"""Activations of several rows side by side, so that a tile of narrow registers reads them from one address."""
# TVMScript's annotations are TIR types, which a Python type checker cannot know.
# mypy: disable-error-code="valid-type, no-untyped-def, no-untyped-call, no-any-return, untyped-decorator, misc"

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T

from hikui.backends.kernels.fields import QUADS
from hikui.backends.kernels.isa.base import intrinsic, unrolled, vector

_LANES = 4

STEP = 9
"""What a row of activations takes of a prepared step, in quads: its own 8 and a sum."""

PREPARED_BYTES = 4 * STEP
"""Bytes of prepared activations for 32 columns of a row; the dispatcher gives room for whole tiles."""


def prepare(rows: int, place: Callable[[int], tuple[int, int]], name: str) -> Any:
    """Activations of `rows` rows side by side, so that a tile reads them from one address.

    A step of a tile is rows · 8 quads, then for each row the sum of its activations from the first column on.

    Args:
        rows: of a tile. Tiles are stored one after the other, each whole, though the last may lack rows.
        place: where quad f of a step of the first row goes, and how far further that of the next row, in quads.
        name: symbol of the C function, a `prepare_kernel`.
    """

    def sum_of(q, start):
        halves = [T.reinterpret("int8x16", vector(q, start + half * _LANES, _LANES)) for half in range(2)]
        pairs = [intrinsic("int16x8", "llvm.aarch64.neon.saddlp", half) for half in halves]
        fours = intrinsic("int32x4", "llvm.aarch64.neon.saddlp", pairs[0] + pairs[1])
        return intrinsic("int32", "llvm.vector.reduce.add", fours)

    @T.prim_func(s_tir=True)
    def kernel(
        q_data: T.handle("int32"),
        prepared_data: T.handle("int32"),
        row_quads: T.int64,
        first: T.int64,
        last: T.int64,
    ):
        T.func_attr({"global_symbol": name, "tirx.noalias": True})
        q = T.decl_buffer((last * row_quads,), "int32", data=q_data)
        prepared = T.decl_buffer(((last + (rows - 1)) * row_quads // QUADS * STEP,), "int32", data=prepared_data)
        before = T.alloc_buffer((1,), "int32", scope="local")
        for row in range(first, last):
            before[0] = 0
            for step in range(row_quads // QUADS):
                here = row // rows * (rows * row_quads // QUADS * STEP) + step * (rows * STEP)
                before[0] = before[0] + sum_of(q, row * row_quads + step * QUADS)
                for f in unrolled(QUADS):
                    prepared[here + (place(f)[0] + row % rows * place(f)[1])] = q[row * row_quads + step * QUADS + f]
                prepared[here + (rows * QUADS + row % rows)] = before[0]

    return kernel
