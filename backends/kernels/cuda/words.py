"""Four neighbouring codes as the four bytes of one register, from the packed words of a step.

A byte is `word`, and the code that it stands for (word − offset) · factor: fields are left at the bits where fewest
shifts are needed, and kernels take the offset off once for 32 columns and put the factor into the scale.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from tvm.script import tirx as T

from hikui.backends.kernels.fields import FACTOR, OFFSET, QUADS, Expression, pieces
from hikui.lowering.formats import FP4, NF4

# The bit that a field's lowest bit goes to. Of int3 and int2 one field in two or four then needs no shift; those that
# move up are shifted by the multiplier, which leaves the other pipe to the masks. A bit of sign becomes the byte's top.
_PLACE = {"sign": 7, "int2": 4, "int3": 3, "int4": 0}


_CODEBOOKS = {"nf4": NF4, "fp4": FP4}

Load = Callable[[int], Expression]
"""The packed word of a line of the step."""


@dataclass(frozen=True)
class Words:
    """How the codes of one kind leave the packed words.

    Attributes:
        offset: what bytes are above the codes (times the factor).
        factor: the code for one unit of a byte; a power of two, so that a scale times it is exact.
        field: `field(load, f)` is the int32 that holds columns 4f … 4f+3 of a step, or of ternary a line, `load(l)` the
            packed word of its line l.
    """

    offset: int
    factor: float
    field: Callable[[Load, int], Expression]


def signed(kind: str) -> Words:
    """Bytes −128…127, for integer dot products."""
    if kind == "int8":
        return Words(0, 1.0, _as_stored)
    if kind == "ternary":
        return Words(1, 1.0, _ternary)
    if kind in _CODEBOOKS:
        return Words(0, 1.0, _looked_up(_CODEBOOKS[kind], 0))
    offset, factor = _uniform(kind)
    # The only bit of sign is the byte's sign: −128 for a set bit, not 128.
    return Words(-offset, -factor, _masked(kind)) if kind == "sign" else Words(offset, factor, _masked(kind))


def unsigned(kind: str) -> Words:
    """Bytes 0…255, for conversion to float."""
    if kind == "int8":
        return Words(128, 1.0, _flipped)
    if kind == "ternary":
        return signed(kind)
    if kind in _CODEBOOKS:
        return Words(128, 1.0, _looked_up(_CODEBOOKS[kind], 128))
    return Words(*_uniform(kind), _masked(kind))


def unpack(words: Words, codes: Any, packed: Any, first: Expression, quads: int = QUADS) -> None:
    """Fills codes[4f + r] with field f of row r of a step; the word of line l, row r is packed[first + 4l + r]."""
    for row in range(4):

        def load(line: int, row: int = row) -> Expression:
            return packed[first + (line * 4 + row)]

        for f in range(quads):
            T.buffer_store(codes, words.field(load, f), [f * 4 + row])


def _as_stored(load: Load, f: int) -> Expression:
    return load(f)


def _flipped(load: Load, f: int) -> Expression:
    return load(f) ^ _every_byte(0x80)


def _uniform(kind: str) -> tuple[int, float]:
    unit = 1 << _PLACE[kind]
    offset = Fraction(OFFSET[kind] * unit, FACTOR[kind])
    assert offset.denominator == 1, "a field is placed where its offset is whole"
    return int(offset), FACTOR[kind] / unit


def _masked(kind: str) -> Callable[[Load, int], Expression]:
    place, fields = _PLACE[kind], pieces(kind)

    def field(load: Load, f: int) -> Expression:
        parts = []
        for piece in fields[f]:
            target = piece.to + place
            part = _shifted(load(piece.line), piece.bit - target)
            parts.append(part & _every_byte(((1 << piece.width) - 1) << target))
        return parts[0] if len(parts) == 1 else parts[0] | parts[1]

    return field


def _ternary(load: Load, f: int) -> Expression:
    """The codes plus one: a byte plus 128 is t, 3ᶠ·t modulo 256 a state, and of thrice that the upper byte is a code.

    Even and odd bytes are apart in halves of words, where 81 · 255 fits.
    """
    word = load(0) ^ _every_byte(0x80)
    pair = _int32(0x00FF00FF)

    def tripled(half: Expression) -> Expression:
        state = half if f == 0 else (half * T.int32(3**f)) & pair
        return state * T.int32(3)

    return _permuted(tripled(word & pair), tripled(_shifted(word, 8) & pair), _int32(0x7351))


def _looked_up(codes: tuple[int, ...], offset: int) -> Callable[[Load, int], Expression]:
    """Sixteen bytes in four registers; `__byte_perm` picks four of eight by the three low bits of a nibble.

    A word's eight nibbles are looked up in both halves of the table and the half chosen by their top bits, then the low
    nibbles (an even field) and the high ones (an odd field) are brought together.
    """
    values = bytes((code + offset) & 0xFF for code in codes)
    table = [_int32(int.from_bytes(values[first : first + 4], "little")) for first in range(0, 16, 4)]

    def four(word: Expression, half: int) -> Expression:
        index = _shifted(word & _every_byte(0x77), 16 * half)
        choice = _shifted((_shifted(word, 1) & _every_byte(0x44)) | _int32(0x32103210), 16 * half)
        return _permuted(_permuted(table[0], table[1], index), _permuted(table[2], table[3], index), choice)

    def field(load: Load, f: int) -> Expression:
        word = load(f // 2)
        return _permuted(four(word, 0), four(word, 1), _int32(0x7531 if f % 2 else 0x6420))

    return field


def _permuted(low: Expression, high: Expression, selector: Expression) -> Expression:
    return T.call_pure_extern("int32", "__byte_perm", low, high, selector)


def _shifted(word: Expression, right: int) -> Expression:
    """`word` moved down, or up where negative; the sign bits that come in from above are masked off by the caller."""
    if right == 0:
        return word
    return word >> T.int32(right) if right > 0 else word << T.int32(-right)


def _every_byte(value: int) -> Expression:
    return _int32(value * 0x01010101)


def _int32(value: int) -> Expression:
    return T.int32(value - (1 << 32) if value >= 1 << 31 else value)
