"""Fields to bytes and back: one function pair for each number of bits.

Fields arrive as uint8 [blocks, quads, 16, 4]: quad f of a step of eight holds columns 32s+4f … 32s+4f+3 of 16 rows.
Lines leave as uint8 [blocks, lines, 16, 4]. docs/architecture.md has the bits in a table.
"""

import torch
from torch import Tensor

_QUADS = 8
"""Quads in a step of 32 columns."""

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
