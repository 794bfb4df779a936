"""Matrix products with a stored weight, in the forms that models write them."""

from dataclasses import dataclass

from torch import fx

from hikui.passes.graph import argument, aten, is_call, is_weight
from hikui.passes.patterns.match import NoMatch

MATMULS = (
    aten.linear.default,
    aten.addmm.default,
    aten.mm.default,
    aten.matmul.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.einsum.default,
    aten.conv1d.default,
)
"""Every call that multiplies matrices; `explain` reports those that are not sites."""

_TRANSPOSES = (
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
    aten.numpy_T.default,
)


@dataclass(frozen=True)
class LinearMatch:
    """A product x · weightᵀ + bias.

    Attributes:
        x: the activation, [..., K].
        weight: the weight placeholder.
        transposed: whether the placeholder holds [K, N] rather than [N, K].
        bias: the bias node, or None.
    """

    x: fx.Node
    weight: fx.Node
    transposed: bool
    bias: fx.Node | None


def match_linear(node: fx.Node) -> LinearMatch | NoMatch:
    """Recognises `linear`, and `addmm`, `mm`, `matmul` whose right operand is a weight, transposed or not."""
    if is_call(node, aten.linear.default):
        return _finish(
            node,
            node.args[0],
            node.args[1],
            argument(node, 2, "bias"),
            transposed=False,
        )
    if is_call(node, aten.mm.default, aten.matmul.default):
        return _finish(node, node.args[0], node.args[1], None, transposed=True)
    if is_call(node, aten.addmm.default):
        if node.kwargs.get("beta", 1) != 1 or node.kwargs.get("alpha", 1) != 1:
            return NoMatch("addmm scales its operands (alpha or beta is not 1)", node.name)
        return _finish(node, node.args[1], node.args[2], node.args[0], transposed=True)
    factors = [operand for operand in node.all_input_nodes if is_weight(operand)]
    if is_call(node, aten.bmm.default, aten.baddbmm.default) and node.args[-1] not in factors:
        return NoMatch("both of its operands are activations", node.name)
    return NoMatch(f"{node.target} is not a form of a linear layer", node.name)


def _finish(node: fx.Node, x: object, weight: object, bias: object, *, transposed: bool) -> LinearMatch | NoMatch:
    while is_call(weight, *_TRANSPOSES) and weight.meta["val"].dim() == 2 and _swaps(weight):
        weight, transposed = weight.args[0], not transposed
    if not isinstance(weight, fx.Node) or not isinstance(x, fx.Node):
        return NoMatch("an operand is not a tensor of the graph", node.name)
    if not is_weight(weight):
        if not is_weight(x) and x.op == "call_function" and not _all_weights(weight):
            return NoMatch("both of its operands are activations", node.name)
        made_by = weight.target if weight.op == "call_function" else weight.op
        return NoMatch(
            f"its right operand {weight.name} is made by {made_by}, not a stored weight",
            node.name,
        )
    if weight.meta["val"].dim() != 2:
        return NoMatch(
            f"its weight {weight.name} has {weight.meta['val'].dim()} dimensions, not 2",
            node.name,
        )
    if bias is not None and not isinstance(bias, fx.Node):
        return NoMatch("its bias is not a tensor of the graph", node.name)
    if isinstance(bias, fx.Node) and (not is_weight(bias) or bias.meta["val"].dim() != 1):
        return NoMatch(f"its bias {bias.name} is not a stored vector", node.name)
    return LinearMatch(x, weight, transposed, bias)


def _all_weights(node: fx.Node) -> bool:
    """Whether a node is made of stored weights alone."""
    seen, todo = {node}, [node]
    while todo:
        for operand in todo.pop().all_input_nodes:
            if operand not in seen:
                seen.add(operand)
                todo.append(operand)
    return all(is_weight(found) for found in seen if found.op == "placeholder")


def _swaps(node: fx.Node) -> bool:
    """Whether a transposing call on a matrix swaps its two dimensions (and does not leave them as they are)."""
    if is_call(node, aten.transpose.int):
        first, second = node.args[1:3]
        assert isinstance(first, int) and isinstance(second, int)
        return first % 2 != second % 2
    if is_call(node, aten.permute.default):
        order = node.args[1]
        assert isinstance(order, tuple | list)
        return [int(axis) % 2 for axis in order if isinstance(axis, int)] == [1, 0]
    return True
