"""Calls that pass a factor for each channel on from an operand to their result, and where each channel then lies."""

import operator
from typing import Any

import torch
from torch import fx

from hikui.lowering.ir.program import Program
from hikui.passes.graph import aten, hikui, is_call, same_shape

_VIEWS = (
    aten.reshape.default,
    aten.view.default,
    aten.transpose.int,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.expand.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.repeat_interleave.self_int,
    operator.getitem,
)
"""Calls that only move values about; they can be done to the channels' numbers as to the values."""

_MIXERS: dict[object, int] = {
    aten.scaled_dot_product_attention.default: 2,
    aten.bmm.default: 1,
    aten.matmul.default: 1,
    hikui.cache_update.default: 1,
}
"""Calls that mix rows (dimension −2) of one operand and leave its columns apart: the position of that operand."""

_TOKENS = 3
"""How many tokens channels are followed for; any number would do."""


def carriers(node: fx.Node) -> tuple[fx.Node, ...]:
    """The operands, any one of which may be scaled by a positive factor a channel with the result scaled alike."""
    if is_call(node, *_VIEWS, aten.relu.default):
        operands: tuple[object, ...] = node.args[:1]
    elif mixes_rows(node):
        operands = (node.args[_MIXERS[node.target]],)
    elif is_call(node, aten.mul.Tensor, aten.mul.Scalar):
        operands = node.args[:2]
    elif is_call(node, aten.div.Tensor, aten.div.Scalar):
        operands = node.args[:1]
    else:
        return ()
    found = [operand for operand in operands if isinstance(operand, fx.Node) and operand.op == "call_function"]
    if is_call(node, aten.mul.Tensor, aten.div.Tensor):
        # A factor for each channel must not meet a broadcast along the channels.
        found = [operand for operand in found if same_shape(operand, node)]
    return tuple(found)


def is_cache(node: fx.Node) -> bool:
    """Whether a node is a cache, which the program returns only to be given it again."""
    return is_call(node, hikui.cache_update.default)


def is_view(node: fx.Node) -> bool:
    """Whether a call only moves values about."""
    return is_call(node, *_VIEWS)


def mixes_rows(node: fx.Node) -> bool:
    """Whether a call mixes rows of the operand that it carries and treats all columns alike."""
    return node.op == "call_function" and node.target in _MIXERS


class Labels:
    """The numbers of a producer's channels, sent through the calls that follow it.

    Args:
        program: whose calls they are.
    """

    def __init__(self, program: Program) -> None:
        length = program.input_nodes()[0].meta["val"].shape[1]
        self._symbol = length.node.expr if isinstance(length, torch.SymInt) else None
        self._held: dict[fx.Node, Any] = {}

    def __getitem__(self, node: fx.Node) -> Any:
        """Of a call that gives one tensor: int32, of its shape for some number of tokens."""
        return self._held[node]

    def start(self, producer: fx.Node) -> None:
        """Numbers the channels, the last dimension, of a producer."""
        shape = self._shape(producer)
        self._held[producer] = torch.arange(shape[-1], dtype=torch.int32).expand(shape)

    def follow(self, node: fx.Node) -> None:
        """Numbers the values of a call by those of the one operand that is numbered already."""
        if is_view(node):
            args: Any = (node.args, node.kwargs)
            args, kwargs = fx.node.map_arg(args, self._operand)
            assert callable(node.target)
            self._held[node] = node.target(*args, **kwargs)
            return
        (source,) = {operand for operand in carriers(node) if operand in self._held}
        held = self._held[source]
        if mixes_rows(node):
            shape = self._shape(node)
            # Whichever row a column's values come from, they must be of one channel; −1 is none.
            rows = torch.where(held.amin(-2, keepdim=True) == held.amax(-2, keepdim=True), held[..., :1, :], -1)
            if len(shape) == 4 and rows.shape[1] != shape[1]:
                rows = rows.repeat_interleave(shape[1] // rows.shape[1], 1)
            held = rows.expand(shape)
        self._held[node] = held

    def _operand(self, node: fx.Node) -> Any:
        return self._held[node] if node in self._held else self._number(node.meta["val"])

    def _number(self, value: Any) -> Any:
        if isinstance(value, torch.SymInt):
            return int(value.node.expr.subs(self._symbol, _TOKENS)) if self._symbol is not None else int(value)
        return value

    def _shape(self, node: fx.Node) -> tuple[int, ...]:
        return tuple(self._number(size) for size in node.meta["val"].shape)
