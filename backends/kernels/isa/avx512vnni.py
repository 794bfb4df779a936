"""AVX-512 with VNNI: 16 output rows × 4 input columns in one register, unsigned × signed products."""

from tvm.script import tirx as T

from hikui.backends.kernels.isa.base import LINES, Buffer, Expression, Isa, Tile, intrinsic, nibbles, splat, vector


def _accumulate(total: Expression, codes: Expression, quad: Expression) -> Expression:
    return intrinsic(
        "int32x16",
        "llvm.x86.avx512.vpdpbusd.512",
        total,
        T.reinterpret("int8x64", codes),
        T.reinterpret("int8x64", splat(quad, 16)),
    )


def _dot(
    kind: str, total: Expression, weight: Buffer, line: Expression, part: Expression, quads: Buffer, first: Expression
) -> Expression:
    for i in range(LINES[kind]):
        codes = vector(weight, (line + i) * 64, 64)
        if kind == "int4":
            low, high = nibbles(codes, 64)
            total = _accumulate(total, low, quads[first + 2 * i])
            total = _accumulate(total, high, quads[first + 2 * i + 1])
        else:
            total = _accumulate(total, codes ^ splat(T.uint8(128), 64), quads[first + i])
    return total


ISA = Isa(
    name="avx512vnni",
    triple="x86_64-linux-gnu",
    cpu="x86-64-v4",
    attributes=("+avx512vnni",),
    lanes=16,
    offsets={"int4": 8, "int8": 128},
    dot=_dot,
    # Weights in memory, 4096×4096 on Zen 4: 1 block 1.3–1.6, 2 blocks 1.1, 8 blocks 1.4–1.6 times the time of 4;
    # software prefetch only cost time.
    single=Tile(rows=1, blocks=4),
    many=Tile(rows=4, blocks=4),
    float_single=Tile(rows=1, blocks=4),
    float_many=Tile(rows=4, blocks=4),
)
