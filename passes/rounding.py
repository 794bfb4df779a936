"""Rounding a matrix to an integer format: the one quantiser that `rtn` applies and `sensitivity` predicts with."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hikui.lowering.formats import Format

_GRID = 24
"""Scales tried for each group."""

_NARROWEST = {"int4": 0.55, "int8": 0.9}
"""The smallest scale tried, over the one that just covers the group's largest value; clipping pays for few levels."""

_CHUNK = 1 << 18
"""Weights rounded at a time: what is tried over and over then stays in the cache."""


class Rounded(NamedTuple):
    """Codes int8 [n, k] and scales float32 [n, groups], the latter exactly representable in float16."""

    codes: Tensor
    scale: Tensor


def round_matrix(weight: Tensor, fmt: Format, clip: str = "mse", importance: Tensor | None = None) -> Rounded:
    """Rounds a matrix to nearest.

    `minmax` takes the scale that just covers each group's largest magnitude. `mse` searches the scale with the least
    (weighted) squared error on a grid and then refits it by least squares once. Where the format has one level more on
    the negative side, `mse` may give a scale below zero, so that the extreme value gets that level.

    Args:
        weight: float32 [n, k], finite.
        fmt: an integer format.
        clip: `mse` or `minmax`.
        importance: float32 [k], the weight of each input column's error; equal weights where None.

    Raises:
        OverflowError: a scale does not fit float16.
    """
    n, k = weight.shape
    group, groups = fmt.group_size(k), fmt.groups(k)
    pad = fmt.padded_k(k) - k
    columns = torch.ones(k) if importance is None else _normalised(importance)
    heavy = F.pad(columns, (0, pad)).view(groups, group)
    rows = max(1, _CHUNK // (group * groups))
    parts = []
    for start in range(0, n, rows):
        grouped = F.pad(weight[start : start + rows], (0, pad)).view(-1, groups, group)
        parts.append(_round_groups(grouped, heavy, fmt, clip))
    codes = torch.cat([codes for codes, _ in parts]).view(n, -1)[:, :k].contiguous()
    return Rounded(codes, torch.cat([scale for _, scale in parts]))


def dequantise(rounded: Rounded, fmt: Format) -> Tensor:
    """The float32 [n, k] matrix that codes and scales stand for."""
    k = rounded.codes.shape[1]
    wide = rounded.scale.repeat_interleave(fmt.group_size(k), dim=1)[:, :k]
    return rounded.codes.float() * wide


def _normalised(importance: Tensor) -> Tensor:
    """Importances with mean one; a floor keeps never-used columns from being rounded arbitrarily."""
    mean = importance.double().mean()
    if not bool(mean > 0):
        return torch.ones_like(importance)
    return (importance.double() / mean).clamp_min(1e-6).float()


def _round_groups(grouped: Tensor, heavy: Tensor, fmt: Format, clip: str) -> tuple[Tensor, Tensor]:
    low, high = fmt.levels
    position = grouped.abs().argmax(dim=-1, keepdim=True)
    extreme = grouped.gather(-1, position).squeeze(-1)
    if clip == "minmax":
        scale = _to_float16(extreme.abs() / high)
        return _codes(grouped, scale, low, high).to(torch.int8), scale
    # The extreme value lies on the side that has the level `low`; for symmetric levels the sign does not matter.
    covering = extreme / low
    if low == -high:
        covering = covering.abs()
    best = _to_float16(covering)
    codes = _codes(grouped, best, low, high)
    error = _error(grouped, codes, best, heavy)
    # Up to the scale that covers both sides with the fewer levels.
    for ratio in torch.linspace(_NARROWEST[fmt.kind], -low / high, _GRID).tolist():
        best, codes, error = _keep_better(grouped, heavy, _to_float16(covering * ratio), best, codes, error, low, high)
    power = (heavy * codes.square()).sum(-1)
    refit = torch.where(power > 0, (heavy * grouped * codes).sum(-1) / power, best)
    best, codes, _ = _keep_better(grouped, heavy, _to_float16(refit), best, codes, error, low, high)
    return codes.to(torch.int8), best


def _keep_better(
    grouped: Tensor,
    heavy: Tensor,
    scale: Tensor,
    best: Tensor,
    codes: Tensor,
    error: Tensor,
    low: int,
    high: int,
) -> tuple[Tensor, Tensor, Tensor]:
    tried = _codes(grouped, scale, low, high)
    tried_error = _error(grouped, tried, scale, heavy)
    better = tried_error < error
    return (
        torch.where(better, scale, best),
        torch.where(better.unsqueeze(-1), tried, codes),
        torch.where(better, tried_error, error),
    )


def _to_float16(scale: Tensor) -> Tensor:
    """Rounds scales to what float16 holds.

    Raises:
        OverflowError: a scale is beyond float16.
    """
    rounded = scale.to(torch.float16).float()
    if not bool(rounded.isfinite().all()):
        raise OverflowError(f"a scale of {float(scale.abs().max()):.3g} is beyond float16")
    return rounded


def _codes(grouped: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    inverse = torch.where(scale != 0, 1.0 / scale, 0.0)
    return (grouped * inverse.unsqueeze(-1)).round_().clamp_(low, high)


def _error(grouped: Tensor, codes: Tensor, scale: Tensor, heavy: Tensor) -> Tensor:
    return ((codes * scale.unsqueeze(-1) - grouped).square_() * heavy).sum(-1)
