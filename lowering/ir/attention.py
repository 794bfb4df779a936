"""Scaled dot-product attention that leaves out what no query sees."""

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """As `torch.nn.functional.scaled_dot_product_attention`, which goes through all keys of a cache that holds few.

    Args:
        query: [..., T, width].
        key: [..., S, width].
        value: [..., S, width].
        attn_mask: bool, true where a query sees a key, or float, −∞ where it does not: [..., T, S]. Keys behind the
            last one that any query sees are left out; a query that sees none gives NaN or what torch makes of it.
        dropout_p: as torch's.
        is_causal: as torch's.
        scale: as torch's.
        enable_gqa: as torch's.

    Returns:
        [..., T, width].
    """
    if attn_mask is not None:
        seen = attn_mask if attn_mask.dtype == torch.bool else attn_mask != float("-inf")
        reached = seen.flatten(0, -2).any(0).nonzero()
        if len(reached) and seen.shape[-1] == key.shape[-2]:
            stop = int(reached[-1]) + 1
            key, value, attn_mask = key[..., :stop, :], value[..., :stop, :], attn_mask[..., :stop]
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
