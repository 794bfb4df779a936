"""A matrix of an integer format whose codes are the nearest to latent weights that gradients move."""

from functools import cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from hikui.lowering.formats import KINDS, Format, quantize_activation, unpack_codes, unpack_scale
from hikui.lowering.ir.packed import PackedLinear
from hikui.lowering.ir.program import Program
from hikui.passes.gradients.block_training import Product
from hikui.passes.gradients.coded_matrix import CodedGradient, CodedMatrix
from hikui.passes.quantise.rounding import inverse, nearest

_BEYOND = 0.5
"""Where a latent begins whose float weight is beyond its code's cell: so much of the way to the border.

A quantiser that makes up for errors leaves many weights there. With their latents at the border, the first steps of
training turned all of these codes back at once: SmolLM2-135M at int2-g128 went from 1.5 nats a token to more than 7.
With all latents near their codes, those whose weight lies in the middle of two codes are no more easily turned than
the others, and on tiny models nothing was learned.
"""


_IN_CACHE = 1 << 17
"""Weights: half a megabyte."""


class LatentMatrix:
    """ŵ = code(latent) · scale, and y = x̂·ŵᵀ + bias, as the packed site computes it.

    A latent is in units of the mean distance of two codes.

    Args:
        program: holds the site's matrix, and what it was packed from.
        packed: the site, of an integer format.
        activation_bits: x̂ is x rounded to so many bits with one scale a token; 0 leaves it as it is.

    Attributes:
        format: of the site.
        latent: float32 [n, padded k], moved in place. It begins at the float weight over its scale, or where that has
            another code than the site, half-way between the site's code and the border of its cell.
        scale: float32 [n, groups], as stored.
    """

    def __init__(self, program: Program, packed: PackedLinear, activation_bits: int) -> None:
        assert packed.scale is not None, "integer formats have scales"
        n, k, fmt, store = packed.rows, packed.columns, packed.format, program.store
        self.format, self._columns, self._bits = fmt, k, activation_bits
        self._group, self._width = fmt.group_size(k), fmt.padded_k(k)
        self.scale = unpack_scale(fmt, store.load(program.weight_of(packed.scale)), n, k)
        self._parts = [(part.format.kind, slice(part.start, part.stop)) for part in fmt.segments(self._width)]
        codes = F.pad(unpack_codes(fmt, store.load(program.weight_of(packed.weight)), n, k), (0, self._width - k))
        self.latent = self._grouped(F.pad(packed.latent(store), (0, self._width - k)))
        self.latent.mul_(inverse(self.scale).unsqueeze(-1))
        self.latent = self.latent.flatten(1).contiguous()
        for kind, at in self._parts:
            cells, centre = _cells(kind)[codes[:, at].long() + 128], codes[:, at] / _unit(kind)
            wanted = self.latent[:, at] / _unit(kind)
            nearest_inside = torch.minimum(torch.maximum(wanted, cells[..., 0]), cells[..., 1])
            moved = torch.lerp(centre, nearest_inside, _BEYOND)
            low, high = _limits(kind)
            # Beyond the last codes there is no border; and on a border, where signs have their zeros, is not inside.
            own = (nearest_inside == wanted) | (nearest_inside == low) | (nearest_inside == high)
            own &= nearest(nearest_inside * _unit(kind), kind) == codes[:, at]
            self.latent[:, at] = torch.where(own, nearest_inside, moved)

    def _grouped(self, whole: Tensor) -> Tensor:
        return whole.view(whole.shape[0], -1, self._group)

    def _nearest(self, latent: Tensor) -> Tensor:
        """The codes, as floats: [n, padded k]."""
        parts = [nearest(latent[:, at] * _unit(kind), kind) for kind, at in self._parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def codes(self, latent: Tensor) -> Tensor:
        """int8 [n, k]."""
        codes = torch.empty(latent.shape[0], self._columns, dtype=torch.int8)
        for rows in self._in_cache():
            codes[rows] = self._nearest(latent[rows])[:, : self._columns]
        return codes

    def _in_cache(self) -> list[slice]:
        """So many rows at a time that all that is made of them stays in the cache."""
        count, n = max(1, _IN_CACHE // self._width), self.latent.shape[0]
        return [slice(start, start + count) for start in range(0, n, count)]

    @property
    def is_coded(self) -> bool:
        """Whether the product is one of integers."""
        return is_coded(self.format, self._columns, self._bits)

    def matrix(self, latent: Tensor, scale: Tensor) -> Tensor | CodedMatrix:
        """ŵ for some scales, float32 [n, groups]: float32 [n, k], or its codes."""
        if self.is_coded:
            return CodedMatrix(self.codes(latent), scale.squeeze(1))
        whole = self._grouped(self._nearest(latent)).mul_(scale.unsqueeze(-1)).flatten(1)
        return whole[:, : self._columns]

    def gradients(
        self, latent: Tensor, scale: Tensor, of_matrix: Tensor | CodedGradient, codes: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Those for the latents, straight through the rounding, and for the scales.

        Args:
            latent: float32 [n, padded k].
            scale: float32 [n, groups].
            of_matrix: that for ŵ: float32 [n, k], which is used up, or what it is the product of.
            codes: of the latents, where they are at hand.
        """
        if isinstance(of_matrix, CodedGradient):
            of_matrix = of_matrix.multiplied()
        of_scale = torch.empty_like(scale)
        of_latent = of_matrix if self._width == self._columns else torch.empty_like(latent)
        units = [_unit(kind) for kind, _ in self._parts]
        for rows in self._in_cache():
            known = self._nearest(latent[rows]) if codes is None else self._padded(codes[rows])
            whole = self._grouped(self._padded(of_matrix[rows]))
            of_scale[rows] = (whole * self._grouped(known)).sum(-1)
            part = torch.mul(whole, scale[rows].unsqueeze(-1) * units[0], out=self._grouped(of_latent[rows])).flatten(1)
            for (_, at), unit in zip(self._parts[1:], units[1:], strict=True):
                part[:, at] *= unit / units[0]
        return of_latent, of_scale

    def _padded(self, part: Tensor) -> Tensor:
        return F.pad(part, (0, self._width - self._columns)) if self._width > self._columns else part

    def confine(self) -> None:
        """Brings latents back into the cells of the codes."""
        for kind, at in self._parts:
            self.latent[:, at].clamp_(*_limits(kind))

    def times(self, matrix: Tensor | CodedMatrix) -> Product:
        """The product with what `matrix` gave; rounding x is passed straight through to its gradient."""
        if isinstance(matrix, CodedMatrix):
            return matrix.product

        def multiply(x: Tensor, bias: Tensor | None) -> Tensor:
            if self._bits:
                codes, scale, _ = quantize_activation(x.detach(), self._bits)
                x = x + (codes[..., : x.shape[-1]] * scale.unsqueeze(-1) - x.detach())
            return F.linear(x, matrix, bias)

        return multiply


def is_coded(fmt: Format, k: int, activation_bits: int) -> bool:
    """Whether products with a matrix of k columns are of integers: one scale a row, and a byte for each of x̂."""
    return activation_bits == 8 and fmt.group_size(k) == fmt.padded_k(k)


def _unit(kind: str) -> float:
    """The mean distance of two codes."""
    levels = KINDS[kind].levels
    return (levels[-1] - levels[0]) / (len(levels) - 1)


def _limits(kind: str) -> tuple[float, float]:
    """Where latents may be, in their units: as far beyond the last codes as half way to the next, signs not beyond."""
    levels = KINDS[kind].levels
    beyond = 0.0 if len(levels) == 2 else 0.5
    unit = _unit(kind)
    return (
        levels[0] / unit - beyond * (levels[1] - levels[0]) / unit,
        levels[-1] / unit + beyond * (levels[-1] - levels[-2]) / unit,
    )


@cache
def _cells(kind: str) -> Tensor:
    """The cell of code c, at c + 128: float32 [256, 2], in units of latents."""
    levels, unit = KINDS[kind].levels, _unit(kind)
    low, high = _limits(kind)
    borders = [low, *((a + b) / 2 / unit for a, b in pairwise(levels)), high]
    table = torch.zeros(256, 2)
    for index, code in enumerate(levels):
        table[code + 128] = torch.tensor(borders[index : index + 2])
    return table
