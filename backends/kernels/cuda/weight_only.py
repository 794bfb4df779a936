"""Products of low-bit weights with float activations: codes are widened to float32 on the way."""
# TVMScript's annotations are TIR types, which a Python type checker cannot know.
# mypy: disable-error-code="valid-type, no-untyped-def, no-untyped-call, no-any-return, untyped-decorator, misc"

from typing import Any, NamedTuple

from tvm.script import tirx as T

from hikui.backends.kernels.cuda.block import PLACES, WARP, WARPS, Lane, add_segments, finish, group_of, start
from hikui.backends.kernels.cuda.words import unpack, unsigned
from hikui.backends.kernels.fields import DIGITS, LINES, QUADS, SEGMENTS, Expression, turn_lines

# A byte u below these top bytes is the float 2²³ + u.
_EXPONENT, _BASE = 0x4B000000, 8388608.0


class _Operands(NamedTuple):
    """What the sums are made of; see `weight_only`."""

    x: Any
    weight: Any
    scale: Any
    k_size: Expression
    lines: Expression
    groups: Expression
    group_factor: Expression
    group_steps: Expression


def weight_only(kind: str, dtype: str, rows: int, name: str) -> Any:
    """y[m, n] = Σ_g scale[n, g] · Σ_k x[m, k]·code[n, k] + bias[n].

    Args:
        kind: a key of `SEGMENTS`.
        dtype: of x, `float32` or `float16`; sums and y are float32.
        rows: rows of activations that share an unpacked weight, at most 16.
        name: symbol of the kernel.

    The kernel's parameters after the pointers: M, N, K, weight lines a block, groups, the factor that gives a step's
    group (`block.group_of`), steps of 32 columns in the weights, whether there is a bias. x is aligned to four
    elements. Grid: ⌈N/16⌉ × ⌈M/rows⌉ blocks of 32 × 8 threads.
    """
    add = [_add_steps(part, dtype, rows) if part in LINES else _add_lines(dtype, rows) for part in SEGMENTS[kind]]
    wide_lines = turn_lines(SEGMENTS[kind][0])

    @T.prim_func(s_tir=True)
    def kernel(
        x_data: T.handle(dtype),
        weight_data: T.handle("int32x4"),
        scale_data: T.handle("float16x4"),
        bias_data: T.handle("float32"),
        y_data: T.handle("float32"),
        m_size: T.int32,
        n_size: T.int32,
        k_size: T.int32,
        lines: T.int32,
        groups: T.int32,
        group_factor: T.int32,
        steps: T.int32,
        has_bias: T.int32,
    ):
        T.func_attr({"global_symbol": name, "tirx.noalias": True, "calling_conv": 2, "tirx.is_global_func": True})
        n_blocks = (n_size + 15) // 16
        x = T.decl_buffer((m_size * k_size,), dtype, data=x_data)
        weight = T.decl_buffer((n_blocks * lines * 4,), "int32x4", data=weight_data)
        scale = T.decl_buffer((n_blocks * groups * 4,), "float16x4", data=scale_data)
        bias = T.decl_buffer((n_size,), "float32", data=bias_data)
        y = T.decl_buffer((m_size * n_size,), "float32", data=y_data)
        block = T.launch_thread("blockIdx.x", n_blocks)
        chunk = T.launch_thread("blockIdx.y", (m_size + (rows - 1)) // rows)
        lane = T.launch_thread("threadIdx.x", WARP)
        warp = T.launch_thread("threadIdx.y", WARPS)
        partial = T.alloc_buffer((WARPS * rows * 16,), "float32", scope="shared")
        total = T.alloc_buffer((rows * 4,), "float32", scope="local")
        row = T.alloc_buffer((rows,), "int32", scope="local")
        quarter = lane % 4
        place = warp * (WARP // 4) + lane // 4
        start(total, row, 4, rows, chunk, m_size)
        operands = T.meta_var(_Operands(x, weight, scale, k_size, lines, groups, group_factor, steps // groups))
        add_segments(add, wide_lines, Lane(total, row, quarter, place, block), lines, steps, operands)
        finish(total, 4, rows, block, chunk, lane, warp, partial, bias, has_bias, y, m_size, n_size)

    return kernel


@T.inline
def _read(activation, x, row, column, k_size, rows, quads):
    """Reads the activations of `quads` quads from a column on, zeros beyond the last."""
    if k_size % 4 == 0 and column + quads * 4 <= k_size:
        for i in T.unroll(rows):
            for f in T.unroll(quads):
                # Four elements at a multiple of four: the compiler is told by this index's form.
                activation[T.ramp((i * quads + f) * 4, 1, 4)] = x[
                    T.ramp((T.cast(row[i], "int64") * (k_size // 4) + (column // 4 + f)) * 4, 1, 4)
                ]
    else:
        for i in T.unroll(rows):
            for k in T.unroll(quads * 4):
                activation[i * quads * 4 + k] = T.if_then_else(
                    column + k < k_size,
                    x[T.cast(row[i], "int64") * k_size + (column + k)],
                    T.cast(0, x.dtype),
                )


@T.inline
def _multiply(product, codes, part, activation, value, rows, quads, offset):
    """Adds the products of `quads` quads, the part-th so many of a step."""
    for f in T.unroll(quads):
        for r in T.unroll(4):
            for j in T.unroll(4):
                value[0] = T.call_pure_extern(
                    "float32",
                    "__int_as_float",
                    T.call_pure_extern(
                        "int32",
                        "__byte_perm",
                        codes[(part * quads + f) * 4 + r],
                        T.int32(_EXPONENT),
                        0x7540 + j,
                    ),
                ) - T.float32(_BASE + offset)
                for i in T.unroll(rows):
                    product[i * 4 + r] = product[i * 4 + r] + value[0] * T.cast(
                        activation[(i * quads + f) * 4 + j], "float32"
                    )


def _add_steps(kind: str, dtype: str, rows: int) -> Any:
    """What adds the products of steps of one kind to the sums of a lane."""
    words, lines = unsigned(kind), LINES[kind]
    # The activations of so many quads are in registers at once.
    quads = max(1, QUADS // rows)

    @T.inline
    def add(lane, first_line, first_step, count, operands):
        """As `block.Add` says."""
        packed = T.alloc_buffer((lines * 4,), "int32", scope="local")
        codes = T.alloc_buffer((QUADS * 4,), "int32", scope="local")
        halves = T.alloc_buffer((4,), "float16", scope="local")
        activation = T.alloc_buffer((rows * quads * 4,), dtype, scope="local")
        value = T.alloc_buffer((1,), "float32", scope="local")
        product = T.alloc_buffer((rows * 4,), "float32", scope="local")
        for turn in range((count + (PLACES - 1)) // PLACES):
            if turn * PLACES + lane.place < count:
                step = turn * PLACES + lane.place
                for line in T.unroll(lines):
                    packed[T.ramp(line * 4, 1, 4)] = operands.weight[
                        (first_line + (step * lines + line)) * 4 + lane.quarter
                    ]
                unpack(words, codes, packed, 0)
                for i in T.unroll(rows * 4):
                    product[i] = T.float32(0)
                for part in T.unroll(QUADS // quads):
                    column = (first_step + step) * 32 + part * (quads * 4)
                    _read(activation, operands.x, lane.row, column, operands.k_size, rows, quads)
                    _multiply(product, codes, part, activation, value, rows, quads, words.offset)
                halves[T.ramp(0, 1, 4)] = operands.scale[
                    (T.cast(lane.block, "int64") * operands.groups + group_of(first_step + step, operands.group_factor))
                    * 4
                    + lane.quarter
                ]
                for i in T.unroll(rows):
                    for r in T.unroll(4):
                        lane.total[i * 4 + r] = lane.total[i * 4 + r] + product[i * 4 + r] * (
                            T.cast(halves[r], "float32") * T.float32(words.factor)
                        )

    return add


def _add_lines(dtype: str, rows: int) -> Any:
    """What adds the products of the lines of ternary codes to the sums of a lane; the last of a group ends in zeros."""
    words = unsigned("ternary")

    @T.inline
    def add(lane, first_line, first_step, count, operands):
        """As `block.Add` says, of all lines."""
        packed = T.alloc_buffer((4,), "int32", scope="local")
        codes = T.alloc_buffer((DIGITS * 4,), "int32", scope="local")
        halves = T.alloc_buffer((4,), "float16", scope="local")
        activation = T.alloc_buffer((rows * 4,), dtype, scope="local")
        value = T.alloc_buffer((1,), "float32", scope="local")
        product = T.alloc_buffer((rows * 4,), "float32", scope="local")
        group_lines = operands.lines // operands.groups
        for turn in range((operands.lines + (PLACES - 1)) // PLACES):
            if turn * PLACES + lane.place < operands.lines:
                line = turn * PLACES + lane.place
                group = line // group_lines
                packed[T.ramp(0, 1, 4)] = operands.weight[(first_line + line) * 4 + lane.quarter]
                unpack(words, codes, packed, 0, DIGITS)
                for i in T.unroll(rows * 4):
                    product[i] = T.float32(0)
                for f in T.unroll(DIGITS):
                    quad = (line - group * group_lines) * DIGITS + f
                    if quad < operands.group_steps * QUADS:
                        column = (group * (operands.group_steps * QUADS) + quad) * 4
                        _read(activation, operands.x, lane.row, column, operands.k_size, rows, 1)
                        _multiply(product, codes, f, activation, value, rows, 1, words.offset)
                halves[T.ramp(0, 1, 4)] = operands.scale[
                    (T.cast(lane.block, "int64") * operands.groups + group) * 4 + lane.quarter
                ]
                for i in T.unroll(rows):
                    for r in T.unroll(4):
                        lane.total[i * 4 + r] = lane.total[i * 4 + r] + product[i * 4 + r] * T.cast(
                            halves[r], "float32"
                        )

    return add
