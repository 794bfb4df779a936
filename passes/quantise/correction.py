"""The correction of weights for errors that earlier layers have already made.

After QEP (Arai and Ichikawa, Quantization Error Propagation, NeurIPS 2025, arXiv 2504.09629): a site whose float model
reads X and whose quantised model reads X̂ is to give W·X, so not W but W* = W + α·W·(X − X̂)·X̂ᵀ·(X̂·X̂ᵀ + λI)⁻¹ is rounded.

What a site gives often goes straight into a sum, of a residual stream R that earlier layers have left off by R − R̂ (the
paper takes a layer alone). The sum is nearest to the float one where the site gives that too as far as it follows from
X̂, which adds ρ·(R − R̂)·X̂ᵀ·(X̂·X̂ᵀ + λI)⁻¹.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, fx

from hikui.lowering.engine.workers import Workers
from hikui.lowering.ir.program import CORRECTION, SITE, Program
from hikui.passes.graph import matrix_shape, weight_of
from hikui.passes.matrices import load_finite, row_parts
from hikui.passes.measure import linalg


class Settings(NamedTuple):
    """Of a site that is to be corrected.

    Attributes:
        alpha: α, how much of the correction of its own product is applied.
        damping: λ over the mean of the diagonal of X̂·X̂ᵀ.
        residual: ρ, how much of what it is added to is made up for.
    """

    alpha: float
    damping: float
    residual: float = 0.0


def note(settings: Settings) -> str:
    """What a site's metadata says of its correction."""
    return "/".join(repr(float(value)) for value in (settings if settings.residual else settings[:2]))


def settings(node: fx.Node) -> Settings:
    """Those of a site that has some."""
    return Settings(*map(float, str(node.meta[CORRECTION]).split("/")))


def correct(
    program: Program,
    nodes: list[fx.Node],
    gram: Tensor,
    cross: Tensor,
    workers: Workers,
    beside: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The corrected matrices of tied sites.

    Args:
        program: holds their weights.
        nodes: float sites with a correction.
        gram: float64 [k, k], E[x̂·x̂ᵀ]; factored in place on the way, and as before in the end.
        cross: float64 [k, k], E[(x − x̂)·x̂ᵀ].
        workers: share the rows.
        beside: float64 [n, k] by site, E[(r − r̂)·x̂ᵀ] of what it is added to.

    Returns:
        float32 [n, k] by site.
    """
    out: dict[str, Tensor] = {}
    diagonal = gram.diagonal().clone()
    for damping in sorted({settings(node).damping for node in nodes}):
        linalg.factor_upper(gram, damping, workers)
        for node in nodes:
            if settings(node).damping == damping:
                off = (beside or {}).get(node.meta[SITE])
                out[node.meta[SITE]] = _corrected(program, node, gram, cross, off, workers)
        linalg.unfactor(gram, diagonal)
    return out


def _corrected(
    program: Program, node: fx.Node, upper: Tensor, cross: Tensor, beside: Tensor | None, workers: Workers
) -> Tensor:
    n, k = matrix_shape(node)
    out = torch.empty(n, k)
    alpha, _, residual = settings(node)

    def fill(rows: slice) -> None:
        weight = load_finite(program, weight_of(node), node.meta[SITE], rows).double()
        off = None if beside is None else residual * beside[rows]
        out[rows] = corrected_rows(weight, alpha, upper, cross, off).float()

    workers.each(fill, row_parts(n, k))
    return out


def corrected_rows(weight: Tensor, alpha: float, upper: Tensor, cross: Tensor, beside: Tensor | None = None) -> Tensor:
    """W* of some rows, float64 [n, k], with the factor of E[x̂·x̂ᵀ], E[(x − x̂)·x̂ᵀ] and ρ·E[(r − r̂)·x̂ᵀ]."""
    off = alpha * (weight @ cross)
    return weight + linalg.solve_right(off if beside is None else off + beside, upper)
