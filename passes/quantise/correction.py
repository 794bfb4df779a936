"""The correction of weights for errors that earlier layers have already made.

After QEP (Arai and Ichikawa, Quantization Error Propagation, NeurIPS 2025, arXiv 2504.09629): a site whose float model
reads X and whose quantised model reads X̂ is to give W·X, so not W but W* = W + α·W·(X − X̂)·X̂ᵀ·(X̂·X̂ᵀ + λI)⁻¹ is rounded.
"""

import torch
from torch import Tensor, fx

from hikui.lowering.engine.workers import Workers
from hikui.lowering.ir.program import CORRECTION, SITE, Program
from hikui.passes.graph import matrix_shape, weight_of
from hikui.passes.matrices import load_finite, row_parts
from hikui.passes.measure import linalg


def note(alpha: float, damping: float) -> str:
    """What a site's metadata says of its correction."""
    return f"{float(alpha)!r}/{float(damping)!r}"


def settings(node: fx.Node) -> tuple[float, float]:
    """(α, damping) of a site that is to be corrected."""
    alpha, damping = str(node.meta[CORRECTION]).split("/")
    return float(alpha), float(damping)


def correct(program: Program, nodes: list[fx.Node], gram: Tensor, cross: Tensor, workers: Workers) -> dict[str, Tensor]:
    """The corrected matrices of tied sites.

    Args:
        program: holds their weights.
        nodes: float sites with a correction.
        gram: float64 [k, k], E[x̂·x̂ᵀ]; factored in place on the way, and as before in the end.
        cross: float64 [k, k], E[(x − x̂)·x̂ᵀ].
        workers: share the rows.

    Returns:
        float32 [n, k] by site.
    """
    out: dict[str, Tensor] = {}
    diagonal = gram.diagonal().clone()
    for damping in sorted({settings(node)[1] for node in nodes}):
        linalg.factor_upper(gram, damping, workers)
        for node in nodes:
            alpha, own = settings(node)
            if own == damping:
                out[node.meta[SITE]] = _corrected(program, node, alpha, gram, cross, workers)
        linalg.unfactor(gram, diagonal)
    return out


def _corrected(program: Program, node: fx.Node, alpha: float, upper: Tensor, cross: Tensor, workers: Workers) -> Tensor:
    n, k = matrix_shape(node)
    out = torch.empty(n, k)

    def fill(rows: slice) -> None:
        weight = load_finite(program, weight_of(node), node.meta[SITE], rows).double()
        out[rows] = corrected_rows(weight, alpha, upper, cross).float()

    workers.each(fill, row_parts(n, k))
    return out


def corrected_rows(weight: Tensor, alpha: float, upper: Tensor, cross: Tensor) -> Tensor:
    """W* of some rows, float64 [n, k], with the factor of E[x̂·x̂ᵀ] and E[(x − x̂)·x̂ᵀ]."""
    return weight + alpha * linalg.solve_right(weight @ cross, upper)
