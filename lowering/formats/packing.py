"""Packing a matrix into the layout of its format, and reading it back."""

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hikui.lowering.formats.format import ROWS, Format, Segment, round_up
from hikui.lowering.formats.kinds import KINDS
from hikui.lowering.formats.layout import from_lines, from_ternary_lines, to_lines, to_ternary_lines

_NONE = 255
"""In a table of fields by code: no field."""


class Packed(NamedTuple):
    """A packed matrix: `weight` and, for integer formats, `scale` (float16)."""

    weight: Tensor
    scale: Tensor | None


def pack(fmt: Format, values: Tensor, scale: Tensor | None = None) -> Packed:
    """Packs a matrix into the layout of its format.

    Args:
        fmt: the format.
        values: integer codes (any integer dtype) for an integer format, else the weights; [n, k]. For `mixed` the
            columns stand in their permuted order.
        scale: one scale a row and group, [n, groups], for integer formats; rounded to float16.

    Raises:
        ValueError: a code is none of the format's levels, or shapes do not fit.
        UsageError: `mixed` wants more int4 columns than there are.
    """
    n, k = values.shape
    n16 = round_up(n, ROWS)
    if not fmt.is_integer:
        padded = F.pad(values.to(fmt.weight_dtype), (0, 0, 0, n16 - n))
        return Packed(padded.view(n16 // ROWS, ROWS, k).transpose(1, 2).contiguous(), None)
    if scale is None or scale.shape != (n, fmt.groups(k)):
        raise ValueError(f"{fmt} of a {n}×{k} matrix takes scales of shape ({n}, {fmt.groups(k)})")
    segments, group = fmt.segments(fmt.padded_k(k)), fmt.group_size(k)
    lines = torch.cat([_pack_segment(part, values[:, part.start : part.stop], group) for part in segments], 1)
    return Packed(lines.contiguous(), pack_scale(scale))


def pack_scale(scale: Tensor) -> Tensor:
    """The scales of a packed matrix, float16 [blocks, groups, 16], from [n, groups]."""
    n16 = round_up(scale.shape[0], ROWS)
    padded = F.pad(scale.to(torch.float16), (0, 0, 0, n16 - scale.shape[0]))
    return padded.view(n16 // ROWS, ROWS, -1).transpose(1, 2).contiguous()


def unpack_codes(fmt: Format, weight: Tensor, n: int, k: int) -> Tensor:
    """The integer codes of a packed matrix: int8 [n, k]."""
    parts, first, group = [], 0, fmt.group_size(k)
    for part in fmt.segments(fmt.padded_k(k)):
        groups = (part.stop - part.start) // group
        last = first + groups * KINDS[part.format.kind].lines_of(group)
        parts.append(_codes(part.format.kind, weight[:, first:last], groups))
        first = last
    quads = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return quads.transpose(1, 2).reshape(weight.shape[0] * ROWS, -1)[:n, :k].contiguous()


def unpack_scale(fmt: Format, scale: Tensor, n: int, k: int) -> Tensor:
    """The scales of a packed matrix: float32 [n, groups]."""
    return scale.transpose(1, 2).reshape(scale.shape[0] * ROWS, fmt.groups(k))[:n].float()


def unpack(fmt: Format, weight: Tensor, scale: Tensor | None, n: int, k: int) -> Tensor:
    """The matrix that a packed one stands for: float32 [n, k]; for `mixed` in the permuted order of its columns."""
    if not fmt.is_integer:
        return weight.transpose(1, 2).reshape(weight.shape[0] * ROWS, k)[:n].float()
    assert scale is not None, "integer formats have scales"
    wide = unpack_scale(fmt, scale, n, k).repeat_interleave(fmt.group_size(k), dim=1)[:, :k]
    return unpack_codes(fmt, weight, n, k).float() * wide


def _fields(part: Segment, values: Tensor) -> Tensor:
    """The stored fields of codes, in the shape of the codes.

    Raises:
        ValueError: a code is none of the levels.
    """
    levels, kind = part.format.levels, part.format.kind
    inside = not values.numel() or (int(values.min()) >= levels[0] and int(values.max()) <= levels[-1])
    if inside and KINDS[kind].codes is None:
        return values.to(torch.int8)
    if inside and KINDS[kind].step:
        above = values.to(torch.int8) - levels[0]
        if KINDS[kind].step == 1:
            return above.to(torch.uint8)
        if not bool((above & 1).any()):
            return (above >> 1).to(torch.uint8)
    elif inside:
        fields = _fields_by_code(kind).index_select(0, (values.to(torch.int32) + 128).flatten()).view(values.shape)
        if not bool((fields == _NONE).any()):
            return fields
    gapless = levels == tuple(range(levels[0], levels[-1] + 1))
    named = f"codes from {levels[0]} to {levels[-1]}" if gapless else f"the codes {', '.join(map(str, levels))}"
    raise ValueError(f"{part.format} takes {named}")


def _pack_segment(part: Segment, values: Tensor, group: int) -> Tensor:
    """Lines [blocks, lines, 16, 4] of a segment, in groups of so many columns, whose last columns may be padding."""
    n, k = values.shape
    kind = KINDS[part.format.kind]
    width, n16 = part.stop - part.start, round_up(n, ROWS)
    padded = F.pad(_fields(part, values), (0, width - k, 0, n16 - n), value=kind.padding)
    quads = padded.view(n16 // ROWS, ROWS, width // 4, 4).transpose(1, 2)
    if kind.lines is None:
        return to_ternary_lines(quads, width // group)
    return quads if kind.codes is None else to_lines(quads, kind.bits)


def _codes(kind: str, lines: Tensor, groups: int) -> Tensor:
    """Codes int8 [blocks, quads, 16, 4] of lines that hold so many groups."""
    codes, step = KINDS[kind].codes, KINDS[kind].step
    if codes is None:
        return lines
    if KINDS[kind].lines is None:
        return from_ternary_lines(lines, groups)
    if step:
        return from_lines(lines, KINDS[kind].bits).to(torch.int8) * step + codes[0]
    fields = from_lines(lines, KINDS[kind].bits)
    return _codes_by_field(kind).index_select(0, fields.flatten().to(torch.int32)).view(fields.shape)


@cache
def _fields_by_code(kind: str) -> Tensor:
    """uint8 [256]: the field of code c at c+128; of two fields for one code the first."""
    table = torch.full((256,), _NONE, dtype=torch.uint8)
    codes = KINDS[kind].codes
    assert codes is not None
    for field in reversed(range(len(codes))):
        table[codes[field] + 128] = field
    return table


@cache
def _codes_by_field(kind: str) -> Tensor:
    """int8, one entry for each field that the bits can hold; those that mean nothing stand for 0."""
    codes = KINDS[kind].codes
    assert codes is not None
    return torch.tensor([*codes, *[0] * (2 ** KINDS[kind].bits - len(codes))], dtype=torch.int8)
