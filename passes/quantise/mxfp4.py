"""mxfp4: 4-bit floats with a power of two as the scale of each 32 weights, as the OCP Microscaling formats have it."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hikui.lowering.errors import UsageError
from hikui.lowering.formats import Format
from hikui.passes.quantise.quantiser import DataFreeQuantiser
from hikui.passes.quantise.rounding import Rounded, round_matrix

FORMAT = Format("fp4", 32)
"""How mxfp4 is stored here."""

_LARGEST_EXPONENT = 2
"""Exponent of the largest value of an element, 6 = 1.5 · 2²."""

_SCALE_EXPONENTS = (-24, 15)
"""Of the powers of two that float16 holds."""

_CHUNK = 1 << 20
"""Weights rounded at a time."""


@dataclass(frozen=True)
class Mxfp4(DataFreeQuantiser):
    """Rounds weights to mxfp4: e2m1 values with a power of two for each 32 of them.

    The values are those of the OCP MX formats, their place is not: packed as `fp4-g32`, where a scale is a float16,
    they take 4.5 bits and not 4.25. A site that was assigned another format is rounded to that one, as `rtn` does.

    Attributes:
        format: `fp4-g32`, the only one; bits and group say the same or nothing.
        search: also try the powers of two beside the one that the specification derives from the largest magnitude, and
            keep the one with the least squared error.
    """

    name: ClassVar[str] = "mxfp4"
    format: str = str(FORMAT)
    search: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.default_format() != FORMAT:
            raise UsageError(f"mxfp4 cannot round to {self.format or self.default_format()}; it takes {FORMAT} only.")

    def quantise(self, weight: Tensor, fmt: Format, prepared: None) -> Rounded:
        """As `round_mxfp4`, for `fp4-g32`."""
        return round_mxfp4(weight, search=self.search) if fmt == FORMAT else round_matrix(weight, fmt)


def round_mxfp4(weight: Tensor, *, search: bool = False) -> Rounded:
    """Rounds a matrix to mxfp4 (OCP Microscaling Formats (MX) Specification 1.0, 2023, sections 5.3.3 and 6.3).

    The scale X of 32 neighbours is 2^(⌊log₂ max|w|⌋ − 2); each w/X goes to the nearest of 0, ±½, ±1, ±1½, ±2, ±3, ±4,
    ±6, of two equally near to the one with an even mantissa, and beyond 6 to 6. The codes of `fp4` are twice these
    values, so the stored scale is X/2. It is at least 2⁻²⁴, the least that float16 holds: groups without a weight of
    2⁻²¹ or more are rounded to a coarser grid than the specification's.

    Args:
        weight: float32 [n, k], finite.
        search: also try 2X and X/2; of equal squared errors X wins, then 2X.

    Returns:
        Codes of `fp4` [n, k] and scales [n, ⌈k/32⌉], all of them powers of two.

    Raises:
        OverflowError: a weight is so large that float16 does not hold the scale.
    """
    n, k = weight.shape
    width = FORMAT.group_size(k)
    rows = max(1, _CHUNK // max(1, k))
    codes, scales = [], []
    for start in range(0, n, rows):
        grouped = F.pad(weight[start : start + rows], (0, -k % width)).unflatten(1, (-1, width))
        largest = grouped.abs().amax(dim=-1)
        # frexp gives a mantissa below one, so that its exponent is ⌊log₂⌋ + 1; half of X takes off one more.
        exponent = torch.where(largest > 0, torch.frexp(largest).exponent - 2 - _LARGEST_EXPONENT, -(1 << 15))
        if int(exponent.max()) > _SCALE_EXPONENTS[1]:
            raise OverflowError(f"a weight of {float(largest.max()):.3g} takes an mxfp4 scale that is beyond float16")
        best, found = _nearest_e2m1(grouped, exponent)
        if search:
            least = _error(grouped, best, found)
            for shift in (1, -1):
                tried, scale = _nearest_e2m1(grouped, exponent + shift)
                error = _error(grouped, tried, scale)
                better = error < least
                best = torch.where(better.unsqueeze(-1), tried, best)
                found, least = torch.where(better, scale, found), torch.where(better, error, least)
        codes.append(best.flatten(1)[:, :k].to(torch.int8))
        scales.append(found)
    return Rounded(torch.cat(codes), torch.cat(scales))


def _nearest_e2m1(grouped: Tensor, exponent: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, as floats, [rows, groups, 32] and scales [rows, groups] for scales of 2 to these exponents."""
    # Put together from its bits, a power of two is exact on every machine.
    scale = (exponent.clamp(*_SCALE_EXPONENTS).to(torch.int32) + 127 << 23).view(torch.float32)
    # Division by a power of two is exact.
    magnitude = (grouped / scale.unsqueeze(-1)).abs()
    # A code below 4 is a whole number; between 4 and 8 they lie 2 apart, from there on 4.
    step = torch.where(magnitude < 4, 1.0, torch.where(magnitude < 8, 2.0, 4.0))
    # Halves go to the even multiple of the step, which is the one with the even mantissa.
    return (magnitude / step).round().mul(step).clamp_max(12).copysign(grouped), scale


def _error(grouped: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    return (codes * scale.unsqueeze(-1) - grouped).square().sum(-1)
