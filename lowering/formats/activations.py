"""Quantised activations: int8 or int4 a token, or int8 with a step fixed beforehand, in the same three tensors."""

import torch
import torch.nn.functional as F
from torch import Tensor

from hikui.lowering.formats.format import SUM_WIDTH, activation_k

_LARGEST = {8: 127, 4: 7}

TINY = 2.0**-100
"""Rows whose largest magnitude is no more than this count as zero: its inverse would not be finite."""


def quantize_activation(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Quantises activations with one scale a token.

    Args:
        x: float32 [..., K].
        bits: 8 (codes −127…127) or 4 (codes −7…7, held in int8 too).

    Returns:
        q int8 [..., Kq], zero beyond K; scale float32 [...] = max|x|/127 (or /7); sums int32 [..., Kq/32] of 32
        neighbours.
    """
    high = _LARGEST[bits]
    largest = x.abs().amax(dim=-1)
    inverse = torch.where(largest > TINY, high / largest, 0.0)
    q = (x * inverse.unsqueeze(-1)).round().clamp(-high, high)
    return _finish(q, largest / high)


def quantize_activation_static(x: Tensor, step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantises activations to int8 with a step known beforehand; what is beyond 127 steps is clipped.

    Args:
        x: float32 [..., K].
        step: float32 [1]; 0 makes every code 0.

    Returns:
        As `quantize_activation`; scale is `step` for every token.
    """
    q = torch.where(step > 0, x / step, 0.0).round().clamp(-127, 127)
    return _finish(q, step.reshape(()).expand(x.shape[:-1]).clone(memory_format=torch.contiguous_format))


def _finish(q: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    k = q.shape[-1]
    q = F.pad(q.to(torch.int8), (0, activation_k(k) - k))
    return q, scale, q.unflatten(-1, (-1, SUM_WIDTH)).to(torch.int32).sum(-1, dtype=torch.int32)
