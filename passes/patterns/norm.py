"""Root-mean-square norms: weight · (x · rsqrt(mean(x²) + eps))."""

from dataclasses import dataclass

from torch import fx

from hikui.passes.graph import argument, aten, is_call, is_weight, shape
from hikui.passes.patterns.match import NoMatch

ANCHORS = (
    aten.rsqrt.default,
    aten.layer_norm.default,
    aten.rms_norm.default,
    aten.native_layer_norm.default,
)
"""The calls by which a norm is found."""


@dataclass(frozen=True)
class RmsNormMatch:
    """An RMS norm.

    Attributes:
        x: what is normed, [..., K].
        weight: the scale's placeholder, [K].
        eps: added to the mean square.
        output: the node that the norm ends with.
    """

    x: fx.Node
    weight: fx.Node
    eps: float
    output: fx.Node


def match_rms_norm(anchor: fx.Node) -> RmsNormMatch | NoMatch:
    """Recognises the norm around an `rsqrt` (in the casts-removed form), or one that is already `aten.rms_norm`."""
    if is_call(anchor, aten.rms_norm.default):
        return _match_whole(anchor)
    if is_call(anchor, aten.layer_norm.default, aten.native_layer_norm.default):
        return NoMatch(
            "a layer norm subtracts the mean, which hikui::rms_norm does not; it stays as it is", anchor.name
        )
    if not is_call(anchor, aten.rsqrt.default):
        return NoMatch(f"{anchor.target} is no root-mean-square norm", anchor.name)
    found = _match_mean_square(anchor)
    if isinstance(found, NoMatch):
        return found
    x, eps = found
    normed = [user for user in anchor.users if is_call(user, aten.mul.Tensor) and set(user.args) == {x, anchor}]
    if len(normed) != 1:
        return NoMatch(
            f"{anchor.name} does not multiply {x.name}, whose mean square it is made of",
            anchor.name,
        )
    scaled = [user for user in normed[0].users if is_call(user, aten.mul.Tensor)]
    if len(normed[0].users) != 1 or len(scaled) != 1:
        return NoMatch(f"{normed[0].name} is not multiplied by one weight", normed[0].name)
    (weight,) = {arg for arg in scaled[0].args if arg is not normed[0]} or {None}
    return _finish(x, weight, eps, scaled[0])


def _match_whole(node: fx.Node) -> RmsNormMatch | NoMatch:
    x, sizes, eps = node.args[0], node.args[1], argument(node, 3, "eps")
    assert isinstance(x, fx.Node)
    if not isinstance(sizes, tuple | list) or len(sizes) != 1 or not isinstance(eps, float):
        return NoMatch("it norms over more than the last dimension, or states no eps", node.name)
    return _finish(x, argument(node, 2, "weight"), eps, node)


def _match_mean_square(rsqrt: fx.Node) -> tuple[fx.Node, float] | NoMatch:
    total = rsqrt.args[0]
    if not is_call(total, aten.add.Tensor, aten.add.Scalar) or not isinstance(total.args[1], float):
        return NoMatch("no eps is added under the root", rsqrt.name)
    mean = total.args[0]
    if not is_call(mean, aten.mean.dim) or mean.args[1] != [-1] or argument(mean, 2, "keepdim") is not True:
        return NoMatch("what stands under the root is no mean over the last dimension", total.name)
    x = _squared(mean.args[0])
    if x is None:
        return NoMatch("the mean is not taken of squares", mean.name)
    return x, total.args[1]


def _squared(node: object) -> fx.Node | None:
    """What is squared, however the square is written."""
    squares = (
        (is_call(node, aten.pow.Tensor_Scalar) and node.args[1] == 2)
        or is_call(node, aten.square.default)
        or (is_call(node, aten.mul.Tensor) and node.args[0] is node.args[1])
    )
    if not squares:
        return None
    assert isinstance(node, fx.Node)
    return node.all_input_nodes[0]


def _finish(x: fx.Node, weight: object, eps: float, output: fx.Node) -> RmsNormMatch | NoMatch:
    if not is_weight(weight):
        made_by = getattr(weight, "target", weight)
        return NoMatch(f"the norm's scale is {made_by}, not a stored weight", output.name)
    if shape(weight) != (shape(x)[-1],):
        return NoMatch(
            f"the norm's scale has shape {shape(weight)}, not one value a column",
            output.name,
        )
    return RmsNormMatch(x, weight, eps, output)
