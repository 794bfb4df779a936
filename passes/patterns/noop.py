"""Calls that leave their operand as it is."""

import math

import torch
from torch import fx

from hikui.passes.graph import argument, aten, is_call, same_shape

_ALWAYS = (
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
    aten.clone.default,
)
"""Without mutation in the graph, a copy or an alias is the tensor itself."""

_IF_SAME_TYPE = (
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.to.other,
    aten._to_copy.default,
    aten.type_as.default,
    aten.contiguous.default,
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.expand.default,
    aten.slice.Tensor,
)
_DROPOUTS = (
    aten.dropout.default,
    aten.native_dropout.default,
    aten.feature_dropout.default,
)
ASSERTIONS = (
    aten._assert_tensor_metadata.default,
    aten.sym_constrain_range_for_size.default,
)
"""Calls made for their checks alone."""


def noop_operand(node: fx.Node) -> fx.Node | None:
    """The operand that a call passes on unchanged, for every T; None where it does something."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    operand = node.args[0]
    if not isinstance(operand.meta.get("val"), torch.Tensor) or not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    if is_call(node, *_ALWAYS):
        return operand
    if is_call(node, *_DROPOUTS):
        return operand if argument(node, 2, "train") is False or argument(node, 1, "p") == 0 else None
    if is_call(node, *_IF_SAME_TYPE):
        return operand if same_shape(node, operand) else None
    if _neutral_number(node) and same_shape(node, operand):
        return operand
    return None


def _neutral_number(node: fx.Node) -> bool:
    """Whether a call is x·1 or x/1; x+0 would turn −0 into 0."""
    if not is_call(node, aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar) or len(node.args) < 2:
        return False
    number = node.args[1]
    return isinstance(number, int | float) and math.isclose(number, 1.0, rel_tol=0.0, abs_tol=0.0)


def merged_view(node: fx.Node) -> tuple[fx.node.Argument, ...] | None:
    """The arguments of a view that reads another view: only the outer sizes matter."""
    views = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
    if not is_call(node, *views) or not is_call(node.args[0], *views):
        return None
    return node.args[0].args[0], node.args[1]
