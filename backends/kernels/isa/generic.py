"""Any instruction set: plain TIR, one lane a row, for what has no sequence of its own, and for C compilers."""

from collections.abc import Sequence

from tvm.script import tirx as T

from hikui.backends.kernels.fields import CODEBOOKS, pieces
from hikui.backends.kernels.isa.base import Expression, Isa, Place, Scheme, Tile, splat, uniform, vector


def codes_of(kind: str, place: Place, field: int, column: int, lanes: int) -> Expression:
    """The values of one column of a step as int32, one lane a row: codes of a codebook and of int8, else stored fields.

    Args:
        kind: of the weights.
        place: the step.
        field: which four columns of the step.
        column: which of these.
        lanes: rows in a part.
    """
    value = None
    for piece in pieces(kind)[field]:
        words = vector(place.weight, (place.line + piece.line) * 16 + place.part * lanes, lanes)
        if kind == "int8":
            return _up(words, 24 - 8 * column, lanes) >> splat(T.int32(24), lanes)
        down = 8 * column + piece.bit - piece.to
        if down:
            words = words >> splat(T.int32(down), lanes) if down > 0 else _up(words, -down, lanes)
        bits = words & splat(T.int32(((1 << piece.width) - 1) << piece.to), lanes)
        value = bits if value is None else value | bits
    return place.codebook[value] if kind in CODEBOOKS else value


def _up(words: Expression, bits: int, lanes: int) -> Expression:
    """Shifted left as unsigned numbers: of signed ones C leaves it undefined."""
    if bits == 0:
        return words
    suffix = f"x{lanes}" if lanes > 1 else ""
    shift = T.uint32(bits) if lanes == 1 else splat(T.uint32(bits), lanes)
    return T.cast(T.cast(words, f"uint32{suffix}") << shift, f"int32{suffix}")


def scheme(kind: str, lanes: int) -> Scheme:
    """How any instruction set multiplies a kind."""

    def dot(totals: Sequence[Expression], place: Place) -> list[Expression]:
        total = totals[0]
        for field in range(8):
            quad = place.quad(field)
            for column in range(4):
                values = codes_of(kind, place, field, column, lanes)
                total = total + values * splat(_up(quad, 24 - 8 * column, 1) >> T.int32(24), lanes)
        return [total]

    if kind in CODEBOOKS or kind == "int8":
        return Scheme("generic", dot, (0,), 1, 0, CODEBOOKS.get(kind))
    return uniform(kind, "generic", dot)


ISA = Isa(
    name="portable",
    triple="",
    cpu="",
    attributes=(),
    lanes=16,
    scheme=lambda kind, size: scheme(kind, 16),
    tile=lambda kind, size: Tile(rows=1, blocks=1),
    float_single=Tile(rows=1, blocks=1),
    float_many=Tile(rows=1, blocks=1),
    classes={"single": "single", "few": "single", "many": "single"},
)
