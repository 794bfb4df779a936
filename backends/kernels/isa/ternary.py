"""Ternary codes, five to a byte, as kernels read them.

A byte is the first of a chain of states s, integers modulo 256, of which each is three times the one before. A code is
3s/256 to the nearest integer, so that 256 · code = 3s − s′: two comparisons tell it, or nothing needs to, for the sum
of products with codes follows from two sums of products with states.
"""

from collections.abc import Sequence
from itertools import pairwise

from tvm import tirx
from tvm.script import tirx as T

from hikui.backends.kernels.fields import DIGITS
from hikui.backends.kernels.isa.base import Expression, intrinsic, splat

_HALF = 42
"""Three times this is the largest multiple of three below half of 256."""

NAME = "differences"
"""What kernels that multiply states are called by."""


def states(line: Expression, count: int, lanes: int) -> list[Expression]:
    """The first states of a line: of its bytes as they are stored, which are signed, or of these plus 128; uint8.

    Args:
        line: `lanes` bytes.
        count: of states.
        lanes: bytes of a register.
    """
    out = [line]
    for _ in range(count - 1):
        out.append(_added(_added(out[-1], out[-1], lanes), out[-1], lanes))
    return out


def pairs(line: Expression, lanes: int) -> list[tuple[Expression, Expression]]:
    """For each of the quads of a line the states s and s′ that its codes are the difference of."""
    return list(pairwise(states(line, DIGITS + 1, lanes)))


def of_differences(sums: Sequence[Expression], lanes: int) -> Expression:
    """The sum of products with codes, of those with the states s and with the states s′; exact."""
    whole, rest = sums
    return (whole * splat(T.int32(3), lanes) - rest) >> splat(T.int32(8), lanes)


def codes(line: Expression, lanes: int) -> list[Expression]:
    """The codes −1, 0, 1 of each quad of a line, int8."""
    return [_where(state, "<", -_HALF, lanes) - _where(state, ">", _HALF, lanes) for state in _signed(line, lanes)]


FIELD = 6
"""The bit that `fields` begin at."""


def fields(line: Expression, lanes: int) -> list[Expression]:
    """The codes plus one, in the two upper bits of bytes, from a line whose states are above zero by 128; uint8.

    They are the whole part of 3t/256 for a state t plus 128, and that of 3t/4 is t − ⌈⌈t/2⌉/2⌉.
    """
    upper = splat(T.uint8(3 << FIELD), lanes)
    return [(state - _halved(_halved(state, lanes), lanes)) & upper for state in states(line, DIGITS, lanes)]


def _halved(values: Expression, lanes: int) -> Expression:
    """Half of each byte, rounded up: the mean with zero, for which x86 has an instruction."""
    wide = T.cast(values, f"uint16x{lanes}") + T.broadcast(T.uint16(1), lanes)
    return T.cast(wide >> T.broadcast(T.uint16(1), lanes), f"uint8x{lanes}")


def _added(left: Expression, right: Expression, lanes: int) -> Expression:
    """The sum modulo 256, by an instruction that LLVM does not look into.

    It would make products with 9, 27 and 81 of the additions, which no x86 has for bytes, and which take an ARM core as
    long as four additions.
    """
    everywhere = T.broadcast(T.bool(True), lanes)
    return intrinsic(f"uint8x{lanes}", "llvm.vp.add", left, right, everywhere, T.uint32(lanes))


def _signed(line: Expression, lanes: int) -> list[Expression]:
    return [T.reinterpret(f"int8x{lanes}", state) for state in states(line, DIGITS, lanes)]


def _where(state: Expression, relation: str, bound: int, lanes: int) -> Expression:
    """−1 where a state is above or below a bound, else 0: what comparisons of vectors give."""
    limit = splat(T.int8(bound), lanes)
    holds = state < limit if relation == "<" else state > limit
    return tirx.Select(holds, splat(T.int8(-1), lanes), splat(T.int8(0), lanes))
