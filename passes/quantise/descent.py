"""Improves a rounded matrix in the metric of its output: scales refitted in closed form, codes by coordinate descent.

What GPTQ leaves is no minimum of E‖(W−Q)x‖²: its scales were chosen before the codes, and its codes one after the
other with no way back. Given the codes, the best scales of a row solve a linear system; given the scales, each code has
a best value while the others stay. Alternating the two never makes the error larger. After LNQ (Kim et al.,
GuidedQuant, 2025, section 4), which does this for codebooks; here for scales of groups.
"""

from itertools import pairwise

import torch
from torch import Tensor

from hikui.lowering.formats import Format
from hikui.passes.quantise.rounding import Rounded, column_groups, inverse, nearest

_BLOCK = 128
"""Columns whose part of H·E is worked out at once."""

_SYSTEM = 1 << 23
"""Coefficients of the rows' systems at a time, float64: with 224 groups (K = 14336) a row has fifty thousand."""

_RIDGE = 1e-9
"""Added to the diagonal of a row's system, over its mean: groups whose codes are all zero leave it singular."""


def descend(weight: Tensor, rounded: Rounded, fmt: Format, hessian: Tensor, sweeps: int) -> Rounded:
    """Lowers (w−q)·H·(w−q)ᵀ of each row from where it stands.

    Args:
        weight: float32 [n, k], columns in the order of the codes.
        rounded: codes and scales to start from.
        fmt: their integer format.
        hessian: H, float32 [k, k], symmetric with a diagonal above zero.
        sweeps: how often scales are refitted and every code is looked at once.

    Returns:
        Codes and scales of which no row has a larger error than it had; scales are exact in float16.
    """
    step = max(1, _SYSTEM // rounded.scale.shape[1] ** 2)
    parts = []
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        state = _State(weight[rows], Rounded(rounded.codes[rows], rounded.scale[rows]), fmt, hessian)
        for _ in range(sweeps):
            state.refit_scales()
            state.sweep_codes()
        if sweeps:
            state.refit_scales()
        parts.append(state.best())
    return Rounded(torch.cat([part.codes for part in parts]), torch.cat([part.scale for part in parts]))


class _State:
    """Everything transposed, so that a column is a run of memory: wanted and values [k, n], scales [groups, n]."""

    def __init__(self, weight: Tensor, rounded: Rounded, fmt: Format, hessian: Tensor) -> None:
        k = weight.shape[1]
        self._hessian = hessian
        self._wanted = weight.t().contiguous()
        self._codes = rounded.codes.t().float().contiguous()
        self._scale = rounded.scale.t().contiguous()
        self._groups = list(column_groups(fmt, k))
        widths = torch.tensor([own.stop - own.start for _, own in self._groups])
        self._group_of = torch.arange(len(widths)).repeat_interleave(widths)
        self._seen = hessian @ self._wanted
        self._error = self._objective(self._codes, self._scale)

    def best(self) -> Rounded:
        return Rounded(self._codes.t().to(torch.int8).contiguous(), self._scale.t().contiguous())

    def refit_scales(self) -> None:
        """The scales that suit the codes best: for each row the solution of (DᵀHD)·s = DᵀH·w, D holding its codes.

        A row whose error the rounding of its new scales to float16 makes larger keeps the old ones.
        """
        count, n = len(self._groups), self._wanted.shape[1]
        system = torch.zeros(n, count, count, dtype=torch.float64)
        right = torch.zeros(n, count, dtype=torch.float64)
        for index, (_, own) in enumerate(self._groups):
            reached = self._hessian[:, own] @ self._codes[own]
            shared = torch.zeros(count, n).index_add_(0, self._group_of, reached.mul_(self._codes))
            system[:, index] = shared.t()
            right[:, index] = (self._codes[own] * self._seen[own]).sum(0).double()
        system = (system + system.mT) / 2  # equal but for the order of sums
        diagonal = system.diagonal(dim1=1, dim2=2)
        diagonal += _RIDGE * diagonal.mean(1, keepdim=True) + torch.where(diagonal == 0, 1.0, 0.0)
        found = torch.linalg.solve(system, right).t().float().to(torch.float16).float()
        scale = torch.where(found.isfinite(), found, self._scale)
        error = self._objective(self._codes, scale)
        better = error < self._error
        self._scale = torch.where(better, scale, self._scale)
        self._error = torch.where(better, error, self._error)

    def sweep_codes(self) -> None:
        """Gives each code in turn its best value while all others stay."""
        off = self._values(self._codes, self._scale) - self._wanted
        pivots = self._hessian.diagonal().tolist()
        codes = self._codes.clone()
        for index, (kind, own) in enumerate(self._groups):
            scale = self._scale[index]
            reciprocal = inverse(scale)
            for start, stop in pairwise([*range(own.start, own.stop, _BLOCK), own.stop]):
                slope = self._hessian[start:stop] @ off
                corner = self._hessian[start:stop, start:stop]
                for at, column in enumerate(range(start, stop)):
                    target = self._wanted[column] + off[column] - slope[at] / pivots[column]
                    codes[column] = nearest(target.mul_(reciprocal), kind)
                    change = codes[column] * scale - self._wanted[column] - off[column]
                    off[column] += change
                    slope[at + 1 :].addr_(corner[at + 1 :, at], change)
        error = self._objective(codes, self._scale)
        better = error < self._error
        self._codes = torch.where(better, codes, self._codes)
        self._error = torch.where(better, error, self._error)

    def _values(self, codes: Tensor, scale: Tensor) -> Tensor:
        values = torch.empty_like(codes)
        for index, (_, own) in enumerate(self._groups):
            torch.mul(codes[own], scale[index], out=values[own])
        return values

    def _objective(self, codes: Tensor, scale: Tensor) -> Tensor:
        """The error of each row: float32 [n]."""
        off = self._values(codes, scale).sub_(self._wanted)
        return (self._hessian @ off).mul_(off).sum(0)
