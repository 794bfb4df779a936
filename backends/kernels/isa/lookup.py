"""Signs by table look-up, on any NEON: the sum of 4 activations, each added or taken off, is looked up for 16 rows.

A sign byte holds 4 columns in each half. For each four columns there is a table of the 16 sums, v + 512 so that none is
negative, in two registers: its lower 5 bits and the 5 above. 8 look-ups add up in bytes before they are widened.
"""
# TVMScript's annotations are TIR types, which a Python type checker cannot know.
# mypy: disable-error-code="valid-type, no-untyped-def, no-untyped-call, no-any-return, untyped-decorator, misc"

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from hikui.backends.kernels.fields import QUADS
from hikui.backends.kernels.isa import tiled
from hikui.backends.kernels.isa.base import (
    Expression,
    Isa,
    Special,
    constant,
    intrinsic,
    splat,
    unrolled,
    vector,
)
from hikui.backends.kernels.isa.tiled_panel import Panel

_TABLES = 8
"""Tables of a step: for byte j of a quad and half h of its bits, 2j + h."""

_QUADS = 64
"""What the tables of a step take, in quads: 8 tables of two registers."""

_BLOCKS = 2
"""Blocks of 16 output rows that share a table once it is in registers; there are none for more."""

_LONGEST = 128
"""Steps that int16 holds the sums of: 248 each for the lower bits."""


def _looked_up(table: Expression, index: Expression) -> Expression:
    return T.reinterpret(
        "uint8x16", intrinsic("int8x16", "llvm.aarch64.neon.tbl1", table, T.reinterpret("int8x16", index))
    )


def _added(left: Expression, right: Expression) -> Expression:
    """The sum, which stays within a byte. LLVM would put plain additions into an order that needs more registers."""
    return intrinsic("uint8x16", "llvm.uadd.sat", left, right)


def _step(totals: Sequence[Any], line: Callable[..., Expression], quads: Callable[..., Expression]) -> list[Any]:
    lines = [line(block, None, 0) for block in range(len(totals))]
    sums: list[list[Expression]] = [[] for _ in totals]
    for table in range(_TABLES):
        byte, half = divmod(table, 2)
        halves = [T.reinterpret("int8x16", quads(0, 2 * table + i)) for i in range(2)]
        for block, whole in enumerate(lines):
            # LLVM makes one ld4 of the four shuffles.
            codes = tirx.Shuffle([whole], list(range(byte, 64, 4)))
            index = codes >> splat(T.uint8(4), 16) if half else codes & splat(T.uint8(15), 16)
            found = [_looked_up(each, index) for each in halves]
            sums[block] = [_added(*pair) for pair in zip(sums[block], found, strict=True)] if table else found
    return [
        [
            T.reinterpret("int32x4", T.reinterpret("int16x8", held[2 * i + k]) + _widened(of_block[i], k))
            for i in range(2)
            for k in range(2)
        ]
        for held, of_block in zip(totals, sums, strict=True)
    ]


def _widened(values: Expression, half: int) -> Expression:
    return T.cast(tirx.Shuffle([values], list(range(8 * half, 8 * half + 8))), "int16x8")


def _first(steps: Expression) -> list[Expression]:
    """The lower bits start at 0, the upper ones at what takes the 512 of every look-up off."""
    zero, upper = splat(T.int32(0), 4), splat(T.cast(steps * (-512 // 32 * _TABLES), "int16"), 8)
    return [zero, zero, T.reinterpret("int32x4", upper), T.reinterpret("int32x4", upper)]


def _sums(totals: Sequence[Expression]) -> list[Expression]:
    lower, upper = ([T.reinterpret("int16x8", total) for total in totals[i : i + 2]] for i in (0, 2))
    out = []
    for part in range(4):
        lanes = [4 * (part % 2) + i for i in range(4)]
        low, high = (T.cast(tirx.Shuffle([each[part // 2]], lanes), "int32x4") for each in (lower, upper))
        out.append((high << splat(T.int32(5), 4)) + low)
    return out


PANEL = Panel(
    name="tbl look-up",
    kind="sign",
    rows=1,
    parts=4,
    accumulators=4,
    step=_step,
    sums=_sums,
    by_row=lambda values: [values[0]] * 4,
    by_part=list,
    in_rows=list,
    prepared=_QUADS,
    longest=_LONGEST,
    first=_first,
)


def prepare(isa: Isa, name: str) -> Any:
    """Makes the tables: 256 bytes for 32 columns of a row.

    Args:
        isa: of any NEON.
        name: symbol of the C function, a `prepare_kernel`.
    """
    signs = [constant([1 if entry >> i & 1 else -1 for entry in range(16)], "int16") for i in range(4)]

    @T.prim_func(s_tir=True)
    def kernel(
        q_data: T.handle("int8"),
        prepared_data: T.handle("uint8"),
        row_quads: T.int64,
        first: T.int64,
        last: T.int64,
    ):
        T.func_attr({"global_symbol": name, "tirx.noalias": True})
        q = T.decl_buffer((last * row_quads * 4,), "int8", data=q_data)
        prepared = T.decl_buffer((last * row_quads * 32,), "uint8", data=prepared_data)
        table = T.alloc_buffer((16,), "int16", scope="local")
        for step in range(first * (row_quads // QUADS), last * (row_quads // QUADS)):
            for j in unrolled(4):
                for half in unrolled(2):
                    table[T.ramp(0, 1, 16)] = (
                        signs[0] * splat(T.cast(q[step * 32 + half * 16 + j], "int16"), 16)
                        + signs[1] * splat(T.cast(q[step * 32 + half * 16 + 4 + j], "int16"), 16)
                        + signs[2] * splat(T.cast(q[step * 32 + half * 16 + 8 + j], "int16"), 16)
                        + signs[3] * splat(T.cast(q[step * 32 + half * 16 + 12 + j], "int16"), 16)
                        + splat(T.int16(512), 16)
                    )
                    prepared[T.ramp(step * 256 + (j * 2 + half) * 32, 1, 16)] = T.cast(
                        vector(table, 0, 16) & splat(T.int16(31), 16), "uint8x16"
                    )
                    prepared[T.ramp(step * 256 + (j * 2 + half) * 32 + 16, 1, 16)] = T.cast(
                        vector(table, 0, 16) >> splat(T.int16(5), 16), "uint8x16"
                    )

    return kernel


def _build(isa: Isa, kind: str, size: str, symbol: str) -> Any:
    return tiled.integer([PANEL], kind, _BLOCKS, symbol)


SIGN = Special(PANEL.name, _BLOCKS, _build, "sign_tables", prepare, 4 * _QUADS)
"""Products with signs, for any number of rows of activations."""
