"""What a kernel may ask of an instruction set: a table of building blocks, apart from the kernels.

Each sibling file describes one instruction set with the compiler's intrinsics; a kernel never names an instruction.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tvm import tirx
from tvm.script import tirx as T

from hikui.backends.kernels.fields import FACTOR, OFFSET

Expression = Any
"""A TIR expression; TVM ships no types for them."""

Buffer = Any
"""A TIR buffer."""

SIZES = ("single", "few", "many")
"""Classes of products by rows of activations: 1, 2…15, 16 and more."""


class Tile(NamedTuple):
    """How much one pass over the weights computes: `rows` of activations × `blocks` of 16 output rows."""

    rows: int
    blocks: int


class Place(NamedTuple):
    """Where a step of 32 input columns lies, or of `ternary` a line of 20.

    Attributes:
        weight: the weights as int32, 16 values a line.
        line: the step's first line.
        part: which registers' worth of the 16 output rows.
        quads: the activations as int32.
        first: the step's first quad.
        stride: how far the next quad is.
        codebook: the scheme's table as a buffer of int32, where it has one.
        left: how many quads there are; those beyond count as zeros. None: all that the lines hold.
    """

    weight: Buffer
    line: Expression
    part: Expression
    quads: Buffer
    first: Expression
    stride: int = 1
    codebook: Buffer = None
    left: Expression = None

    def quad(self, index: int) -> Expression:
        """A quad of the step."""
        if self.left is None:
            return self.quads[self.first + index * self.stride]
        there = self.quads[self.first + T.min(T.int64(index), self.left - 1) * self.stride]
        return tirx.Select(T.int64(index) < self.left, there, T.int32(0))


Dot = Callable[[Sequence[Expression], Place], Sequence[Expression]]


@dataclass(frozen=True)
class Scheme:
    """How an instruction set multiplies weights of one kind.

    Attributes:
        name: what `hikui targets --kernels` calls it.
        dot: adds the products of a step to the accumulators, int32 vectors of one part of the 16 output rows.
        shifts: one entry an accumulator: it holds its sum times 2^shift. Fields that are used where they lie in their
            byte need no instruction to bring them down, but an accumulator of their own.
        factor, offset: a code is factor · v − offset for the value v that `dot` multiplies.
        codebook: a table that `dot` reads, if it needs one in memory.
        sum: `sum(accumulators, lanes)` is the sum of products, where it is another than what shifts and factor say.
    """

    name: str
    dot: Dot
    shifts: tuple[int, ...]
    factor: int
    offset: int
    codebook: tuple[int, ...] | None = None
    sum: Callable[[Sequence[Expression], int], Expression] | None = None


def uniform(kind: str, name: str, dot: Dot, shifts: tuple[int, ...] = (0,)) -> Scheme:
    """A scheme that multiplies the stored fields of a kind with evenly spaced codes."""
    return Scheme(name, dot, shifts, FACTOR[kind], OFFSET[kind])


Builder = Callable[["Isa", str, str, str], Any]
"""`build(isa, kind, size, symbol)` gives the TIR function of a kernel of another structure than `linear.integer`."""


@dataclass(frozen=True)
class Special:
    """A kernel of a structure of its own.

    Attributes:
        name: what `hikui targets --kernels` calls it.
        blocks: blocks of 16 output rows that a position stands for.
        build: makes the function, of the type `integer_kernel`.
        prepare: symbol of the C function `prepare_kernel` that turns activations into what the kernel reads instead,
            or None; compiled by `prepare_build`.
        prepared_bytes: bytes of that for a step of 32 columns of one row.
    """

    name: str
    blocks: int
    build: Builder
    prepare: str | None = None
    prepare_build: Callable[["Isa", str], Any] | None = None
    prepared_bytes: int = 0


@dataclass(frozen=True)
class Isa:
    """One instruction set.

    Attributes:
        name: suffix of the kernels' symbols.
        triple: the userland it belongs to; empty for the portable one.
        cpu: LLVM's name of the least CPU.
        attributes: LLVM features added to it.
        lanes: int32 lanes in a register; 16 output rows take 16 // lanes registers.
        scheme: `scheme(kind, size)` says how a kind is multiplied.
        tile: `tile(kind, size)` says how much is computed at once; kind may be `mixed`.
        float_single, float_many: tiles of products with float weights.
        special: kernels of other structures, by kind and size.
        classes: the size class whose kernel serves a class; absent where each has its own.
    """

    name: str
    triple: str
    cpu: str
    attributes: tuple[str, ...]
    lanes: int
    scheme: Callable[[str, str], Scheme]
    tile: Callable[[str, str], Tile]
    float_single: Tile
    float_many: Tile
    special: dict[tuple[str, str], Special] = field(default_factory=dict)
    classes: dict[str, str] = field(default_factory=dict)

    @property
    def parts(self) -> int:
        return 16 // self.lanes


def vector(buffer: Buffer, start: Expression, lanes: int) -> Expression:
    """`lanes` neighbouring elements of a buffer."""
    return buffer[T.ramp(start, 1, lanes)]


def splat(value: Expression, lanes: int) -> Expression:
    """A vector of one value."""
    return T.broadcast(value, lanes)


def constant(values: Sequence[int], dtype: str) -> Expression:
    """A vector of constants."""
    return tirx.Shuffle([tirx.const(value, dtype) for value in values], list(range(len(values))))


def to_float(value: Expression, lanes: int) -> Expression:
    """Lanes converted to float32."""
    return T.cast(value, f"float32x{lanes}")


def unrolled(extent: int) -> Any:
    """A loop that is unrolled, over int64 like every index of the kernels."""
    return T.unroll(T.int64(extent))


def intrinsic(dtype: str, name: str, *arguments: Expression) -> Expression:
    """A call of an LLVM intrinsic that only computes."""
    return T.call_llvm_pure_intrin(dtype, name, *arguments)


def prefetch(buffer: Buffer, index: Expression) -> Expression:
    """Asks for the cache line of an element that will be read soon."""
    read, keep, data = T.int32(0), T.int32(3), T.int32(1)
    return T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", T.address_of(buffer[index]), read, keep, data))


def line_bytes(place: Place, line: int, lanes: int) -> Expression:
    """The bytes of one part of a line of the step: uint8, 4 · lanes of them."""
    start = (place.line + line) * 16 + place.part * lanes
    return T.reinterpret(f"uint8x{4 * lanes}", vector(place.weight, start, lanes))


def field_values(lines: Sequence[Expression], pieces: Sequence[Sequence[Any]], lanes: int) -> list[Expression]:
    """The 8 fields of a step, each brought down to its value: uint8 vectors."""
    return [_brought(lines, field, lanes) for field in pieces]


def _brought(lines: Sequence[Expression], field: Sequence[Any], lanes: int) -> Expression:
    value = None
    for piece in field:
        codes = lines[piece.line]
        down = piece.bit - piece.to
        if down > 0:
            codes = codes >> splat(T.uint8(down), lanes)
        elif down < 0:
            codes = codes << splat(T.uint8(-down), lanes)
        if piece.bit + piece.width < 8 or down <= 0 or piece.to:
            codes = codes & splat(T.uint8(((1 << piece.width) - 1) << piece.to), lanes)
        value = codes if value is None else value | codes
    return value
