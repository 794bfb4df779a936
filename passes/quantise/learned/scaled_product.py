"""A product with an integer matrix whose scales gradients reach; as floats it is kept from a call to its gradient."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from hikui.lowering.formats import quantize_activation, unpack_codes, unpack_scale
from hikui.lowering.ir.packed import PackedLinear
from hikui.lowering.ir.program import Program
from hikui.passes.gradients.block_training import Product


class ScaledProduct:
    """y = x̂·(codes ∘ scale)ᵀ + bias, as the packed site computes it.

    Args:
        program: holds the site's matrix.
        packed: the site, of an integer format.
        activation_bits: x̂ is x rounded to so many bits with one scale a token; 0 leaves it as it is.

    Attributes:
        scale: float32 [n, groups], as stored.
    """

    def __init__(self, program: Program, packed: PackedLinear, activation_bits: int) -> None:
        assert packed.scale is not None, "integer formats have scales"
        n, k, fmt, store = packed.rows, packed.columns, packed.format, program.store
        codes = unpack_codes(fmt, store.load(program.weight_of(packed.weight)), n, k)
        self.scale = unpack_scale(fmt, store.load(program.weight_of(packed.scale)), n, k)
        # One byte a weight, in whole groups, so that a group is a row of a view.
        width = fmt.group_size(k)
        self._codes = F.pad(codes, (0, self.scale.shape[1] * width - k)).view(n, -1, width)
        self._columns = k
        self._bits = activation_bits

    def at(self, scale: Tensor) -> Product:
        """The product of x, float32 [..., k], and a bias, float32 [n], with some scales: float32 [n, groups].

        Rounding x is passed straight through to its gradient (Bengio et al., 2013, arXiv 1308.3432).
        """

        def multiply(x: Tensor, bias: Tensor | None) -> Tensor:
            y: Tensor = _Multiply.apply(x, scale, self)  # type: ignore[no-untyped-call]  # torch's own
            return y if bias is None else y + bias

        return multiply

    def matrix(self, scale: Tensor) -> Tensor:
        """The matrix for some scales: float32 [n, k]."""
        return (self._codes * scale.unsqueeze(-1)).flatten(1)[:, : self._columns]

    def rounded(self, x: Tensor) -> Tensor:
        """x̂."""
        if not self._bits:
            return x
        codes, scale, _ = quantize_activation(x, self._bits)
        return codes[..., : x.shape[-1]] * scale.unsqueeze(-1)

    def of_scale(self, of_matrix: Tensor) -> Tensor:
        """The gradient for the scales from that for the matrix: float32 [n, groups] from [n, k]."""
        n, groups, width = self._codes.shape
        whole = F.pad(of_matrix, (0, groups * width - self._columns)).view(n, groups, width)
        return (whole * self._codes).sum(-1)


class _Multiply(Function):
    """Keeps what it has made for the way back, which `Chain` goes block by block."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, product: ScaledProduct) -> Tensor:
        rounded, matrix = product.rounded(x), product.matrix(scale)
        ctx.save_for_backward(rounded, matrix)
        ctx.product = product
        return F.linear(rounded, matrix)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_y: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rounded, matrix = ctx.saved_tensors
        product: ScaledProduct = ctx.product
        of_x = of_y @ matrix if ctx.needs_input_grad[0] else None
        of_matrix = of_y.flatten(0, -2).t() @ rounded.flatten(0, -2)
        return of_x, product.of_scale(of_matrix), None
