"""How kernels read and write key-value caches, in float32 or quantised (`lowering/formats/cache.py` has the layout)."""
# TVMScript's annotations are TIR types, which a Python type checker cannot know.
# mypy: disable-error-code="valid-type, no-untyped-def, no-untyped-call, no-any-return, untyped-decorator, misc"

from typing import Any

from tvm.script import tirx as T

from hikui.backends.kernels.isa.base import splat, unrolled, vector
from hikui.backends.kernels.mathematics import maximum_of

Expression = Any

QUANTISED = ("int8", "int4")
FORMATS = ("float32", *QUANTISED)
"""How a cache may be stored, in the order of the dispatcher's table."""

ELEMENT = {"float32": "float32", "int8": "int8", "int4": "uint8"}
"""What the tensor of a cache holds."""

PARTS = {"float32": 1, "int8": 1, "int4": 2}
"""Columns that an element stands for: element j has columns j, j + D/2 where there are two."""

_LARGEST_SCALE = 65504.0
"""The largest finite half."""


def floats(elements: Expression, fmt: str, part: Expression, lanes: int) -> Expression:
    """The columns of a part that neighbouring elements hold, as float32, not yet times their token's scale."""
    if fmt == "float32":
        return elements
    if fmt == "int4":
        mask, down, eight = T.uint8(15), T.cast(part * 4, "uint8"), T.int8(8)
        if lanes > 1:
            mask, down, eight = splat(mask, lanes), splat(down, lanes), splat(eight, lanes)
        elements = T.cast((elements >> down) & mask, _type("int8", lanes)) - eight
    return T.cast(elements, _type("float32", lanes))


def _type(element: str, lanes: int) -> str:
    return element if lanes == 1 else f"{element}x{lanes}"


def _codes(values: Expression, inverse: Expression, fmt: str, lanes: int) -> Expression:
    """Codes as int32."""
    least, most = (T.float32(bound) for bound in ((-127, 127) if fmt == "int8" else (-8, 7)))
    if lanes > 1:
        least, most, inverse = (splat(value, lanes) for value in (least, most, inverse))
    return T.cast(T.max(T.min(T.nearbyint(values * inverse), most), least), _type("int32", lanes))


def _packed(first: Expression, second: Expression, lanes: int) -> Expression:
    """Bytes of two int4 codes each."""
    eight, four = T.int32(8), T.uint8(4)
    if lanes > 1:
        eight, four = splat(eight, lanes), splat(four, lanes)
    low, high = (T.cast(codes + eight, _type("uint8", lanes)) for codes in (first, second))
    return low | (high << four)


@T.inline
def _take_extremes(x, start, size, lanes, state):
    """The largest of a row's values and of their negatives, into state[0] and state[1]; neither is below 0."""
    for i in unrolled(2):
        lanes[T.ramp(i * 16, 1, 16)] = splat(T.float32(0), 16)
    for chunk in range(size // 16):
        lanes[T.ramp(0, 1, 16)] = T.max(vector(lanes, T.int64(0), 16), vector(x, start + chunk * 16, 16))
        lanes[T.ramp(16, 1, 16)] = T.max(
            vector(lanes, T.int64(16), 16), splat(T.float32(0), 16) - vector(x, start + chunk * 16, 16)
        )
    state[0] = maximum_of(vector(lanes, T.int64(0), 16), 16)
    state[1] = maximum_of(vector(lanes, T.int64(16), 16), 16)
    for d in range(size // 16 * 16, size):
        state[0] = T.max(state[0], x[start + d])
        state[1] = T.max(state[1], T.float32(0) - x[start + d])


def cache_store(fmt: str, name: str) -> Any:
    """Quantises rows [first, last) of heads · tokens into the tokens past, past + 1, … of each head's cache.

    The codes are chosen for the scale as a half stores it.
    """
    element, parts = ELEMENT[fmt], PARTS[fmt]

    @T.prim_func(s_tir=True)
    def kernel(
        x_data: T.handle("float32"),
        codes_data: T.handle(element),
        scale_data: T.handle("float16"),
        tokens: T.int64,
        context: T.int64,
        size: T.int64,
        past: T.int64,
        first: T.int64,
        last: T.int64,
    ):
        T.func_attr({"global_symbol": name, "tirx.noalias": True})
        width = size // parts
        x = T.decl_buffer((last * size,), "float32", data=x_data)
        codes = T.decl_buffer((last * context * width,), element, data=codes_data)
        scale = T.decl_buffer((last * context,), "float16", data=scale_data)
        lanes = T.alloc_buffer((32,), "float32", scope="local")
        state = T.alloc_buffer((3,), "float32", scope="local")
        for row in range(first, last):
            target = row // tokens * context + past + row % tokens
            _take_extremes(x, row * size, size, lanes, state)
            if fmt == "int8":
                state[2] = T.max(state[0], state[1]) / T.float32(127)
            else:
                # −8 goes to the largest magnitude, whatever its sign.
                state[2] = T.Select(state[0] >= state[1], state[0], T.float32(0) - state[1]) * T.float32(-0.125)
            state[2] = T.max(T.min(state[2], T.float32(_LARGEST_SCALE)), T.float32(-_LARGEST_SCALE))
            state[2] = T.cast(T.cast(state[2], "float16"), "float32")
            state[0] = T.float32(0)
            if state[2] == T.float32(0):
                # It may be a zero below zero.
                state[2] = T.float32(0)
            else:
                state[0] = T.float32(1) / state[2]
            scale[target] = T.cast(state[2], "float16")
            if fmt == "int8":
                for chunk in range(size // 16):
                    codes[T.ramp(target * size + chunk * 16, 1, 16)] = T.cast(
                        _codes(vector(x, row * size + chunk * 16, 16), state[0], fmt, 16), "int8x16"
                    )
                for d in range(size // 16 * 16, size):
                    codes[target * size + d] = T.cast(_codes(x[row * size + d], state[0], fmt, 1), "int8")
            else:
                for chunk in range(width // 16):
                    codes[T.ramp(target * width + chunk * 16, 1, 16)] = _packed(
                        _codes(vector(x, row * size + chunk * 16, 16), state[0], fmt, 16),
                        _codes(vector(x, row * size + width + chunk * 16, 16), state[0], fmt, 16),
                        16,
                    )
                for d in range(width // 16 * 16, width):
                    codes[target * width + d] = _packed(
                        _codes(x[row * size + d], state[0], fmt, 1),
                        _codes(x[row * size + width + d], state[0], fmt, 1),
                        1,
                    )

    return kernel


def cache_load(fmt: str, name: str) -> Any:
    """Rows [first, last) of heads · context as float32; those from `filled` on in each head are zero."""
    element, parts = ELEMENT[fmt], PARTS[fmt]

    @T.prim_func(s_tir=True)
    def kernel(
        codes_data: T.handle(element),
        scale_data: T.handle("float16"),
        y_data: T.handle("float32"),
        context: T.int64,
        size: T.int64,
        filled: T.int64,
        first: T.int64,
        last: T.int64,
    ):
        T.func_attr({"global_symbol": name, "tirx.noalias": True})
        width = size // parts
        codes = T.decl_buffer((last * width,), element, data=codes_data)
        scale = T.decl_buffer((last,), "float16", data=scale_data)
        y = T.decl_buffer((last * size,), "float32", data=y_data)
        factor = T.alloc_buffer((1,), "float32", scope="local")
        for row in range(first, last):
            if row % context >= filled:
                for d in range(size):
                    y[row * size + d] = T.float32(0)
            else:
                factor[0] = T.cast(scale[row], "float32")
                for part in unrolled(parts):
                    for chunk in range(width // 16):
                        y[T.ramp(row * size + part * width + chunk * 16, 1, 16)] = floats(
                            vector(codes, row * width + chunk * 16, 16), fmt, part, 16
                        ) * splat(factor[0], 16)
                    for d in range(width // 16 * 16, width):
                        y[row * size + part * width + d] = floats(codes[row * width + d], fmt, part, 1) * factor[0]

    return kernel
