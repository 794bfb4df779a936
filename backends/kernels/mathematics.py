"""Mathematical functions as TIR expressions, the same on every instruction set and free of libm."""

from typing import Any

from tvm import tirx
from tvm.script import tirx as T

Expression = Any

_LOG2_E = 1.4426950408889634
# ln 2 in two parts (Cody and Waite), so that n · ln 2 is exact to float32 for every n that occurs.
_LN2_HIGH = 0.693359375
_LN2_LOW = -2.12194440e-4
_SMALLEST, _LARGEST = -87.3, 88.37
_TAYLOR = (1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0)


def _constant(value: float, lanes: int) -> Expression:
    return T.float32(value) if lanes == 1 else T.broadcast(T.float32(value), lanes)


def exponential(x: Expression, lanes: int) -> Expression:
    """e^x in float32 to a few units in the last place; x is clipped to −87.3…88.37.

    x = n·ln 2 + r with |r| ≤ ln 2 / 2; e^r by its Taylor polynomial (whose next term is below 5e-9), 2^n by its bits.
    """
    suffix = "" if lanes == 1 else f"x{lanes}"
    x = T.max(T.min(x, _constant(_LARGEST, lanes)), _constant(_SMALLEST, lanes))
    n = T.nearbyint(x * _constant(_LOG2_E, lanes))
    r = x - n * _constant(_LN2_HIGH, lanes) - n * _constant(_LN2_LOW, lanes)
    result = _constant(_TAYLOR[0], lanes)
    for coefficient in _TAYLOR[1:]:
        result = result * r + _constant(coefficient, lanes)
    bias, shift = T.int32(127), T.int32(23)
    if lanes > 1:
        bias, shift = T.broadcast(bias, lanes), T.broadcast(shift, lanes)
    return result * T.reinterpret(f"float32{suffix}", (T.cast(n, f"int32{suffix}") + bias) << shift)


def sigmoid(x: Expression, lanes: int) -> Expression:
    """1 / (1 + e^−x) in float32."""
    one = _constant(1.0, lanes)
    return one / (one + exponential(_constant(0.0, lanes) - x, lanes))


def _halves(value: Expression, lanes: int) -> tuple[Expression, Expression]:
    half = lanes // 2
    return tirx.Shuffle([value], list(range(half))), tirx.Shuffle([value], list(range(half, lanes)))


def sum_of(value: Expression, lanes: int) -> Expression:
    """Sum of the lanes of a vector, by halves; `lanes` is a power of two."""
    while lanes > 1:
        low, high = _halves(value, lanes)
        value, lanes = low + high, lanes // 2
    return value


def maximum_of(value: Expression, lanes: int) -> Expression:
    """Largest lane of a vector; `lanes` is a power of two."""
    while lanes > 1:
        low, high = _halves(value, lanes)
        value, lanes = T.max(low, high), lanes // 2
    return value
