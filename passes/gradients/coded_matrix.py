"""Products with a matrix of integer codes, forwards and backwards in integers.

An int8 product of most processors does the work of four float32 ones. What a packed site computes is one already: the
codes of its matrix by those of a token. On the way back the gradient is rounded to int8 too, for the input with a scale
a token and for the matrix with a scale a row, so that either is a product of integers (after Jetfire, arXiv 2403.12422,
and SwitchBack, arXiv 2304.13013, which round in smaller blocks or leave the gradient of the matrix in floats).
"""

from dataclasses import dataclass, field
from functools import cache, reduce
from operator import add
from typing import Any

import torch
from torch import Tensor

from hikui.lowering.formats.activations import TINY

_LARGEST = 127


@dataclass(frozen=True)
class CodedGradient:
    """The gradient for a matrix: Σ of_yᵀ·x, not yet multiplied out, so that texts share one product.

    A gradient for a matrix as large as a model's takes longer to write to memory and to add up than to make.

    Attributes:
        of_y: of each text, float32 [tokens, n]: what reaches y, times the scale of the token.
        x: of each text, int8 [tokens, k].
    """

    of_y: tuple[Tensor, ...]
    x: tuple[Tensor, ...]

    def __add__(self, other: "CodedGradient") -> "CodedGradient":
        return CodedGradient(self.of_y + other.of_y, self.x + other.x)

    def multiplied(self) -> Tensor:
        """The gradient for ŵ, what reaches y rounded to int8 with a scale a row: float32 [n, k]."""
        rounded, step = _rounded(torch.cat(self.of_y), 0)
        return integer_product(rounded.t(), torch.cat(self.x)).float().mul_(step.t())


@dataclass(frozen=True)
class CodedMatrix:
    """ŵ = codes · scale, one scale a row.

    Attributes:
        codes: int8 [n, k].
        scale: float32 [n].
        leaf: what gradients are taken of in the place of ŵ. None for none.
    """

    codes: Tensor
    scale: Tensor
    leaf: "CodedLeaf | None" = None

    def as_leaf(self) -> "CodedMatrix":
        """The same, with something that gradients can be taken of."""
        return CodedMatrix(self.codes, self.scale, CodedLeaf())

    def dense(self) -> Tensor:
        """ŵ: float32 [n, k]."""
        return self.codes * self.scale.unsqueeze(1)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x̂·ŵᵀ + bias, where x̂ is x, float32 [..., k], rounded to int8 with a scale a token, straight through."""
        leaf, stand_in = self.leaf, None if self.leaf is None else self.leaf.stand_in
        y: Tensor = _Product.apply(x, stand_in, self.codes, self.scale, leaf)  # type: ignore[no-untyped-call]
        return y if bias is None else y + bias


@dataclass(frozen=True)
class CodedLeaf:
    """Where the way back leaves the gradient for a matrix.

    Attributes:
        stand_in: float32 [], what torch takes for the leaf; its gradient says nothing.
        found: of each product, on the way back.
    """

    stand_in: Tensor = field(default_factory=lambda: torch.zeros(()).requires_grad_())
    found: list[CodedGradient] = field(default_factory=list)

    def gradient(self) -> CodedGradient:
        """The sum of what was found."""
        return reduce(add, self.found)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, stand_in: Tensor | None, codes: Tensor, scale: Tensor, leaf: CodedLeaf | None
    ) -> Tensor:
        x_codes, x_scale = _rounded(x.flatten(0, -2), 1)
        ctx.save_for_backward(x_codes, x_scale, codes, scale)
        ctx.leaf = leaf
        y = integer_product(x_codes, codes.t()).float().mul_(x_scale).mul_(scale)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, of_y: Tensor) -> tuple[Tensor | None, ...]:
        x_codes, x_scale, codes, scale = ctx.saved_tensors
        rows, of_x, of_stand_in = of_y.flatten(0, -2), None, None
        if ctx.needs_input_grad[0]:
            found, step = _rounded(rows * scale, 1)
            of_x = integer_product(found, codes).float().mul_(step).view(*of_y.shape[:-1], -1)
        if ctx.needs_input_grad[1]:
            ctx.leaf.found.append(CodedGradient((rows * x_scale,), (x_codes,)))
            of_stand_in = torch.zeros(())
        return of_x, of_stand_in, None, None, None


def _rounded(matrix: Tensor, along: int) -> tuple[Tensor, Tensor]:
    """Each row (along 1) or column (along 0) in int8, its own scale over it; rows as `quantize_activation` does."""
    largest = torch.maximum(matrix.amax(along, keepdim=True), -matrix.amin(along, keepdim=True))
    inverse = torch.where(largest > TINY, _LARGEST / largest, 0.0)
    return (matrix * inverse).round_().to(torch.int8), largest / _LARGEST


def integer_product(a: Tensor, b: Tensor) -> Tensor:
    """The product of int8 matrices: int32, or where the processor's own would saturate float32, exact up to 2²⁴.

    Args:
        a: int8 [m, k].
        b: int8 [k, n].
    """
    if _is_exact():
        return torch._int_mm(a, b)
    return a.float() @ b.float()


@cache
def _is_exact() -> bool:
    """Whether int8 products are right where they are largest: without VNNI, libraries add pairs in sixteen bits."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (2, 128, 128), generator=generator, dtype=torch.int8) * 2 - 1
    for a in (signs[0] * 127, torch.full((128, 128), 127, dtype=torch.int8)):
        for b in (signs[1] * 127, torch.full((128, 128), 127, dtype=torch.int8)):
            if not torch.equal(torch._int_mm(a, b), a.int() @ b.int()):
                return False
    return True
