"""A matrix that two matrices of signs stand for: two products in a row, with scales before, between and behind them."""

from dataclasses import dataclass

from torch import Tensor, fx

from hikui.lowering.ir.packed import PackedLinear
from hikui.lowering.ir.program import FACTOR, Program
from hikui.lowering.ir.store import WeightStore

LEFT, RIGHT = "left", "right"
"""What `FACTOR` says of the two products: which of U and Vᵀ they multiply with."""


@dataclass(frozen=True)
class FactoredLinear:
    """y = U·(Vᵀ·(x·s)) + bias, U and V being packed matrices of signs with a scale a row.

    Attributes:
        left: the product with U [n, r], which has the site's name.
        right: the product with Vᵀ [r, k].
        scaled: x·s.
    """

    left: PackedLinear
    right: PackedLinear
    scaled: fx.Node

    @staticmethod
    def of(left: fx.Node) -> "FactoredLinear":
        """Takes the products apart, from the last of them."""
        outer = PackedLinear.of(left)
        inner = PackedLinear.of(outer.source)
        return FactoredLinear(outer, inner, inner.source)

    @property
    def rank(self) -> int:
        return self.right.rows

    @property
    def columns(self) -> fx.Node:
        """The placeholder of s: float32 [k]."""
        scale = self.scaled.args[1]
        assert isinstance(scale, fx.Node), "it multiplies with a stored vector"
        return scale

    def stored(self) -> tuple[fx.Node, ...]:
        """The placeholders of signs and scales."""
        return (*self.left.stored(), *self.right.stored(), self.columns)

    def dense(self, store: WeightStore) -> Tensor:
        """The matrix that the two stand for: float32 [n, k]."""
        return self.left.dense(store) @ (self.right.dense(store) * store.load(Program.weight_of(self.columns)))


def is_left_factor(node: fx.Node) -> bool:
    """Whether a node is the last of the products that stand for a site."""
    return node.meta.get(FACTOR) == LEFT


def is_factor(node: fx.Node) -> bool:
    """Whether a node is one of the products that stand for a site."""
    return FACTOR in node.meta
