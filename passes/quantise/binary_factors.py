"""Two matrices of signs whose product stands for a matrix: Ŵ = diag(s₁)·U·diag(m)·Vᵀ·diag(s₂), U and V of ±1.

The alternating directions of NanoQuant (arXiv 2602.06694, section 3.2), whose projection keeps the signs of a matrix
and the best product of a column and a row of magnitudes, as double binary factorisation does (arXiv 2505.11076); the
middle scales m are the latter's.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_POWER_STEPS = 5
"""Of the power iteration for magnitudes: they are near to a product already, so it settles fast."""

_RIDGE = 0.03
"""Added to the penalty, over the mean of the diagonal, so that a singular system stays solvable."""

_SHRINK = 0.2
"""Of each column's mean square activation that is taken from the mean of all: what a text seldom excites counts too
(after NanoQuant's shrinkage, section 3.1)."""

SMALLEST = 1e-12
"""What magnitudes are divided by at least."""


class Factors(NamedTuple):
    """What stands for W, [n, k].

    Attributes:
        left: what U is the signs of: float32 [n, r].
        right: what V is the signs of: float32 [k, r].
        rows: s₁, float32 [n].
        middle: m, float32 [r].
        columns: s₂, float32 [k].
    """

    left: Tensor
    right: Tensor
    rows: Tensor
    middle: Tensor
    columns: Tensor

    def dense(self) -> Tensor:
        """Ŵ: float32 [n, k]."""
        u, v = signs(self.left), signs(self.right)
        return (self.rows.unsqueeze(1) * u * self.middle) @ (v.t() * self.columns)


def signs(matrix: Tensor) -> Tensor:
    """−1 below zero, else 1: as floats."""
    return torch.where(matrix >= 0, 1.0, -1.0)


def factorise(
    weight: Tensor, rank: int, importance: Tensor | None, iterations: int, generator: torch.Generator
) -> Factors:
    """Factors that make Σ_ik importance_k·(Ŵ_ik − W_ik)² small.

    Args:
        weight: float32 [n, k], finite.
        rank: r, the columns of U and V.
        importance: float32 [k], above 0; None weighs all columns alike.
        iterations: of the alternation.
        generator: of the start, which is random.
    """
    n, k = weight.shape
    root = torch.ones(k) if importance is None else importance.sqrt()
    scaled = weight * root
    largest = scaled.abs().max()
    if not bool(largest > 0):
        return Factors(torch.zeros(n, rank), torch.zeros(k, rank), torch.zeros(n), torch.ones(rank), torch.ones(k))
    scaled = scaled / largest
    mean = scaled.square().mean().sqrt()
    scaled, unit = scaled / mean, largest * mean
    start = rank**-0.25
    left = torch.randn(n, rank, generator=generator) * start
    right = torch.randn(k, rank, generator=generator) * start
    nearest_left, nearest_right = _project(left), _project(right)
    over_left, over_right = left - nearest_left, right - nearest_right
    for step in range(iterations):
        penalty = (step + 1) / iterations
        left = _solve(scaled, nearest_right, nearest_left - over_left, penalty)
        nearest_left = _project(left + over_left)
        over_left += left - nearest_left
        right = _solve(scaled.t(), nearest_left, nearest_right - over_right, penalty)
        nearest_right = _project(right + over_right)
        over_right += right - nearest_right
    rows, of_left = _magnitudes(nearest_left)
    columns, of_right = _magnitudes(nearest_right)
    return Factors(
        nearest_left + over_left, nearest_right + over_right, unit * rows, of_left * of_right, columns / root
    )


def shrunk(mean_square: Tensor) -> Tensor | None:
    """What columns are weighed with: float32 [k], from the mean squares of activations; None where all are zero."""
    importance = torch.lerp(mean_square, mean_square.mean(), _SHRINK)
    return importance if bool(importance.min() > 0) else None


def _solve(target: Tensor, fixed: Tensor, near: Tensor, penalty: float) -> Tensor:
    """The X that has ‖target − X·fixedᵀ‖² + ρ‖X − near‖² least, ρ being the penalty over the mean of the diagonal."""
    system = fixed.t() @ fixed
    mean = system.diagonal().mean()
    system.diagonal().add_((penalty + _RIDGE) * mean)
    wanted = target @ fixed + (penalty * mean) * near
    return torch.cholesky_solve(wanted.t(), torch.linalg.cholesky(system)).t()


def _project(matrix: Tensor) -> Tensor:
    """The signs of a matrix times the best product of a column and a row of magnitudes."""
    rows, columns = _magnitudes(matrix)
    return torch.outer(rows, columns) * signs(matrix)


def _magnitudes(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The column, and the row of about unit mean, whose product is nearest to the magnitudes of a matrix."""
    sizes = matrix.abs()
    columns = sizes.mean(0)
    for _ in range(_POWER_STEPS):
        rows = sizes @ columns
        rows = rows / rows.norm().clamp_min(SMALLEST)
        columns = sizes.t() @ rows
    mean = columns.mean().clamp_min(SMALLEST)
    return rows * mean, columns / mean
