"""Quantised key-value caches: one signed scale a token and head, codes of 8 or 4 bits.

int8: `codes` int8 [1, KV, C, D], −127…127. int4: `codes` uint8 [1, KV, C, D/2], −8…7; byte j of a token holds the codes
of columns j (low nibble) and j + D/2 (high nibble), each plus 8, so that a kernel turns neighbouring bytes into
neighbouring columns of either half. `scale` is float16 [1, KV, C]; a value is code · scale.

Rounding follows `activations.py`, against the scale as it is stored: the half-precision scale is known before the codes
are chosen, so its own rounding costs no accuracy of the codes.
"""

import torch
from torch import Tensor

CODE_TYPES = {"int8": torch.int8, "int4": torch.uint8}
"""Formats of a quantised cache, and the dtype that tells an op which one it is given."""

LARGEST_SCALE = 65504.0
"""The largest finite half."""


def cache_format(codes: torch.dtype) -> str:
    """The format whose codes have that dtype.

    Raises:
        ValueError: there is none.
    """
    for name, dtype in CODE_TYPES.items():
        if dtype == codes:
            return name
    raise ValueError(f"no quantised cache holds {codes}")


def quantize_cache(x: Tensor, fmt: str) -> tuple[Tensor, Tensor]:
    """Quantises rows of keys or values.

    int4 has one level more below zero than above. The scale takes the sign that puts the element of the largest
    magnitude there (the positive one of two alike), which makes the step an eighth of that magnitude, not a seventh.

    Args:
        x: float32 [..., D]; D even for int4.
        fmt: `int8` or `int4`.

    Returns:
        Codes int8 [..., D] or uint8 [..., D/2], and scale float16 [...]. A row whose scale a half cannot tell from 0
        (its largest magnitude is below about 4e-6 or 2e-7) gets codes of zero.
    """
    high, low = x.amax(dim=-1), x.amin(dim=-1)
    if fmt == "int8":
        scale, least, most = torch.maximum(high, -low) / 127, -127, 127
    else:
        scale, least, most = torch.where(high >= -low, high, low) * -0.125, -8, 7
    wide = scale.clamp(-LARGEST_SCALE, LARGEST_SCALE).to(torch.float16).float()
    wide = torch.where(wide != 0, wide, 0.0)  # no zero below zero, so that the bytes are the same everywhere
    inverse = torch.where(wide != 0, 1 / wide, 0.0)
    codes = (x * inverse.unsqueeze(-1)).round().clamp(least, most).to(torch.int8)
    scale = wide.to(torch.float16)
    if fmt == "int8":
        return codes, scale
    first, second = (codes + 8).to(torch.uint8).chunk(2, dim=-1)
    return first | (second << 4), scale


def dequantize_cache(codes: Tensor, scale: Tensor) -> Tensor:
    """The values that quantised rows stand for: float32 [..., D]; the dtype of `codes` says the format."""
    if cache_format(codes.dtype) == "int4":
        codes = torch.cat((codes & 15, codes >> 4), dim=-1).to(torch.int8) - 8
    return codes.float() * scale.float().unsqueeze(-1)
