"""What a kernel may ask of an instruction set: a table of building blocks, apart from the kernels.

Each sibling file describes one instruction set with the compiler's intrinsics; a kernel never names an instruction.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from tvm.script import tirx as T

Expression = Any
"""A TIR expression; TVM ships no types for them."""

Buffer = Any
"""A TIR buffer."""

QUADS = 8
"""Activation quads (4 neighbouring int8 values) in one step of 32 input columns."""

LINES = {"int4": 4, "int8": 8}
"""64-byte weight lines in one step of 32 input columns."""


class Tile(NamedTuple):
    """How much one pass over the weights computes: `rows` of activations × `blocks` of 16 output rows."""

    rows: int
    blocks: int


@dataclass(frozen=True)
class Isa:
    """One instruction set.

    Attributes:
        name: suffix of the kernels' symbols.
        triple: the userland it belongs to.
        cpu: LLVM's name of the least CPU.
        attributes: LLVM features added to it.
        lanes: int32 lanes in a register; 16 output rows take 16 // lanes registers.
        offsets: what `dot` sees added to every weight code, by format; the kernel takes offset · Σ activations off.
        dot: `dot(kind, accumulator, weight, line, part, quads, first)`: adds the products of one step of 32 input
            columns to an int32 accumulator of `lanes` output rows. `line` is the first weight line of the step, `part`
            which `lanes` of the 16 rows, `quads` the activations as int32, `first` the step's first quad.
        single: tile of a product with one row of activations.
        many: tile of a product with several.
        float_single, float_many: the same for float weights.
    """

    name: str
    triple: str
    cpu: str
    attributes: tuple[str, ...]
    lanes: int
    offsets: dict[str, int]
    dot: Callable[[str, Expression, Buffer, Expression, Expression, Buffer, Expression], Expression]
    single: Tile
    many: Tile
    float_single: Tile
    float_many: Tile

    @property
    def parts(self) -> int:
        return 16 // self.lanes


def vector(buffer: Buffer, start: Expression, lanes: int) -> Expression:
    """`lanes` neighbouring elements of a buffer."""
    return buffer[T.ramp(start, 1, lanes)]


def splat(value: Expression, lanes: int) -> Expression:
    """A vector of one value."""
    return T.broadcast(value, lanes)


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


def nibbles(line: Expression, lanes: int) -> tuple[Expression, Expression]:
    """The low and the high nibbles of uint8 lanes: 0…15, which as signed bytes are the same."""
    return line & splat(T.uint8(15), lanes), line >> splat(T.uint8(4), lanes)
