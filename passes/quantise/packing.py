"""Puts a packed matrix in the place of a float linear; `rtn` and `pack` differ only in how the values come about."""

from collections.abc import Callable

import torch
from torch import Tensor, fx

from hikui.lowering.engine.workers import Workers
from hikui.lowering.formats import ROWS, Format, Packed
from hikui.lowering.ir.program import FLOAT_WEIGHT, FORMAT, SITE, Program
from hikui.lowering.memory import give_back
from hikui.passes.graph import (
    aten,
    hikui,
    insert,
    is_call,
    is_weight,
    keep_site,
    replace,
)
from hikui.passes.matrices import load_finite, row_parts
from hikui.passes.quantise.underflow import refuse_underflow


def pack_by_rows(
    program: Program,
    weight: fx.Node,
    site: str,
    fmt: Format,
    pack_rows: Callable[[Tensor], Packed],
    workers: Workers | None = None,
    instead: Tensor | None = None,
    times: int = 1,
) -> Packed:
    """Packs a stored matrix a part at a time.

    Args:
        program: the program that holds it.
        weight: its placeholder.
        site: for error sentences.
        fmt: the format.
        pack_rows: packs some whole rows.
        workers: do the parts; by default they are done one after the other.
        instead: float32 [n, k], what to pack in the stored matrix's place.
        times: how many of the usual parts are packed at once.

    Raises:
        HikuiError: it holds NaN or infinite values.
    """
    n, k = map(int, weight.meta["val"].shape)
    scale_shape = fmt.scale_shape(n, k)
    packed = torch.empty(fmt.weight_shape(n, k), dtype=fmt.weight_dtype)
    scale = None if scale_shape is None else torch.empty(scale_shape, dtype=torch.float16)

    def fill(rows: slice) -> None:
        part = pack_rows(load_finite(program, weight, site, rows) if instead is None else instead[rows])
        blocks = slice(rows.start // ROWS, -(-rows.stop // ROWS))
        packed[blocks] = part.weight
        if scale is not None and part.scale is not None:
            scale[blocks] = part.scale

    (workers or Workers(1)).each(fill, row_parts(n, k, times))
    return Packed(packed, scale)


def replace_with_packed(
    program: Program, node: fx.Node, fmt: Format, packed: Packed, x: fx.Node | None = None
) -> fx.Node:
    """Rewrites `aten.linear` into `hikui::linear` with a packed weight; the float weight stays until dead code goes.

    Args:
        program: the program.
        node: the float linear.
        fmt: the format.
        packed: the matrix.
        x: what the new node reads, if it is not what the old one read.

    Raises:
        HikuiError: float16 is too coarse for its scales or values.
    """
    weight = node.args[1]
    assert is_weight(weight)
    stored = program.weight_of(weight)
    key = f"{stored}.{fmt}"
    held, scale = store_packed(program, key, packed)
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    n = int(weight.meta["val"].shape[0])
    linear = insert(
        program,
        node,
        hikui.linear.default,
        (node.args[0] if x is None else x, held, scale, bias, str(fmt), n),
        node,
    )
    node.meta[FLOAT_WEIGHT] = stored
    if SITE in node.meta:
        node.meta[FORMAT] = str(fmt)
    keep_site(node, linear)
    refuse_underflow(program, linear, stored, str(node.meta.get(SITE, stored)))
    replace(node, linear)
    # A site's matrices leave holes in the heap: of a 7B model's 225, 2 GB that nothing else fits into.
    give_back()
    return linear


def store_packed(program: Program, key: str, packed: Packed) -> tuple[fx.Node, fx.Node | None]:
    """Stores a packed matrix under a key that says of which matrix and in which format; its placeholders."""
    weight = _stored(program, key, packed.weight)
    return weight, None if packed.scale is None else _stored(program, f"{key}.scale", packed.scale)


def _stored(program: Program, key: str, tensor: Tensor) -> fx.Node:
    """The placeholder of a new tensor; a name already taken by other contents (a weight read twice) gets a number."""
    unique, number = key, 2
    while unique in program.store:
        if torch.equal(program.store.load(unique), tensor):
            for node in program.weight_nodes():
                if program.weight_of(node) == unique:
                    return node
            return program.add_placeholder(unique)
        unique, number = f"{key}#{number}", number + 1
    return program.add_weight(unique, tensor)


def float_linears(program: Program) -> list[fx.Node]:
    """Every `aten.linear` with a stored matrix, site or not (the factors of a branch are none)."""
    return [node for node in program.graph.nodes if is_call(node, aten.linear.default) and is_weight(node.args[1])]
