"""Fields to bytes and back: one function pair for each number of bits.

Fields arrive as uint8 [blocks, quads, 16, 4]: quad f of a step of eight holds columns 32s+4f … 32s+4f+3 of 16 rows.
Lines leave as uint8 [blocks, lines, 16, 4]. docs/architecture.md has the bits in a table.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hikui.lowering.formats.kinds import TERNARY_COLUMNS

_QUADS = 8
"""Quads in a step of 32 columns."""

_DIGITS = TERNARY_COLUMNS // 4
"""Ternary codes in a byte."""

# Where int3 keeps fields 0…5: byte of the step, and the lowest of the three bits.
_WHOLE = tuple((field // 2, 3 * (field % 2)) for field in range(6))


def to_lines(fields: Tensor, bits: int) -> Tensor:
    """Packs fields of 1, 2, 3 or 4 bits.

    Args:
        fields: uint8 [blocks, quads, 16, 4], quads a multiple of eight.
        bits: of a field.

    Returns:
        uint8 [blocks, quads·bits/8, 16, 4].
    """
    if bits == 3:
        return _three_bits(fields)
    share = 8 // bits
    quads = fields.unflatten(1, (-1, share))
    lines: Tensor = quads[:, :, 0].clone()
    for place in range(1, share):
        lines |= quads[:, :, place] << (place * bits)
    return lines


def from_lines(lines: Tensor, bits: int) -> Tensor:
    """The fields that `to_lines` packed: uint8 [blocks, quads, 16, 4]."""
    if bits == 3:
        return _from_three_bits(lines)
    mask = (1 << bits) - 1
    return torch.stack([(lines >> (place * bits)) & mask for place in range(8 // bits)], dim=2).flatten(1, 2)


def to_ternary_lines(fields: Tensor, groups: int) -> Tensor:
    """Packs codes −1, 0 and 1, which are one less than their fields, five to a byte.

    A byte is an integer s of −128 … 127 such that its first code is 3s/256 to the nearest integer, and what this leaves
    modulo 256 holds the second in the same way, and so on. No multiplication beyond 3s is needed to read them, and the
    sum of products of each code is the difference of two products of bytes: 256 · code = 3s − s′.

    Args:
        fields: uint8 [blocks, quads, 16, 4].
        groups: how many there are, of quads/groups quads each; the last line of each is filled with zeros.

    Returns:
        uint8 [blocks, groups · ⌈quads / groups / 5⌉, 16, 4].
    """
    codes = fields.unflatten(1, (groups, -1)).to(torch.int32) - 1
    codes = F.pad(codes, (0, 0, 0, 0, 0, -codes.shape[2] % _DIGITS)).unflatten(2, (-1, _DIGITS))
    places = torch.tensor([3**place for place in reversed(range(_DIGITS))], dtype=torch.int32)
    number = (codes * places.view(-1, 1, 1)).sum(3)
    # The nearest integer to number · 256 / 3⁵; as that is odd, never half-way.
    nearest = torch.div(512 * number + 3**_DIGITS, 2 * 3**_DIGITS, rounding_mode="floor")
    return nearest.to(torch.int8).view(torch.uint8).flatten(1, 2)


def from_ternary_lines(lines: Tensor, groups: int) -> Tensor:
    """The codes that `to_ternary_lines` packed, quads that fill the last line of a group left out: int8."""
    state, codes = lines.view(torch.int8).to(torch.int16), []
    for _ in range(_DIGITS):
        code = (3 * state + 128) >> 8
        codes.append(code.to(torch.int8))
        state = 3 * state - (code << 8)
    held = torch.stack(codes, dim=2).unflatten(1, (groups, -1)).flatten(2, 3)
    there: Tensor = held[:, :, : held.shape[2] // _QUADS * _QUADS]
    return there.flatten(1, 2)


def _three_bits(fields: Tensor) -> Tensor:
    step = fields.unflatten(1, (-1, _QUADS))
    lines = torch.zeros((*step.shape[:2], 3, *step.shape[3:]), dtype=torch.uint8)
    for field, (byte, shift) in enumerate(_WHOLE):
        lines[:, :, byte] |= step[:, :, field] << shift
    # The last two fields are cut: two bits beside fields 0 and 1 (4 and 5), the third bit in the middle byte.
    lines[:, :, 0] |= (step[:, :, 6] & 3) << 6
    lines[:, :, 2] |= (step[:, :, 7] & 3) << 6
    lines[:, :, 1] |= (step[:, :, 6] >> 2) << 7 | (step[:, :, 7] >> 2) << 6
    return lines.flatten(1, 2)


def _from_three_bits(lines: Tensor) -> Tensor:
    low, middle, high = lines.unflatten(1, (-1, 3)).unbind(2)
    step = (low, middle, high)
    fields = [(step[byte] >> shift) & 7 for byte, shift in _WHOLE]
    fields.append(low >> 6 | middle >> 7 << 2)
    fields.append(high >> 6 | (middle >> 6 & 1) << 2)
    return torch.stack(fields, dim=2).flatten(1, 2)
