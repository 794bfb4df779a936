"""Half-quadratic quantisation: scales for which most weights are met closely and a few, the outliers, are let go."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hikui.lowering.errors import UsageError
from hikui.lowering.formats import KINDS, Format, Segment
from hikui.passes.quantise.quantiser import DataFreeQuantiser
from hikui.passes.quantise.rounding import Rounded, group_codes, round_matrix, to_float16

_CHUNK = 1 << 18
"""Weights rounded at a time: what is gone over in each iteration then stays in the cache."""


@dataclass(frozen=True)
class HalfQuadratic:
    """How `round_hqq` searches.

    Attributes:
        p: the norm of the error, above 0 and at most 1.
        beta: weight of the quadratic term, at first.
        kappa: beta grows by this factor in each iteration.
        iterations: how many.
    """

    p: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    iterations: int = 20


@dataclass(frozen=True)
class Hqq(DataFreeQuantiser):
    """Rounds weights for the least Σ|w−ŵ|^p, p < 1, by half-quadratic splitting; it needs no data (after HQQ).

    Attributes:
        p: the norm of the error, above 0 and at most 1.
        beta: weight of the quadratic term at first, errors being measured in steps of the group.
        kappa: beta grows by this factor in each iteration.
        iterations: how many; each group keeps the best of them.
    """

    name: ClassVar[str] = "hqq"
    p: float = HalfQuadratic.p
    beta: float = HalfQuadratic.beta
    kappa: float = HalfQuadratic.kappa
    iterations: int = HalfQuadratic.iterations

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.p <= 1:
            raise UsageError(f"hqq cannot take the norm p={self.p:g}; p is above 0 and at most 1.")
        if self.beta <= 0 or self.kappa <= 0:
            raise UsageError("hqq takes beta and kappa above 0 only.")
        if self.iterations < 1:
            raise UsageError(f"hqq cannot run {self.iterations} iterations; give 1 or more.")

    def quantise(self, weight: Tensor, fmt: Format, prepared: None) -> Rounded:
        """As `round_hqq`."""
        return round_hqq(weight, fmt, HalfQuadratic(self.p, self.beta, self.kappa, self.iterations))


def round_hqq(weight: Tensor, fmt: Format, search: HalfQuadratic | None = None) -> Rounded:
    """Rounds a matrix for the least Σ|w−ŵ|^p of each group, after HQQ (Badri and Shaji, 2023).

    The error is split off as e, which is nearly sparse: in turn e = shrink(w−ŵ), the generalised soft threshold
    sign(x)·max(|x| − |x|^(p−1)/β, 0), and the scale is fitted to w−e with the codes as they are; then the nearest codes
    are taken. HQQ keeps the scale and moves the zero point in its closed-form step; formats here have none, so it is
    the scale that moves. Other deviations: errors are measured in steps of the group's first scale, so that β means the
    same for weights of any size; the start is the scale of `round_matrix`, from which the objective ends lower than
    from the covering one; and every group keeps the best that it has met, so none ends above its start.

    Args:
        weight: float32 [n, k], finite; for `mixed` with its columns in their permuted order.
        fmt: an integer format. The scale of `sign` is fitted alike.
        search: how; the defaults where None.

    Raises:
        OverflowError: a scale does not fit float16.
    """
    search, k = search or HalfQuadratic(), weight.shape[1]
    start = round_matrix(weight, fmt)
    parts, done = [], 0
    for part in fmt.segments(fmt.padded_k(k)):
        groups = (part.stop - part.start) // part.format.group_size(part.stop - part.start)
        columns = slice(part.start, min(part.stop, k))
        own = Rounded(start.codes[:, columns], start.scale[:, done : done + groups])
        parts.append(_improve_segment(weight[:, columns], own, part, search))
        done += groups
    if len(parts) == 1:
        return parts[0]
    codes, scale = (torch.cat(tensors, 1) for tensors in zip(*parts, strict=True))
    return Rounded(codes, scale)


def _improve_segment(weight: Tensor, start: Rounded, part: Segment, search: HalfQuadratic) -> Rounded:
    (n, k), groups = weight.shape, start.scale.shape[1]
    width = part.stop - part.start
    rows = max(1, _CHUNK // width)
    padding = F.pad(torch.ones(k), (0, width - k)).view(groups, -1)
    parts = []
    for first in range(0, n, rows):
        chunk = slice(first, first + rows)
        grouped, codes = (
            F.pad(tensor[chunk], (0, width - k)).view(-1, groups, width // groups)
            for tensor in (weight, start.codes.float())
        )
        parts.append(_improve(grouped, codes, start.scale[chunk], padding, part.format.kind, search))
    codes = torch.cat([codes.flatten(1)[:, :k] for codes, _ in parts])
    return Rounded(codes.to(torch.int8), torch.cat([scale for _, scale in parts]))


def _improve(
    grouped: Tensor, codes: Tensor, scale: Tensor, real: Tensor, kind: str, search: HalfQuadratic
) -> tuple[Tensor, Tensor]:
    """Grouped and codes [rows, groups, group], scale [rows, groups]; `real` [groups, group] is 0 under padding."""
    levels = KINDS[kind].levels
    step = (scale.abs() * ((levels[-1] - levels[0]) / (len(levels) - 1))).unsqueeze(-1)
    unit = torch.where(step > 0, step, 1.0)
    beta = search.beta

    def cost(codes: Tensor, scale: Tensor) -> Tensor:
        return ((grouped - codes * scale.unsqueeze(-1)).abs().pow_(search.p) * real).sum(-1)

    best_codes, best, least = codes, scale, cost(codes, scale)
    for _ in range(search.iterations):
        error = (grouped - codes * scale.unsqueeze(-1)) / unit
        sparse = error.sign() * (error.abs() - error.abs().pow(search.p - 1) / beta).clamp_min_(0)
        power = (codes.square() * real).sum(-1)
        fitted = ((grouped - sparse * unit) * codes * real).sum(-1) / torch.where(power > 0, power, 1.0)
        scale = to_float16(torch.where(power > 0, fitted, scale))
        codes = group_codes(grouped, scale, kind)
        now = cost(codes, scale)
        better = now < least
        best, least = torch.where(better, scale, best), torch.where(better, now, least)
        best_codes = torch.where(better.unsqueeze(-1), codes, best_codes)
        beta *= search.kappa
    return best_codes, best
