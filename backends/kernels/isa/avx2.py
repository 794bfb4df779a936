"""AVX2 without VNNI: 8 output rows × 4 input columns in a register, products of bytes summed in 16 bits."""

from tvm.script import tirx as T

from hikui.backends.kernels.isa.base import LINES, Buffer, Expression, Isa, Tile, intrinsic, nibbles, splat, vector


def _pairs(unsigned: Expression, signed: Expression) -> Expression:
    """Sums of two neighbouring products, int16. vpmaddubsw saturates; the callers say why it cannot here."""
    return intrinsic("int16x16", "llvm.x86.avx2.pmadd.ub.sw", unsigned, signed)


def _widened(pairs: Expression) -> Expression:
    """Sums of two neighbouring int16 values, int32."""
    return intrinsic("int32x8", "llvm.x86.avx2.pmadd.wd", pairs, splat(T.int16(1), 16))


def _bytes(value: Expression) -> Expression:
    return T.reinterpret("int8x32", value)


def _dot(
    kind: str, total: Expression, weight: Buffer, line: Expression, part: Expression, quads: Buffer, first: Expression
) -> Expression:
    sums = None
    for i in range(LINES[kind]):
        codes = vector(weight, (line + i) * 64 + part * 32, 32)
        if kind == "int4":
            # 16 products of at most 15 · 127 stay within int16: 16 · 1905 = 30480.
            for j, nibble in enumerate(nibbles(codes, 32)):
                pairs = _pairs(_bytes(nibble), _bytes(splat(quads[first + 2 * i + j], 8)))
                sums = pairs if sums is None else sums + pairs
        else:
            # |w| · ±a: both are at most 127 in magnitude, so two products stay within int16.
            magnitude = T.abs(_bytes(codes))
            quad = intrinsic("int8x32", "llvm.x86.avx2.psign.b", _bytes(splat(quads[first + i], 8)), _bytes(codes))
            total = total + _widened(_pairs(magnitude, quad))
    return total if sums is None else total + _widened(sums)


ISA = Isa(
    name="avx2",
    triple="x86_64-linux-gnu",
    cpu="x86-64-v3",
    attributes=(),
    lanes=8,
    offsets={"int4": 8, "int8": 0},
    dot=_dot,
    single=Tile(rows=1, blocks=4),
    many=Tile(rows=4, blocks=1),
    float_single=Tile(rows=1, blocks=4),
    float_many=Tile(rows=4, blocks=1),
)
