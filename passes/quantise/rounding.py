"""Rounding a matrix to an integer format: the one quantiser that `rtn` applies and `sensitivity` predicts with."""

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hikui.lowering.formats import KINDS, Format, Segment

GRID = 24
"""Scales tried for each group."""

NARROWEST = {"int2": 0.3, "ternary": 0.15, "int3": 0.35, "int4": 0.55, "nf4": 0.5, "fp4": 0.5, "int8": 0.9}
"""The smallest scale tried, over the one that just covers the group's largest value; clipping pays for few levels.

Chosen by measurement: on Gaussian and Laplacian weights, in groups of 32 up to channels of 11008, reaching lower wins
less than one part in two hundred of the error (int4 in Laplacian channels alone would win more, 7 %).
"""

WIDEST = {"nf4": 1.5, "fp4": 1.6}
"""The largest scale tried where it is not the one that covers both sides: the levels of a codebook lie so far apart at
their ends that the largest value may be better off at the last but one: 1 to 8 % less error in groups of Gaussians."""

_TURNED = ("int2", "nf4")
"""Kinds whose scale is tried with either sign: the side of the extreme value need not be the better one for all others.

For int2 that takes 1 to 3 % off the squared error; for int3 and int4 it would be less than 1 %, for twice the time.
"""

_CHUNK = 1 << 18
"""Weights rounded at a time: what is tried over and over then stays in the cache."""


class Rounded(NamedTuple):
    """Codes int8 [n, k] and scales float32 [n, groups], the latter exactly representable in float16."""

    codes: Tensor
    scale: Tensor


def column_groups(fmt: Format, k: int) -> Iterator[tuple[str, slice]]:
    """The kind and the columns of each group of k columns, ascending; groups of padding alone have no columns."""
    for part in fmt.segments(fmt.padded_k(k)):
        size = part.format.group_size(part.stop - part.start)
        for start in range(part.start, part.stop, size):
            yield part.format.kind, slice(min(start, k), min(start + size, k))


def round_matrix(weight: Tensor, fmt: Format, clip: str = "mse", importance: Tensor | None = None) -> Rounded:
    """Rounds a matrix to the nearest codes.

    `minmax` takes the scale that just covers each group's largest magnitude. `mse` searches the scale with the least
    (weighted) squared error on a grid and then refits it by least squares once. Where the levels are not symmetric,
    `mse` may give a scale below zero: the extreme value gets the lowest level of int4 and int3, and int2 and nf4 are
    turned to their better side.
    The scale of `sign` is the (weighted) mean magnitude, which is the best there is, whatever `clip` says.

    Args:
        weight: float32 [n, k], finite; for `mixed` with its columns in their permuted order.
        fmt: an integer format.
        clip: `mse` or `minmax`.
        importance: float32 [k], the weight of each input column's error; equal weights where None.

    Raises:
        OverflowError: a scale does not fit float16.
    """
    k = weight.shape[1]
    columns = torch.ones(k) if importance is None else _normalised(importance)
    parts = [
        _round_segment(weight[:, part.start : part.stop], columns[part.start : part.stop], part, clip)
        for part in fmt.segments(fmt.padded_k(k))
    ]
    if len(parts) == 1:
        return parts[0]
    codes, scale = (torch.cat(tensors, 1) for tensors in zip(*parts, strict=True))
    return Rounded(codes, scale)


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


def _round_segment(weight: Tensor, columns: Tensor, part: Segment, clip: str) -> Rounded:
    """Rounds columns that are stored alike; `part` may reach beyond them into the padding."""
    (n, k), width = weight.shape, part.stop - part.start
    group, pad = part.format.group_size(width), width - k
    groups = width // group
    heavy = F.pad(columns, (0, pad)).view(groups, group)
    kind = part.format.kind
    rows = max(1, _CHUNK // width)
    parts = []
    for start in range(0, n, rows):
        grouped = F.pad(weight[start : start + rows], (0, pad)).view(-1, groups, group)
        parts.append(_signs(grouped, heavy) if kind == "sign" else _round_groups(grouped, heavy, kind, clip))
    codes = torch.cat([codes for codes, _ in parts]).view(n, -1)[:, :k].contiguous()
    return Rounded(codes, torch.cat([scale for _, scale in parts]))


def _signs(grouped: Tensor, heavy: Tensor) -> tuple[Tensor, Tensor]:
    total = heavy.sum(-1)
    mean = (grouped.abs() * heavy).sum(-1) / torch.where(total > 0, total, 1.0)
    return torch.where(grouped < 0, -1, 1).to(torch.int8), to_float16(mean)


def _round_groups(grouped: Tensor, heavy: Tensor, kind: str, clip: str) -> tuple[Tensor, Tensor]:
    levels = KINDS[kind].levels
    low, high = levels[0], levels[-1]
    position = grouped.abs().argmax(dim=-1, keepdim=True)
    extreme = grouped.gather(-1, position).squeeze(-1)
    if clip == "minmax":
        scale = to_float16(extreme.abs() / high)
        return group_codes(grouped, scale, kind).to(torch.int8), scale
    # The extreme value lies on the side that has the level `low`; for symmetric ends the sign does not matter.
    covering = extreme / low
    if low == -high:
        covering = covering.abs()
    best = to_float16(covering)
    codes = group_codes(grouped, best, kind)
    error = _error(grouped, codes, best, heavy)
    for ratio in grid(kind):
        best, codes, error = _keep_better(grouped, heavy, to_float16(covering * ratio), best, codes, error, kind)
    power = (heavy * codes.square()).sum(-1)
    refit = torch.where(power > 0, (heavy * grouped * codes).sum(-1) / power, best)
    best, codes, _ = _keep_better(grouped, heavy, to_float16(refit), best, codes, error, kind)
    return codes.to(torch.int8), best


def grid(kind: str) -> list[float]:
    """The scales that are searched, over the one that has the extreme value at the lowest level.

    They go up to the scale that covers both sides with the fewer levels, or beyond.
    """
    low, high = KINDS[kind].levels[0], KINDS[kind].levels[-1]
    ratios: list[float] = torch.linspace(NARROWEST[kind], WIDEST.get(kind, -low / high), GRID).tolist()
    return ratios + [-ratio for ratio in ratios] if kind in _TURNED else ratios


def _keep_better(
    grouped: Tensor, heavy: Tensor, scale: Tensor, best: Tensor, codes: Tensor, error: Tensor, kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    tried = group_codes(grouped, scale, kind)
    tried_error = _error(grouped, tried, scale, heavy)
    better = tried_error < error
    return (
        torch.where(better, scale, best),
        torch.where(better.unsqueeze(-1), tried, codes),
        torch.where(better, tried_error, error),
    )


def to_float16(scale: Tensor) -> Tensor:
    """Rounds scales to what float16 holds.

    Raises:
        OverflowError: a scale is beyond float16.
    """
    rounded = scale.to(torch.float16).float()
    if not bool(rounded.isfinite().all()):
        raise OverflowError(f"a scale of {float(scale.abs().max()):.3g} is beyond float16")
    return rounded


def inverse(scale: Tensor) -> Tensor:
    """1 / scale, and 0 where that is zero: float32, of the same shape."""
    return torch.where(scale != 0, 1.0 / scale, 0.0)


def group_codes(grouped: Tensor, scale: Tensor, kind: str) -> Tensor:
    """The nearest codes, as floats."""
    return nearest(grouped * inverse(scale).unsqueeze(-1), kind)


def nearest(wanted: Tensor, kind: str) -> Tensor:
    """The nearest codes to float32 values in units of the scale, as floats; the values are used up."""
    levels, step = KINDS[kind].levels, KINDS[kind].step
    low, high = levels[0], levels[-1]
    if step == 1:
        return wanted.round_().clamp_(low, high)
    if step == 2:
        return wanted.sub_(low).mul_(0.5).round_().mul_(2).add_(low).clamp_(low, high)
    halves = wanted.mul_(2).floor_().clamp_(2 * low, 2 * high).sub_(2 * low).to(torch.int32)
    return _by_halves(kind).index_select(0, halves.flatten()).view_as(wanted)


@cache
def _by_halves(kind: str) -> Tensor:
    """The nearest code of a codebook to what lies between h/2 and (h+1)/2, at h − 2·lowest: float32.

    Codes are integers, so the middle of two is a multiple of a half and no such interval is cut by one.
    """
    low, high = KINDS[kind].levels[0], KINDS[kind].levels[-1]
    levels = torch.tensor(KINDS[kind].levels, dtype=torch.float32)
    inner = torch.arange(2 * low, 2 * high + 1) / 2 + 0.25
    return levels[(inner[:, None] - levels).abs().argmin(1)]


def _error(grouped: Tensor, codes: Tensor, scale: Tensor, heavy: Tensor) -> Tensor:
    return ((codes * scale.unsqueeze(-1) - grouped).square_() * heavy).sum(-1)
