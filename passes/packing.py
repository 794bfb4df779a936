"""Puts a packed matrix in the place of a float linear; `rtn` and `pack` differ only in how the values come about."""

import torch
from torch import Tensor, fx

from hikui.lowering.errors import HikuiError
from hikui.lowering.formats import Format, Packed
from hikui.lowering.program import FORMAT, SITE, Program
from hikui.passes.graph import (
    FLOAT_WEIGHT,
    aten,
    hikui,
    insert,
    is_call,
    is_weight,
    keep_site,
    replace,
)


def load_finite(program: Program, weight: fx.Node, site: str) -> Tensor:
    """A float32 matrix of the store.

    Raises:
        HikuiError: it holds NaN or infinite values.
    """
    tensor = program.store.load(program.weight_of(weight)).float()
    bad = int(tensor.numel() - tensor.isfinite().sum())
    if bad:
        raise HikuiError(
            f"Site {site}: {bad} of {tensor.numel()} values of '{program.weight_of(weight)}' are NaN or infinite; "
            "mend or replace the checkpoint."
        )
    return tensor


def replace_with_packed(program: Program, node: fx.Node, fmt: Format, packed: Packed) -> fx.Node:
    """Rewrites `aten.linear` into `hikui::linear` with a packed weight; the float weight stays until dead code goes."""
    weight = node.args[1]
    assert is_weight(weight)
    stored = program.weight_of(weight)
    key = f"{stored}.{fmt}"
    held = _stored(program, key, packed.weight)
    scale = None if packed.scale is None else _stored(program, f"{key}.scale", packed.scale)
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    n = int(weight.meta["val"].shape[0])
    linear = insert(
        program,
        node,
        hikui.linear.default,
        (node.args[0], held, scale, bias, str(fmt), n),
        node,
    )
    node.meta[FLOAT_WEIGHT] = stored
    if SITE in node.meta:
        node.meta[FORMAT] = str(fmt)
    keep_site(node, linear)
    replace(node, linear)
    return linear


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
