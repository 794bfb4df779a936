"""Improves the factors of a matrix in the metric of its output: signs by coordinate descent, scales in closed form.

The alternation that finds factors (`binary_factors`) weighs columns, and sees nothing of how they go together. With
H = E[x·xᵀ], E‖(W−Ŵ)x‖² is a quadratic function of either factor while the other stays, and of each vector of scales
while the signs stay; taking turns never makes it larger.
"""

import torch
from torch import Tensor

from hikui.lowering.formats import SIGNS
from hikui.passes.quantise.binary_factors import Factors, signs
from hikui.passes.quantise.descent import descend
from hikui.passes.quantise.rounding import Rounded

_DAMPING = 1e-3
"""Of a factor's own least squares, over the mean of the diagonal."""

_SWEEPS = 2
"""Over the signs of the left factor, each time."""

_COLUMNS = 32
"""Of the right factor, in which signs turn side by side."""

_SHARE = 0.5
"""Of what signs gain each by itself that they may lose by turning together; else only the best of them turns."""

_LEAST = 1e-6
"""Of what a middle value is in the metric, over the mean: where a factor gives nothing it must stay above zero."""


def refine(weight: Tensor, factors: Factors, hessian: Tensor, rounds: int) -> Factors:
    """Lowers tr((W−Ŵ)·H·(W−Ŵ)ᵀ) from where it stands.

    Args:
        weight: W, float32 [n, k].
        factors: to start from.
        hessian: H, float32 [k, k], symmetric with a diagonal above zero.
        rounds: how often all of it has its turn, if each time the error falls.

    Returns:
        Factors with the same latents but for the signs that have changed, whose latents have changed sides.
    """
    least = error(weight, factors, hessian)
    for _ in range(rounds):
        now = _refit_columns(weight, _refit_middle(weight, factors, hessian), hessian)
        now = _turn_right(weight, _turn_left(weight, now, hessian), hessian)
        if not (after := error(weight, now, hessian)) < least:
            break
        factors, least = now, after
    return factors


def error(weight: Tensor, factors: Factors, hessian: Tensor) -> float:
    """tr((W−Ŵ)·H·(W−Ŵ)ᵀ)."""
    off = weight - factors.dense()
    return float((off @ hessian).mul_(off).sum(dtype=torch.float64))


def _turn_left(weight: Tensor, factors: Factors, hessian: Tensor) -> Factors:
    """U and s₁: a matrix of signs whose input is what V gives."""
    inner = _inner(factors)
    reached = inner @ hessian
    metric = reached @ inner.t()
    metric.diagonal().clamp_min_(_LEAST * float(metric.diagonal().mean()))
    damped = metric.double()
    damped.diagonal().add_(_DAMPING * damped.diagonal().mean())
    wanted = torch.linalg.solve(damped, (reached @ weight.t()).double()).t().float()
    start = Rounded(signs(factors.left).to(torch.int8), factors.rows.unsqueeze(1).clone())
    found = descend(wanted, start, SIGNS, metric, _SWEEPS)
    return factors._replace(left=_moved(factors.left, found.codes.float()), rows=found.scale[:, 0])


def _turn_right(weight: Tensor, factors: Factors, hessian: Tensor) -> Factors:
    """V: some columns of the input at a time, in each the sign that gains most, until none gains."""
    outer = factors.rows.unsqueeze(1) * signs(factors.left) * factors.middle
    gram = outer.t() @ outer
    now = signs(factors.right).t().contiguous()  # [r, k]
    slope = outer.t() @ (weight - outer @ (now * factors.columns)) @ hessian
    for start in range(0, weight.shape[1], _COLUMNS):
        columns = slice(start, start + _COLUMNS)
        scale, metric, held = factors.columns[columns], hessian[columns, columns], now[:, columns].clone()
        moved = _turn_columns(held, slope[:, columns].clone(), scale, gram, metric)
        now[:, columns] = held
        slope.sub_((gram @ moved) @ hessian[columns])
    return factors._replace(right=_moved(factors.right, now.t()))


def _turn_columns(held: Tensor, slope: Tensor, scale: Tensor, gram: Tensor, metric: Tensor) -> Tensor:
    """Turns signs of some columns, in place, until no single one lowers the error.

    Args:
        held: the signs, float32 [r, columns].
        slope: half of what the error falls by with each of their products with the scales: [r, columns], used up.
        scale: s₂: [columns].
        gram: of what the factors before give: [r, r].
        metric: H of these columns.

    Returns:
        What the products with the scales have changed by: [r, columns].
    """
    each = torch.arange(len(scale))
    curve = torch.outer(gram.diagonal(), metric.diagonal() * scale.square())
    apart = metric - metric.diagonal().diag()
    moved = torch.zeros_like(held)
    # Each step lowers the error, but for rounding, which must not go on for ever.
    for _ in range(held.numel()):
        # A quarter of what the error falls by when one sign turns, and how two of them go together.
        gain, best = (held * slope).mul_(-scale).sub_(curve).max(0)
        gains = gain > 0
        if not bool(gains.any()):
            break
        step = torch.where(gains, -2 * held[best, each] * scale, 0.0)
        rows = gram[best]
        together = 0.25 * float(step @ ((rows[:, best] * apart) @ step))
        if not together < _SHARE * float(gain[gains].sum()):
            step = torch.where(each == gain.argmax(), step, 0.0)
        held[best, each] = torch.where(step != 0, -held[best, each], held[best, each])
        moved[best, each] += step
        slope -= (rows.t() * step) @ metric
    return moved


def _refit_middle(weight: Tensor, factors: Factors, hessian: Tensor) -> Factors:
    """m: the solution of ((UᵀU) ∘ (V·H·Vᵀ))·m = diag(Uᵀ·W·H·V)."""
    outer, inner = factors.rows.unsqueeze(1) * signs(factors.left), signs(factors.right).t() * factors.columns
    reached = inner @ hessian
    along = ((outer.t() @ weight) * reached).sum(1)
    return factors._replace(middle=_solved(outer.t() @ outer, reached @ inner.t(), along))


def _refit_columns(weight: Tensor, factors: Factors, hessian: Tensor) -> Factors:
    """s₂: the same for the columns, of what they are multiplied with."""
    whole = (factors.rows.unsqueeze(1) * signs(factors.left) * factors.middle) @ signs(factors.right).t()
    return factors._replace(columns=_solved(whole.t() @ whole, hessian, (whole * (weight @ hessian)).sum(0)))


def _solved(one: Tensor, other: Tensor, right: Tensor) -> Tensor:
    system = one.double() * other.double()
    mean = float(system.diagonal().mean())
    system.diagonal().add_(_DAMPING * mean if mean > 0 else 1.0)
    found: Tensor = torch.linalg.solve(system, right.double())
    return found.float()


def _inner(factors: Factors) -> Tensor:
    """What is between the two factors, by what is read: float32 [r, k]."""
    return factors.middle.unsqueeze(1) * signs(factors.right).t() * factors.columns


def _moved(latent: Tensor, wanted: Tensor) -> Tensor:
    """The latents, with other signs where these are wanted."""
    return torch.where(signs(latent) == wanted, latent, -latent)
