"""A low-rank branch beside a quantised site: linear_a8(…) + B(A x)."""

from dataclasses import dataclass

from torch import fx

from hikui.lowering.ir.packed import PackedLinear
from hikui.passes.graph import aten, hikui, is_call, is_weight
from hikui.passes.patterns.match import NoMatch

QUANTISERS = (
    hikui.quantize_activation.default,
    hikui.quantize_activation_int4.default,
    hikui.quantize_activation_static.default,
)
"""The calls that quantise an activation and do nothing else."""


@dataclass(frozen=True)
class BranchMatch:
    """A site and its branch.

    Attributes:
        main: the `linear_a8` node.
        x: what the branch reads; the site reads its quantised form.
        down, up: the products with A [rank, K] and B [N, rank].
        output: the sum.
    """

    main: fx.Node
    x: fx.Node
    down: fx.Node
    up: fx.Node
    output: fx.Node


def match_branch(node: fx.Node) -> BranchMatch | NoMatch | None:
    """Recognises a sum of a quantised site and two float products in a row; None where the sum is of something else."""
    if not is_call(node, aten.add.Tensor) or len(node.args) != 2 or node.kwargs.get("alpha", 1) != 1:
        return None
    main, up = node.args
    if not is_call(main, hikui.linear_a8.default):
        main, up = up, main
    if not is_call(main, hikui.linear_a8.default) or not _is_factor(up):
        return None
    assert isinstance(up, fx.Node)
    down = up.args[0]
    if not _is_factor(down):
        return NoMatch(f"{up.name} does not read a product with another stored factor", node.name)
    assert isinstance(down, fx.Node)
    x = down.args[0]
    assert isinstance(x, fx.Node)
    if len(main.users) != 1 or len(up.users) != 1 or len(down.users) != 1:
        return NoMatch("the site or a factor of its branch is read elsewhere too", node.name)
    if quantised_source(main) is not x:
        return NoMatch(
            f"the branch reads {x.name}, the site the quantised form of something else",
            node.name,
        )
    return BranchMatch(main, x, down, up, node)


def quantised_source(main: fx.Node) -> fx.Node | None:
    """The float activation whose quantised form a `linear_a8` reads."""
    q = main.args[0]
    quantiser = q.args[0] if isinstance(q, fx.Node) else None
    if is_call(quantiser, *QUANTISERS):
        source = quantiser.args[0]
        return source if isinstance(source, fx.Node) else None
    if is_call(quantiser, hikui.rms_norm_quantize.default, hikui.swiglu_quantize.default):
        for user in quantiser.users:
            if user.args[1] == 0:
                return user
    return None


def _is_factor(node: object) -> bool:
    """A float product with a stored matrix and without a bias, packed as float16 or not packed."""
    if is_call(node, aten.linear.default):
        return is_weight(node.args[1]) and len(node.args) == 2
    if not is_call(node, hikui.linear.default):
        return False
    packed = PackedLinear.of(node)
    return packed.bias is None and packed.format.kind == "float16"
