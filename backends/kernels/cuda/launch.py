"""How each kernel is started: symbol, grid and arguments, from the tensors of a product.

The functions mirror the CPU library's (docs/architecture.md): the same tensors in the same packed layout. They check
nothing; where the tensors lie is the caller's affair.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hikui.backends.kernels.cuda.kernels import (
    FLOAT_ROWS,
    INTEGER_ROWS,
    dense_symbol,
    integer_symbol,
    weight_only_symbol,
)
from hikui.lowering.formats import KINDS, MIXED, ROWS, SUM_WIDTH, activation_k

_THREADS = (32, 8)


@dataclass(frozen=True)
class Launch:
    """One kernel to start.

    Attributes:
        symbol: the kernel.
        grid, threads: x and y.
        arguments: in the kernel's order; tensors stand for their pointers, numbers are int32.
    """

    symbol: str
    grid: tuple[int, int]
    threads: tuple[int, int]
    arguments: tuple[Tensor | int, ...]


def tile(m: int, rows: Sequence[int]) -> int:
    """The smallest tile that takes m rows of activations at once, else the largest: then the weights are read again."""
    return next((count for count in rows if m <= count), rows[-1])


def integer(
    kind: str,
    q: Tensor,
    q_scale: Tensor,
    q_sums: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    y: Tensor,
    b: Tensor | None = None,
    t: Tensor | None = None,
) -> Launch:
    """Y = q · Wᵀ + bias + t · Bᵀ; for 16 rows and more the kernel of 8 rows, in several passes over the weights.

    Args:
        kind: of the weights.
        q: int8 [M, Kq].
        q_scale: float32 [M].
        q_sums: int32 [M, Kq/32].
        weight: packed.
        scale: float16 [N16, G, 16].
        bias: float32 [N], or empty for none.
        y: float32 [M, N].
        b: float16 [N16, rank, 16]; None for no branch.
        t: float32 [M, rank], A x.
    """
    m, n = y.shape
    rows = tile(m, INTEGER_ROWS)
    groups = scale.shape[1]
    steps = _steps(kind, weight, groups, q.shape[1])
    rank = 0 if t is None else t.shape[1]
    pointers = (q, q_scale, q_sums, weight, scale, bias, bias if b is None else b, bias if t is None else t, y)
    sizes = (m, n, q.shape[1] // SUM_WIDTH, weight.shape[1], groups, _factor(steps, groups), steps, rank)
    return Launch(integer_symbol(kind, rows), _grid(m, n, rows), _THREADS, (*pointers, *sizes, int(bias.numel() > 0)))


def weight_only(kind: str, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, y: Tensor) -> Launch:
    """Y = x · Wᵀ + bias for float32 or float16 x [M, K]; y float32 [M, N]; the rest as `integer`."""
    m, n = y.shape
    rows = tile(m, FLOAT_ROWS)
    groups = scale.shape[1]
    steps = _steps(kind, weight, groups, activation_k(x.shape[1]))
    symbol = weight_only_symbol(kind, str(x.dtype).removeprefix("torch."), rows)
    sizes = (m, n, x.shape[1], weight.shape[1], groups, _factor(steps, groups), steps, int(bias.numel() > 0))
    return Launch(symbol, _grid(m, n, rows), _THREADS, (x, weight, scale, bias, y, *sizes))


def dense(kind: str, x: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Launch:
    """Y = x · Wᵀ + bias for weights [N16, K, 16] of `kind`; A x of a branch is such a product."""
    m, n = y.shape
    rows = tile(m, FLOAT_ROWS)
    sizes = (m, n, x.shape[1], int(bias.numel() > 0))
    return Launch(dense_symbol(kind, rows), _grid(m, n, rows), _THREADS, (x, weight, bias, y, *sizes))


def quantize_activation(
    x: Tensor, q: Tensor, scale: Tensor, sums: Tensor, suffix: str = "", step: Tensor | None = None
) -> Launch:
    """The three tensors of `integer` from x float32 [M, K]; `suffix` is a key of `kernels.QUANTIZERS`."""
    m, k = x.shape
    pointers = (x, x if step is None else step, q, scale, sums)
    return Launch(f"hikui_quantize_activation{suffix}", (m, 1), _THREADS, (*pointers, m, k))


def _grid(m: int, n: int, rows: int) -> tuple[int, int]:
    return -(-n // ROWS), -(-m // rows)


def _steps(kind: str, weight: Tensor, groups: int, quantised: int) -> int:
    if kind == MIXED:
        return quantised // SUM_WIDTH
    return groups * KINDS[kind].columns_of(weight.shape[1] // groups) // SUM_WIDTH


def _factor(steps: int, groups: int) -> int:
    """What `block.group_of` makes a step's group of, as an int32 of the same bits."""
    factor = 0 if groups == 1 else -(-(1 << 31) // (steps // groups))
    return factor - (factor >> 31 << 32)
