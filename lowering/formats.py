"""Weight formats: how a matrix is stored, and how many bits that truly takes.

One packed layout serves every CPU: a block holds 16 output rows side by side, so a kernel adds 16 rows without a
horizontal sum, and 4 neighbouring input columns, which is what the integer dot products of VNNI and NEON take.
docs/architecture.md has the layout in a table.
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hikui.lowering.errors import UsageError

ROWS = 16
"""Output rows in a block of the packed layout."""

SUM_WIDTH = 32
"""Input columns that share one entry of an activation's `sums`; every group is a multiple of it."""

ACTIVATION_PADDING = 128
"""Quantised activations are padded to this many columns, the widest group."""

GROUPS = (32, 64, 128)
_INTEGER_BITS = {"int4": 4, "int8": 8}
_FLOAT_DTYPES = {"float16": torch.float16, "float32": torch.float32}
_LEVELS = {"int4": (-8, 7), "int8": (-127, 127)}


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


class Packed(NamedTuple):
    """A packed matrix: `weight` and, for integer formats, `scale` (float16)."""

    weight: Tensor
    scale: Tensor | None


@dataclass(frozen=True)
class Format:
    """A symmetric integer format with a group, or a plain float one.

    Attributes:
        kind: `int4`, `int8`, `float16` or `float32`.
        group: input columns that share a scale; None is one scale a row (and the only value for floats).
    """

    kind: str
    group: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in _INTEGER_BITS and self.kind not in _FLOAT_DTYPES:
            known = ", ".join([*_INTEGER_BITS, *_FLOAT_DTYPES])
            raise UsageError(f"Format '{self.kind}' is not known; the formats are {known}.")
        if self.group is not None and (not self.is_integer or self.group not in GROUPS):
            raise UsageError(
                f"Format '{self.kind}' cannot have a group of {self.group}; integer formats take "
                f"{', '.join(map(str, GROUPS))} or channel, float formats take none."
            )

    @staticmethod
    def parse(text: str) -> "Format":
        """Reads `int4-g64`, `int8-channel`, `float16`, …

        Raises:
            UsageError: the text names no format.
        """
        match = re.fullmatch(r"(int4|int8)-(?:g(\d+)|channel)|(float16|float32)", text.strip())
        if match is None:
            raise UsageError(
                f"Format '{text}' is not known; "
                "write for example int4-g64, int8-g128, int4-channel, float16 or float32."
            )
        return Format(match[1] or match[3], int(match[2]) if match[2] else None)

    def __str__(self) -> str:
        if not self.is_integer:
            return self.kind
        return f"{self.kind}-channel" if self.group is None else f"{self.kind}-g{self.group}"

    @property
    def is_integer(self) -> bool:
        return self.kind in _INTEGER_BITS

    @property
    def bits(self) -> int:
        """Bits of one stored value, without scales and padding."""
        return _INTEGER_BITS[self.kind] if self.is_integer else _FLOAT_DTYPES[self.kind].itemsize * 8

    @property
    def levels(self) -> tuple[int, int]:
        """The smallest and the largest integer value."""
        return _LEVELS[self.kind]

    @property
    def weight_dtype(self) -> torch.dtype:
        return {"int4": torch.uint8, "int8": torch.int8, **_FLOAT_DTYPES}[self.kind]

    def group_size(self, k: int) -> int:
        """Columns in a group for a matrix of k input columns: a group above k becomes the channel."""
        if self.group is None or self.group > k:
            return _round_up(k, SUM_WIDTH)
        return self.group

    def padded_k(self, k: int) -> int:
        return _round_up(k, self.group_size(k)) if self.is_integer else k

    def groups(self, k: int) -> int:
        return self.padded_k(k) // self.group_size(k)

    def weight_shape(self, n: int, k: int) -> tuple[int, ...]:
        blocks = -(-n // ROWS)
        if self.kind == "int4":
            return (blocks, self.padded_k(k) // 8, ROWS, 4)
        if self.kind == "int8":
            return (blocks, self.padded_k(k) // 4, ROWS, 4)
        return (blocks, k, ROWS)

    def scale_shape(self, n: int, k: int) -> tuple[int, ...] | None:
        return (-(-n // ROWS), self.groups(k), ROWS) if self.is_integer else None

    def nbytes(self, n: int, k: int) -> int:
        """Bytes of the packed matrix, scales and padding counted."""
        weight = torch.Size(self.weight_shape(n, k)).numel() * self.weight_dtype.itemsize
        scale = self.scale_shape(n, k)
        return weight + (torch.Size(scale).numel() * torch.float16.itemsize if scale else 0)

    def true_bits(self, n: int, k: int) -> float:
        """Bits per weight of an n×k matrix, scales and padding counted."""
        return 8 * self.nbytes(n, k) / (n * k)

    def notes(self, n: int, k: int) -> list[str]:
        """What a reader of the report should know of this format on an n×k matrix."""
        out = []
        if self.group is not None and self.group > k:
            out.append(f"group {self.group} is wider than K={k}: one group for the whole channel")
        elif self.is_integer and self.padded_k(k) != k:
            out.append(f"K={k} is padded to {self.padded_k(k)} to fill the last group of {self.group_size(k)}")
        if n % ROWS:
            out.append(f"N={n} is padded to {_round_up(n, ROWS)} rows")
        return out


def pack(fmt: Format, values: Tensor, scale: Tensor | None = None) -> Packed:
    """Packs a matrix into the layout of its format.

    Args:
        fmt: the format.
        values: integer codes (any integer dtype) for an integer format, else the weights; [n, k].
        scale: one scale a row and group, [n, groups], for integer formats; rounded to float16.

    Raises:
        ValueError: a code is outside the format's levels, or shapes do not fit.
    """
    n, k = values.shape
    n16 = _round_up(n, ROWS)
    if not fmt.is_integer:
        padded = F.pad(values.to(fmt.weight_dtype), (0, 0, 0, n16 - n))
        return Packed(padded.view(n16 // ROWS, ROWS, k).transpose(1, 2).contiguous(), None)
    low, high = fmt.levels
    if values.numel() and (int(values.min()) < low or int(values.max()) > high):
        raise ValueError(f"{fmt} takes codes from {low} to {high}")
    if scale is None or scale.shape != (n, fmt.groups(k)):
        raise ValueError(f"{fmt} of a {n}×{k} matrix takes scales of shape ({n}, {fmt.groups(k)})")
    kp = fmt.padded_k(k)
    codes = F.pad(values.to(torch.int8), (0, kp - k, 0, n16 - n)).view(n16 // ROWS, ROWS, kp // 4, 4).transpose(1, 2)
    scales = F.pad(scale.to(torch.float16), (0, 0, 0, n16 - n)).view(n16 // ROWS, ROWS, -1).transpose(1, 2)
    if fmt.kind == "int8":
        return Packed(codes.contiguous(), scales.contiguous())
    nibbles = (codes + 8).to(torch.uint8)
    return Packed((nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)).contiguous(), scales.contiguous())


def unpack_codes(fmt: Format, weight: Tensor, n: int, k: int) -> Tensor:
    """The integer codes of a packed matrix: int8 [n, k]."""
    if fmt.kind == "int4":
        low = (weight & 15).to(torch.int8) - 8
        high = (weight >> 4).to(torch.int8) - 8
        weight = torch.stack((low, high), dim=2).flatten(1, 2)
    blocks = weight.shape[0]
    return weight.transpose(1, 2).reshape(blocks * ROWS, -1)[:n, :k].contiguous()


def unpack_scale(fmt: Format, scale: Tensor, n: int, k: int) -> Tensor:
    """The scales of a packed matrix: float32 [n, groups]."""
    return scale.transpose(1, 2).reshape(scale.shape[0] * ROWS, fmt.groups(k))[:n].float()


def unpack(fmt: Format, weight: Tensor, scale: Tensor | None, n: int, k: int) -> Tensor:
    """The matrix that a packed one stands for: float32 [n, k]."""
    if not fmt.is_integer:
        return weight.transpose(1, 2).reshape(weight.shape[0] * ROWS, k)[:n].float()
    assert scale is not None, "integer formats have scales"
    wide = unpack_scale(fmt, scale, n, k).repeat_interleave(fmt.group_size(k), dim=1)[:, :k]
    return unpack_codes(fmt, weight, n, k).float() * wide


def activation_k(k: int) -> int:
    """Columns of a quantised activation of k values."""
    return _round_up(k, ACTIVATION_PADDING)


def quantize_activation(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantises activations to int8, one scale a token.

    Args:
        x: float32 [..., K].

    Returns:
        q int8 [..., Kq], zero beyond K; scale float32 [...] = max|x|/127; sums int32 [..., Kq/32] of 32 neighbours.
    """
    largest = x.abs().amax(dim=-1)
    inverse = torch.where(largest > 0, 127.0 / largest, 0.0)
    q = (x * inverse.unsqueeze(-1)).round().clamp(-127, 127).to(torch.int8)
    q = F.pad(q, (0, activation_k(x.shape[-1]) - x.shape[-1]))
    sums = q.unflatten(-1, (-1, SUM_WIDTH)).to(torch.int32).sum(-1, dtype=torch.int32)
    return q, largest / 127.0, sums
