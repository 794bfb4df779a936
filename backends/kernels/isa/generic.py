"""Any instruction set: plain TIR, one lane a row, for what has no sequence of its own, and for C compilers."""

from collections.abc import Sequence

from tvm.script import tirx as T

from hikui.backends.kernels.fields import CODEBOOKS, pieces, turn_quads
from hikui.backends.kernels.isa.base import Expression, Isa, Place, Scheme, Tile, splat, uniform, vector


def codes_of(kind: str, place: Place, field: int, column: int, lanes: int) -> Expression:
    """The values of one column as int32, one lane a row: codes of a codebook, of int8 and ternary, else stored fields.

    Args:
        kind: of the weights.
        place: the step.
        field: which four columns of the place.
        column: which of these.
        lanes: rows in a part.
    """
    value = None
    if kind == "ternary":
        return _ternary_code(vector(place.weight, place.line * 16 + place.part * lanes, lanes), field, column, lanes)
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


def _ternary_code(words: Expression, field: int, column: int, lanes: int) -> Expression:
    """The field-th code of a byte of each word; see `ternary`. The state is had by one product, above 24 zeros."""
    top = _up(words, 24 - 8 * column, lanes) & splat(T.int32(-(1 << 24)), lanes)
    times = T.cast(top, _typed("uint32", lanes)) * splat(T.uint32(3**field), lanes)
    state = T.cast(times, _typed("int32", lanes)) >> splat(T.int32(24), lanes)
    return (state * splat(T.int32(3), lanes) + splat(T.int32(128), lanes)) >> splat(T.int32(8), lanes)


def _typed(element: str, lanes: int) -> str:
    return f"{element}x{lanes}" if lanes > 1 else element


def _up(words: Expression, bits: int, lanes: int) -> Expression:
    """Shifted left as unsigned numbers: of signed ones C leaves it undefined."""
    if bits == 0:
        return words
    shift = T.uint32(bits) if lanes == 1 else splat(T.uint32(bits), lanes)
    return T.cast(T.cast(words, _typed("uint32", lanes)) << shift, _typed("int32", lanes))


def scheme(kind: str, lanes: int) -> Scheme:
    """How any instruction set multiplies a kind."""

    def dot(totals: Sequence[Expression], place: Place) -> list[Expression]:
        total = totals[0]
        for field in range(turn_quads(kind)):
            quad = place.quad(field)
            for column in range(4):
                values = codes_of(kind, place, field, column, lanes)
                total = total + values * splat(_up(quad, 24 - 8 * column, 1) >> T.int32(24), lanes)
        return [total]

    if kind in CODEBOOKS or kind in ("int8", "ternary"):
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
