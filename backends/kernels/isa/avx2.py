"""AVX2 without VNNI: 8 output rows × 4 input columns in a register, products of bytes summed in 16 bits."""

from collections.abc import Callable, Sequence

from tvm.script import tirx as T

from hikui.backends.kernels.fields import CODEBOOKS, LINES, pieces
from hikui.backends.kernels.isa import ternary
from hikui.backends.kernels.isa.base import (
    Expression,
    Isa,
    Place,
    Scheme,
    Tile,
    constant,
    field_values,
    intrinsic,
    line_bytes,
    splat,
    uniform,
)

_LANES = 8
_MOST = 32767
_LARGEST = 127
"""Of an activation."""


def _bytes(value: Expression) -> Expression:
    return T.reinterpret("int8x32", value)


def _pairs(unsigned: Expression, signed: Expression) -> Expression:
    """Sums of two neighbouring products, int16. vpmaddubsw saturates; the callers say why it cannot here."""
    return intrinsic("int16x16", "llvm.x86.avx2.pmadd.ub.sw", _bytes(unsigned), _bytes(signed))


def _widened(pairs: Expression) -> Expression:
    """Sums of two neighbouring int16 values, int32."""
    return intrinsic("int32x8", "llvm.x86.avx2.pmadd.wd", pairs, splat(T.int16(1), 16))


def _quad(place: Place, index: int) -> Expression:
    return splat(place.quad(index), _LANES)


def _lines(kind: str, place: Place) -> list[Expression]:
    return [line_bytes(place, i, _LANES) for i in range(LINES[kind])]


def _masked(codes: Expression, mask: int) -> Expression:
    return codes & splat(T.uint8(mask), 32)


Dot = Callable[[Sequence[Expression], Place], list[Expression]]


def _unsigned(kind: str, largest: int) -> Dot:
    """Fields brought down; as many pairs as int16 holds for certain are added before they are widened."""
    most = _MOST // (2 * largest * _LARGEST)

    def dot(totals: Sequence[Expression], place: Place) -> list[Expression]:
        pairs = [
            _pairs(value, _quad(place, i))
            for i, value in enumerate(field_values(_lines(kind, place), pieces(kind), 32))
        ]
        return [_added(totals[0], pairs, most)]

    return dot


def _added(total: Expression, pairs: Sequence[Expression], most: int) -> Expression:
    for start in range(0, len(pairs), most):
        together = pairs[start]
        for pair in pairs[start + 1 : start + most]:
            together = together + pair
        total = total + _widened(together)
    return total


def _sign(totals: Sequence[Expression], place: Place) -> list[Expression]:
    """Bits used where they lie: 1, 2, 4 or 8 times an activation; two quads of each stay below 8 · 127 · 4."""
    line = _lines("sign", place)[0]
    sums: list[Expression] = []
    for half, codes in enumerate((line, line >> splat(T.uint8(4), 32))):
        for bit in range(4):
            pair = _pairs(_masked(codes, 1 << bit), _quad(place, 4 * half + bit))
            if half:
                sums[bit] = sums[bit] + pair
            else:
                sums.append(pair)
    value = sums[3]
    for bit in (2, 1, 0):
        value = (value >> splat(T.int16(1), 16)) + sums[bit]
    return [totals[0] + _widened(value)]


def _signed(codes: Sequence[Expression], place: Place, most: int) -> list[Expression]:
    """|w| · ±a, for codes of either sign."""
    pairs = []
    for i, code in enumerate(codes):
        quad = intrinsic("int8x32", "llvm.x86.avx2.psign.b", _bytes(_quad(place, i)), _bytes(code))
        pairs.append(_pairs(T.abs(_bytes(code)), quad))
    return [_added(T.broadcast(T.int32(0), _LANES), pairs, most)]


def _codebook(kind: str) -> Dot:
    codes = CODEBOOKS[kind]
    table = constant(codes * 2, "int8")

    def dot(totals: Sequence[Expression], place: Place) -> list[Expression]:
        indices = field_values(_lines(kind, place), pieces(kind), 32)
        values = [intrinsic("int8x32", "llvm.x86.avx2.pshuf.b", table, _bytes(index)) for index in indices]
        most = _MOST // (2 * max(map(abs, codes)) * _LARGEST)
        return [totals[0] + _signed(values, place, most)[0]]

    return dot


def _int8(totals: Sequence[Expression], place: Place) -> list[Expression]:
    # Both are at most 127 in magnitude, so two products stay within int16.
    return [totals[0] + _signed(_lines("int8", place), place, 1)[0]]


def _ternary(totals: Sequence[Expression], place: Place) -> list[Expression]:
    """Activations with the sign of a code, or zero, need no product; their sums with ones do not saturate."""
    ones = splat(T.uint8(1), 32)
    sums = None
    for i, code in enumerate(ternary.codes(line_bytes(place, 0, _LANES), 32)):
        pair = _pairs(ones, intrinsic("int8x32", "llvm.x86.avx2.psign.b", _bytes(_quad(place, i)), code))
        sums = pair if sums is None else sums + pair
    return [totals[0] + _widened(sums)]


def _scheme(kind: str, size: str) -> Scheme:
    if kind == "ternary":
        return Scheme("avx2 signs", _ternary, (0,), 1, 0)
    if kind == "int8":
        return Scheme("avx2", _int8, (0,), 1, 0)
    if kind in CODEBOOKS:
        return Scheme("avx2 table", _codebook(kind), (0,), 1, 0)
    if kind == "sign":
        return uniform(kind, "avx2 in place", _sign)
    largest = {"int2": 3, "int3": 7, "int4": 15}[kind]
    return uniform(kind, "avx2", _unsigned(kind, largest))


ISA = Isa(
    name="avx2",
    triple="x86_64-linux-gnu",
    cpu="x86-64-v3",
    attributes=(),
    lanes=_LANES,
    scheme=_scheme,
    tile=lambda kind, size: Tile(rows=1, blocks=4) if size == "single" else Tile(rows=4, blocks=1),
    float_single=Tile(rows=1, blocks=4),
    float_many=Tile(rows=4, blocks=1),
    classes={"many": "few"},
)
