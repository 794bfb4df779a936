"""The large symmetric matrices of calibration: sums of outer products, their factors, and products with them.

Everything works in place on fixed tiles, which threads share out: K = 11008 takes 0.97 GB a matrix, and the tiles, not
the threads, decide in which order numbers are added.
"""

import torch
from torch import Tensor

from hikui.lowering.engine.workers import Workers

_TILE = 1024


def _ends(size: int) -> list[tuple[int, int]]:
    return [(start, min(start + _TILE, size)) for start in range(0, size, _TILE)]


def add_gram(total: Tensor, x: Tensor, workers: Workers) -> None:
    """Total += xᵀ·x in its upper tiles only; `mirror` completes it.

    The products of one call are added up in float32 and the calls in float64.

    Args:
        total: float64 [k, k].
        x: float32 [t, k].
        workers: share the tiles.
    """
    ends = _ends(total.shape[0])

    def add(tile: tuple[tuple[int, int], tuple[int, int]]) -> None:
        (a, b), (c, d) = tile
        total[a:b, c:d] += x[:, a:b].t() @ x[:, c:d]

    workers.each(add, [(row, column) for row in ends for column in ends if column >= row])


def add_cross(total: Tensor, x: Tensor, y: Tensor, workers: Workers) -> None:
    """Total += xᵀ·y; float64 [n, k] += float32 [t, n]ᵀ · float32 [t, k]."""
    rows, columns = map(_ends, total.shape)

    def add(tile: tuple[tuple[int, int], tuple[int, int]]) -> None:
        (a, b), (c, d) = tile
        total[a:b, c:d] += x[:, a:b].t() @ y[:, c:d]

    workers.each(add, [(row, column) for row in rows for column in columns])


def mirror(total: Tensor) -> None:
    """Completes a symmetric matrix from its upper tiles."""
    ends = _ends(total.shape[0])
    for a, b in ends:
        square = total[a:b, a:b]
        square.copy_(square.triu() + square.triu(1).t())
        for c, d in ends:
            if c > a:
                total[c:d, a:b] = total[a:b, c:d].t()


def permuted(matrix: Tensor, order: Tensor) -> Tensor:
    """A symmetric matrix with rows and columns in another order, and nothing of its size beside the two.

    Args:
        matrix: [k, k].
        order: int64 [k].
    """
    out = torch.empty_like(matrix)
    for a, b in _ends(matrix.shape[0]):
        torch.index_select(matrix[order[a:b]], 1, order, out=out[a:b])
    return out


def factor_upper(matrix: Tensor, damping: float, workers: Workers) -> float:
    """Factors M + λI = U·Uᵀ with U upper triangular, in place; what lies below U is not to be read.

    λ is `damping` times the mean of the diagonal (1 where that is zero), and ten times as much as often as M + λI is
    not positive definite in float64.

    Args:
        matrix: float64 [k, k], symmetric and positive semidefinite; becomes U.
        damping: above zero.
        workers: share the tiles.

    Returns:
        The damping that it took.

    Raises:
        ValueError: the matrix is not finite.
    """
    mean = float(matrix.diagonal().mean())
    if not bool(torch.isfinite(matrix.sum())):
        raise ValueError("the matrix holds NaN or infinity")
    unit = mean if mean > 0 else 1.0
    diagonal = matrix.diagonal().clone()
    while True:
        matrix.diagonal().copy_(diagonal + damping * unit)
        if _factor(matrix, workers):
            return damping
        unfactor(matrix, diagonal)
        damping *= 10


def unfactor(matrix: Tensor, diagonal: Tensor) -> None:
    """Takes back a factorisation, which only wrote on and above the diagonal.

    Args:
        matrix: what `factor_upper` has changed.
        diagonal: float64 [k], as it was before.
    """
    matrix.diagonal().copy_(diagonal)
    ends = _ends(matrix.shape[0])
    for a, b in ends:
        square = matrix[a:b, a:b]
        square.copy_(square.tril() + square.tril(-1).t())
        for c, d in ends:
            if c > a:
                matrix[a:b, c:d] = matrix[c:d, a:b].t()


def _factor(matrix: Tensor, workers: Workers) -> bool:
    """From the last tile to the first: the corner's factor, the panel above it, the update of what is left."""
    ends = _ends(matrix.shape[0])
    for last in range(len(ends) - 1, -1, -1):
        a, b = ends[last]
        # U·Uᵀ = S is L·Lᵀ = S with rows and columns turned round.
        lower, info = torch.linalg.cholesky_ex(_symmetric(matrix[a:b, a:b]).flip(0, 1))
        if int(info):
            return False
        corner = lower.flip(0, 1)
        above = ends[:last]

        def panel(rows: tuple[int, int], a: int = a, b: int = b, corner: Tensor = corner) -> None:
            c, d = rows
            # P·Uᵀ = S, so Pᵀ = U⁻¹·Sᵀ.
            solved = torch.linalg.solve_triangular(corner, matrix[c:d, a:b].t(), upper=True)
            matrix[c:d, a:b] = solved.t()

        def update(tile: tuple[tuple[int, int], tuple[int, int]], a: int = a, b: int = b) -> None:
            (c, d), (e, f) = tile
            product = matrix[c:d, a:b] @ matrix[e:f, a:b].t()
            # What lies below the diagonal stays as it was: `unfactor` needs it.
            matrix[c:d, e:f] -= product.triu() if c == e else product

        matrix[a:b, a:b].copy_(torch.triu(corner) + torch.tril(matrix[a:b, a:b], -1))
        workers.each(panel, above)
        workers.each(update, [(row, column) for row in above for column in above if column >= row])
    return True


def _symmetric(square: Tensor) -> Tensor:
    """The symmetric matrix that the upper half of a tile on the diagonal stands for."""
    return square.triu() + square.triu(1).t()


def solve_right(rows: Tensor, upper: Tensor) -> Tensor:
    """Rows · (U·Uᵀ)⁻¹ for the factor of `factor_upper`: float64 [n, k]."""
    half = torch.linalg.solve_triangular(upper, rows.t(), upper=True)
    out: Tensor = torch.linalg.solve_triangular(upper.t(), half, upper=False).t()
    return out
