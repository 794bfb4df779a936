"""Activations of several rows side by side, for products that read them by broadcast."""
# TVMScript's annotations are TIR types, which a Python type checker cannot know.
# mypy: disable-error-code="valid-type, no-untyped-def, no-untyped-call, no-any-return, untyped-decorator, misc"

from typing import Any

from tvm.script import tirx as T

from hikui.backends.kernels.fields import QUADS
from hikui.backends.kernels.isa.base import Isa, Special, Tile


def panel(rows: int, name: str) -> Any:
    """Activations of `rows` rows side by side, quad by quad, a `prepare_kernel`; the last rows may be missing.

    Rows that lie a power of two apart would share a few sets of the cache, and be fetched over and over.
    """

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
        prepared = T.decl_buffer(((last + (rows - 1)) // rows * rows * row_quads,), "int32", data=prepared_data)
        for row in range(first, last):
            for quad in range(row_quads):
                prepared[row // rows * rows * row_quads + quad * rows + row % rows] = q[row * row_quads + quad]

    return kernel


def with_panel(name: str, tile: Tile) -> Special:
    """The product over activations that lie side by side."""

    def build(isa: Isa, kind: str, size: str, symbol: str) -> Any:
        # The instruction sets, which call this function, are read before the kernels can be.
        from hikui.backends.kernels.linear import integer

        return integer(isa, kind, size, symbol, panel=True)

    def prepare(isa: Isa, symbol: str) -> Any:
        return panel(tile.rows, symbol)

    return Special(name, tile.blocks, build, f"panel_{tile.rows}", prepare, 4 * QUADS)
