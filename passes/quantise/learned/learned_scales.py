"""The scales of one matrix as something to learn: how far each row and group is clipped, and how its weights follow."""

import torch
import torch.nn.functional as F
from torch import Tensor

from hikui.lowering.formats import KINDS, Format
from hikui.passes.quantise.rounding import Rounded, group_codes, round_matrix

START = 0.5
"""The strength that learning starts at: as much room above as below."""

_LARGEST = float(torch.finfo(torch.float16).max)


class LearnedScales:
    """The scale γ·reach of each row and group, with the strength γ = σ(θ) and a fixed reach.

    In OmniQuant (arXiv 2308.13137, equation 2) γ and β, both near one at first, clip the two ends of a group's range.
    Formats here have no zero points, so there is one strength. It starts at ½, where the scale is half-way between the
    one that covers the group and the one of least weight error, whose sign it has: which end of the range gets the
    outermost level is not learned by small steps. Covering is the scale that has the largest value at the lowest
    level: at 2 bits, the one that has it at the single level above zero is so far away that 10 passes over the text of
    the tests found nothing better than the scales of least weight error.

    Args:
        weight: float32 [n, k], finite.
        fmt: an integer format.
        order: int64 [k], the columns in the order in which they are stored; None where that is their own.

    Attributes:
        theta: float32 [n, groups], the parameter.
        nearest: float32 [n, groups], the scales of least weight error, to compare with.
        order: as given.

    Raises:
        OverflowError: a scale does not fit float16.
    """

    def __init__(self, weight: Tensor, fmt: Format, order: Tensor | None = None) -> None:
        self.order = order
        self._back = None if order is None else torch.argsort(order)
        stored = weight if order is None else weight[:, order]
        n, self._k = stored.shape
        self._parts: list[tuple[str, Tensor, slice]] = []
        first = 0
        for part in fmt.segments(fmt.padded_k(self._k)):
            columns, width = stored[:, part.start : part.stop], part.stop - part.start
            groups = width // part.format.group_size(width)
            grouped = F.pad(columns, (0, width - columns.shape[1])).view(n, groups, -1)
            self._parts.append((part.format.kind, grouped, slice(first, first + groups)))
            first += groups
        self.nearest = round_matrix(stored, fmt).scale
        covering = round_matrix(stored, fmt, "minmax").scale
        for kind, _, at in self._parts:
            # Of the largest value at the lowest level, which is the longer side: the sign is the other scale's.
            covering[:, at] *= KINDS[kind].levels[-1] / -KINDS[kind].levels[0]
        start = (torch.where(self.nearest < 0, -covering, covering) + self.nearest) / 2
        self._reach = (start / START).clamp(-_LARGEST, _LARGEST)
        self.theta = torch.full_like(start, START).logit()

    def scale(self) -> Tensor:
        """The scales as they are now: float32 [n, groups], representable in float16."""
        return (self._reach * self.theta.sigmoid()).to(torch.float16).float()

    def rounded(self, scale: Tensor) -> Rounded:
        """The nearest codes for some scales, in the stored order of the columns."""
        codes = [_nearest_codes(grouped, scale[:, at], kind).flatten(1) for kind, grouped, at in self._parts]
        return Rounded(torch.cat(codes, 1)[:, : self._k].to(torch.int8), scale)

    def matrix(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The matrix ŵ that some scales give, and the slope of each weight in its scale.

        Rounding is passed straight through (Bengio et al., 2013, arXiv 1308.3432): for a weight between the ends of
        the codes ∂ŵ/∂s = code − w/s, for one beyond them, and for signs, the code itself (Esser et al., LSQ, ICLR 2020,
        arXiv 1902.08153, equation 3).

        Args:
            scale: float32 [n, groups].

        Returns:
            float32 [n, k] in the columns' own order, and float32 [n, padded k] for `gradient`.
        """
        made, slopes = [], []
        for kind, grouped, at in self._parts:
            own = scale[:, at].unsqueeze(-1)
            slope = _nearest_codes(grouped, scale[:, at], kind)
            made.append((slope * own).flatten(1))
            if kind != "sign":
                low, high = KINDS[kind].levels[0], KINDS[kind].levels[-1]
                wanted = grouped * torch.where(own != 0, 1.0 / own, 0.0)
                slope -= wanted.masked_fill_((wanted < low) | (wanted > high), 0.0)
            slopes.append(slope.flatten(1))
        matrix = torch.cat(made, 1)[:, : self._k]
        return (matrix if self._back is None else matrix[:, self._back]).contiguous(), torch.cat(slopes, 1)

    def gradient(self, of_matrix: Tensor, slope: Tensor) -> Tensor:
        """The gradient for the scales, from that for ŵ.

        Args:
            of_matrix: float32 [n, k], in the columns' own order.
            slope: as `matrix` gave it.

        Returns:
            float32 [n, groups].
        """
        stored = of_matrix if self.order is None else of_matrix[:, self.order]
        product = F.pad(stored, (0, slope.shape[1] - self._k)) * slope
        widths = [grouped.shape[1] * grouped.shape[2] for _, grouped, _ in self._parts]
        parts = zip(product.split(widths, 1), self._parts, strict=True)
        return torch.cat([columns.reshape(grouped.shape).sum(-1) for columns, (_, grouped, _) in parts], 1)

    def descend(self, of_scale: Tensor) -> None:
        """Sets θ's gradient from that for the scales: float32 [n, groups]."""
        strength = self.theta.sigmoid()
        self.theta.grad = of_scale * self._reach * strength * (1 - strength)


def _nearest_codes(grouped: Tensor, scale: Tensor, kind: str) -> Tensor:
    """The nearest codes, as floats."""
    if kind == "sign":
        return torch.where(grouped < 0, -1.0, 1.0)
    return group_codes(grouped, scale, kind)
