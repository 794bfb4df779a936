"""What the output of a site is added to on its way to the next block."""

from typing import NamedTuple

from torch import fx

from hikui.passes.graph import aten, is_call, is_weight, same_shape, same_size, shape


class Term(NamedTuple):
    """Something that a site's output is added to.

    Attributes:
        node: the other term.
        factor: what the site's output has been multiplied with where the two meet.
    """

    node: fx.Node
    factor: float


def added_to(site: fx.Node) -> list[Term]:
    """The other terms of the sums that a site's output goes into, and into nothing else, nearest first.

    Views, and factors that are plain numbers other than zero, may lie between.
    """
    found: list[Term] = []
    node, factor = site, 1.0
    while len(node.users) == 1:
        (user,) = node.users
        if is_call(user, aten.add.Tensor) and not user.kwargs and len(user.args) == 2:
            other = user.args[1] if user.args[0] is node else user.args[0]
            if not isinstance(other, fx.Node) or other is node or is_weight(other) or not same_shape(other, user):
                break
            found.append(Term(other, factor))
        elif is_call(user, aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar):
            by = user.args[1]
            if not isinstance(by, int | float) or not by:
                break
            factor = factor * by if is_call(user, aten.mul.Tensor, aten.mul.Scalar) else factor / by
        elif is_call(user, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim):
            if not same_size(shape(user)[-1], shape(node)[-1]):
                break
        else:
            break
        node = user
    return found
