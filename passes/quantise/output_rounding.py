"""Rounding for the least error of the output: the scale of each group is searched in the metric of its own inputs."""

from collections.abc import Iterator
from threading import Lock

import torch
import torch.nn.functional as F
from torch import Tensor

from hikui.lowering.formats import KINDS, Format, Segment
from hikui.passes.quantise.rounding import Rounded, grid, group_codes, round_matrix, to_float16

_CHUNK = 1 << 20
"""Weights rounded at a time; enough rows that what meets a whole channel's metric is a product of matrices."""

_FLOOR = 1e-6
"""Added to the metric's diagonal, over its mean: inputs that the text never excites are still rounded to nearest."""


class OutputMetric:
    """E[x·xᵀ] as `round_to_output` takes it: the diagonal blocks of its groups, in float32, made when first asked for.

    Threads may share one.

    Args:
        gram: [k, k], E[x·xᵀ] of the columns in the order in which the matrix has them. It is kept, not copied.
    """

    def __init__(self, gram: Tensor) -> None:
        mean = float(gram.diagonal().mean())
        self._gram = gram
        self._by = 1.0 / mean if mean > 0 else 0.0
        self._held: dict[tuple[int, int, int], Tensor] = {}
        self._lock = Lock()

    @property
    def width(self) -> int:
        """The number of columns."""
        return self._gram.shape[0]

    def blocks(self, start: int, stop: int, group: int) -> Tensor:
        """The blocks of the groups of columns start…stop−1: float32 [groups, group, group], zero under padding."""
        with self._lock:
            key = start, stop, group
            if key not in self._held:
                self._held[key] = torch.stack([self._block(at, group) for at in range(start, stop, group)])
            return self._held[key]

    def _block(self, start: int, group: int) -> Tensor:
        own = slice(start, min(start + group, self.width))
        block = self._gram[own, own].float() * self._by
        block.diagonal().add_(_FLOOR)
        return F.pad(block, (0, group - block.shape[1], 0, group - block.shape[0]))


def round_to_output(weight: Tensor, fmt: Format, metric: OutputMetric | Tensor) -> Rounded:
    """Rounds a matrix with the scales that change the output least.

    For each row and group the scale is searched on the grid of `round_matrix`, for the least d·G·dᵀ, d being the
    group's rounding error and G its diagonal block of E[x·xᵀ]; the best is then refitted by least squares in that
    metric, once with the nearest codes and once with the codes that it has, and kept where that helps. Weighing by the
    diagonal alone, as `round_matrix` does, is tried as well, so that no group ends worse than with it. This is the clip
    search of AWQ (Lin et al., 2023, and its published code), generalised to every kind, with an expectation in place of
    a sample of tokens. Errors of different groups count as uncorrelated.

    Args:
        weight: float32 [n, k], finite; for `mixed` with its columns in their permuted order.
        fmt: an integer format.
        metric: of the k columns in the same order; float64 [k, k], E[x·xᵀ], where it is used only once.

    Returns:
        Codes and scales, as `round_matrix` gives them. Where a refit kept its codes they need not be the nearest ones.

    Raises:
        OverflowError: a scale does not fit float16.
        ValueError: the metric has another width than the matrix.
    """
    k = weight.shape[1]
    metric = OutputMetric(metric) if isinstance(metric, Tensor) else metric
    if metric.width != k:
        raise ValueError(f"a metric of {metric.width} columns does not fit {k} columns")
    parts = [_round_segment(weight, metric, part) for part in fmt.segments(fmt.padded_k(k))]
    if len(parts) == 1:
        return parts[0]
    codes, scale = (torch.cat(tensors, 1) for tensors in zip(*parts, strict=True))
    return Rounded(codes, scale)


def _round_segment(weight: Tensor, metric: OutputMetric, part: Segment) -> Rounded:
    """Rounds columns that are stored alike; `part` may reach beyond the matrix into the padding."""
    weight = weight[:, part.start : part.stop]
    (n, k), width = weight.shape, part.stop - part.start
    group = part.format.group_size(width)
    blocks = metric.blocks(part.start, part.stop, group)
    importance = blocks.diagonal(dim1=-2, dim2=-1).flatten()[:k]
    rows = max(1, _CHUNK // width)
    codes = torch.empty(n, k, dtype=torch.int8)
    scale = torch.empty(n, width // group)
    for start in range(0, n, rows):
        stop = min(start + rows, n)
        # Groups lead, so that each meets its own block in one batched product.
        grouped = F.pad(weight[start:stop], (0, width - k)).view(stop - start, -1, group).transpose(0, 1).contiguous()
        search = _Search(grouped, blocks, part.format.kind)
        search.offer_rounded(round_matrix(weight[start:stop], part.format, "mse", importance), k)
        search.run()
        codes[start:stop] = search.codes.transpose(0, 1).reshape(stop - start, width)[:, :k].to(torch.int8)
        scale[start:stop] = search.scale.t()
    return Rounded(codes, scale)


class _Search:
    """The best scale and codes so far of some rows: grouped [groups, rows, group], blocks [groups, group, group]."""

    def __init__(self, grouped: Tensor, blocks: Tensor, kind: str) -> None:
        self._grouped, self._blocks, self._kind = grouped, blocks, kind
        self.codes = grouped
        self.scale = self._error = grouped.new_full(grouped.shape[:2], torch.inf)

    def offer_rounded(self, rounded: Rounded, k: int) -> None:
        """Tries what was found otherwise: codes [rows, k], scales [rows, groups] without groups of padding."""
        groups, rows, group = self._grouped.shape
        codes = F.pad(rounded.codes.float(), (0, groups * group - k)).view(rows, groups, group)
        scale = F.pad(rounded.scale, (0, groups - rounded.scale.shape[1]))
        self._offer(scale.t().contiguous(), codes.transpose(0, 1).contiguous())

    def run(self) -> None:
        """Searches the grid, then refits; signs are what they are, and only their scale is fitted."""
        if self._kind != "sign":
            for scale in self._grid():
                self._offer(scale)
            self._offer(self._refitted())
        self._offer(self._refitted(), self.codes)

    def _grid(self) -> Iterator[Tensor]:
        """As `round_matrix` searches: from clipping to the covering scale, both ways round where that differs."""
        low, high = KINDS[self._kind].levels[0], KINDS[self._kind].levels[-1]
        position = self._grouped.abs().argmax(dim=-1, keepdim=True)
        covering = self._grouped.gather(-1, position).squeeze(-1) / low
        if low == -high:
            covering = covering.abs()
        return (covering * ratio for ratio in (1.0, *grid(self._kind)))

    def _offer(self, scale: Tensor, codes: Tensor | None = None) -> None:
        """Tries a scale, with the nearest codes where none are given."""
        scale = to_float16(scale)
        if codes is None:
            codes = group_codes(self._grouped, scale, self._kind)
        off = (codes * scale.unsqueeze(-1)).sub_(self._grouped)
        error = (off @ self._blocks).mul_(off).sum(-1)
        better = error < self._error
        self.scale = torch.where(better, scale, self.scale)
        self.codes = torch.where(better.unsqueeze(-1), codes, self.codes)
        self._error = torch.where(better, error, self._error)

    def _refitted(self) -> Tensor:
        """The scale that suits the codes best: least squares of the weights in the metric."""
        seen = self.codes @ self._blocks
        power, shared = (seen * self.codes).sum(-1), (seen * self._grouped).sum(-1)
        return torch.where(power > 0, shared / torch.where(power > 0, power, 1.0), self.scale)
