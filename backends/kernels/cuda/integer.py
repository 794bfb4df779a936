"""Products of low-bit weights with int8 activations, by `__dp4a`."""
# TVMScript's annotations are TIR types, which a Python type checker cannot know.
# mypy: disable-error-code="valid-type, no-untyped-def, no-untyped-call, no-any-return, untyped-decorator, misc"

from typing import Any, NamedTuple

from tvm.script import tirx as T

from hikui.backends.kernels.cuda.block import PLACES, WARP, WARPS, Lane, add_segments, finish, group_of, start
from hikui.backends.kernels.cuda.words import signed, unpack
from hikui.backends.kernels.fields import DIGITS, LINES, QUADS, SEGMENTS, Expression, turn_lines

# Steps whose weights a lane asks for before it uses the first, with one row of activations. More would ask for more
# bytes at once, but 128 steps are 4096 columns: beyond that a turn is mostly idle.
_AHEAD = {"sign": 2, "int2": 2, "ternary": 4, "int3": 2, "int4": 2, "nf4": 1, "fp4": 1, "int8": 1}


class _Operands(NamedTuple):
    """What the sums of an integer product are made of; see `integer`."""

    q: Any
    q_sums: Any
    weight: Any
    scale: Any
    row_steps: Expression
    lines: Expression
    groups: Expression
    group_factor: Expression
    group_steps: Expression


def _add_lines(rows: int, ahead: int) -> Any:
    """What adds the products of the lines of ternary codes to the sums of a lane.

    The quads that fill up the last line of a group are of codes 0, whatever activations stand there.
    """
    words = signed("ternary")

    @T.inline
    def add(lane, first_line, first_step, count, operands):
        """As `block.Add` says, of all lines."""
        index = T.alloc_buffer((ahead,), "int32", scope="local")
        packed = T.alloc_buffer((ahead * 4,), "int32", scope="local")
        codes = T.alloc_buffer((DIGITS * 4,), "int32", scope="local")
        halves = T.alloc_buffer((4,), "float16", scope="local")
        factor = T.alloc_buffer((4,), "float32", scope="local")
        activation = T.alloc_buffer((DIGITS,), "int32", scope="local")
        product = T.alloc_buffer((4,), "int32", scope="local")
        group = T.alloc_buffer((1,), "int32", scope="local")
        sum_of = T.alloc_buffer((1,), "int32", scope="local")
        group_lines = operands.lines // operands.groups
        for turn in range((operands.lines + (PLACES * ahead - 1)) // (PLACES * ahead)):
            for u in T.unroll(ahead):
                # Beyond the end the last line is read again, and its scale taken as 0.
                index[u] = T.min((turn * ahead + u) * PLACES + lane.place, operands.lines - 1)
                packed[T.ramp(u * 4, 1, 4)] = operands.weight[(first_line + index[u]) * 4 + lane.quarter]
            for u in T.unroll(ahead):
                unpack(words, codes, packed, u * 4, DIGITS)
                group[0] = 0
                if operands.groups > 1:
                    group[0] = index[u] // group_lines
                halves[T.ramp(0, 1, 4)] = operands.scale[
                    (T.cast(lane.block, "int64") * operands.groups + group[0]) * 4 + lane.quarter
                ]
                for r in T.unroll(4):
                    factor[r] = T.Select(
                        (turn * ahead + u) * PLACES + lane.place < operands.lines,
                        T.cast(halves[r], "float32"),
                        T.float32(0),
                    )
                for i in T.unroll(rows):
                    sum_of[0] = 0
                    for f in T.unroll(DIGITS):
                        activation[f] = operands.q[
                            T.cast(lane.row[i], "int64") * (operands.row_steps * QUADS)
                            + T.min(
                                group[0] * (operands.group_steps * QUADS)
                                + (index[u] - group[0] * group_lines) * DIGITS
                                + f,
                                operands.row_steps * QUADS - 1,
                            )
                        ]
                        sum_of[0] = T.call_pure_extern("int32", "__dp4a", activation[f], T.int32(0x01010101), sum_of[0])
                    for r in T.unroll(4):
                        product[r] = -sum_of[0]
                        for f in T.unroll(DIGITS):
                            product[r] = T.call_pure_extern(
                                "int32", "__dp4a", codes[f * 4 + r], activation[f], product[r]
                            )
                        lane.total[i * 4 + r] = lane.total[i * 4 + r] + factor[r] * T.cast(product[r], "float32")

    return add


def _add_steps(kind: str, rows: int, ahead: int, unit: float) -> Any:
    """What adds the products of steps of one kind, times `unit`, to the sums of a lane."""
    words, lines = signed(kind), LINES[kind]

    @T.inline
    def add(lane, first_line, first_step, count, operands):
        """As `block.Add` says."""
        step = T.alloc_buffer((ahead,), "int32", scope="local")
        packed = T.alloc_buffer((ahead * lines * 4,), "int32", scope="local")
        codes = T.alloc_buffer((QUADS * 4,), "int32", scope="local")
        halves = T.alloc_buffer((4,), "float16", scope="local")
        factor = T.alloc_buffer((4,), "float32", scope="local")
        activation = T.alloc_buffer((QUADS,), "int32", scope="local")
        product = T.alloc_buffer((4,), "int32", scope="local")
        for turn in range((count + (PLACES * ahead - 1)) // (PLACES * ahead)):
            for u in T.unroll(ahead):
                # Beyond the end the last step is read again, and its scale taken as 0.
                step[u] = T.min((turn * ahead + u) * PLACES + lane.place, count - 1)
                for line in T.unroll(lines):
                    packed[T.ramp((u * lines + line) * 4, 1, 4)] = operands.weight[
                        (first_line + (step[u] * lines + line)) * 4 + lane.quarter
                    ]
            for u in T.unroll(ahead):
                unpack(words, codes, packed, u * lines * 4)
                halves[T.ramp(0, 1, 4)] = operands.scale[
                    (
                        T.cast(lane.block, "int64") * operands.groups
                        + group_of(first_step + step[u], operands.group_factor)
                    )
                    * 4
                    + lane.quarter
                ]
                for r in T.unroll(4):
                    factor[r] = T.Select(
                        (turn * ahead + u) * PLACES + lane.place < count,
                        T.cast(halves[r], "float32") * T.float32(unit),
                        T.float32(0),
                    )
                for i in T.unroll(rows):
                    for f in T.unroll(QUADS // 4):
                        activation[T.ramp(f * 4, 1, 4)] = operands.q[
                            T.cast(lane.row[i], "int64") * (operands.row_steps * 2) + ((first_step + step[u]) * 2 + f)
                        ]
                    for r in T.unroll(4):
                        product[r] = 0
                        if words.offset != 0:
                            product[r] = operands.q_sums[
                                lane.row[i] * operands.row_steps + first_step + step[u]
                            ] * T.int32(-words.offset)
                        for f in T.unroll(QUADS):
                            product[r] = T.call_pure_extern(
                                "int32", "__dp4a", codes[f * 4 + r], activation[f], product[r]
                            )
                        lane.total[i * 4 + r] = lane.total[i * 4 + r] + factor[r] * T.cast(product[r], "float32")

    return add


@T.inline
def _scale_and_branch(lane, rows, unit, halves, q_scale, b, t, rank):
    """Brings the sums of a lane into the unit of its activations, times `unit`, and adds its share of the branch."""
    for i in T.unroll(rows):
        for r in T.unroll(4):
            lane.total[i * 4 + r] = lane.total[i * 4 + r] * (q_scale[lane.row[i]] * T.float32(unit))
    for turn in range((rank + (PLACES - 1)) // PLACES):
        if turn * PLACES + lane.place < rank:
            halves[T.ramp(0, 1, 4)] = b[
                (T.cast(lane.block, "int64") * rank + (turn * PLACES + lane.place)) * 4 + lane.quarter
            ]
            for i in T.unroll(rows):
                for r in T.unroll(4):
                    lane.total[i * 4 + r] = (
                        lane.total[i * 4 + r]
                        + T.cast(halves[r], "float32") * (t[lane.row[i] * rank + turn * PLACES + lane.place])
                    )


def integer(kind: str, rows: int, name: str) -> Any:
    """y[m, n] = q_scale[m] · Σ_g scale[n, g] · Σ_k q[m, k]·code[n, k] + bias[n] + Σ_r b[n, r]·t[m, r].

    Args:
        kind: a key of `SEGMENTS`.
        rows: rows of activations that share an unpacked weight, at most 16.
        name: symbol of the kernel.

    The kernel's parameters after the pointers: M, N, steps of 32 columns a row of q, weight lines a block, groups, the
    factor that gives a step's group (`block.group_of`), steps of 32 columns in the weights, rank of the branch (0:
    none; then b and t are not read), whether there is a bias. Grid: ⌈N/16⌉ × ⌈M/rows⌉ blocks of 32 × 8
    threads.
    """
    # The unit of the bytes' values goes into the sums of a lane once, or where two kinds meet into their scales.
    units = [signed(part).factor for part in SEGMENTS[kind]]
    common = units[0] if len(units) == 1 else 1.0
    add = [
        _add_lines(rows, ahead) if part not in LINES else _add_steps(part, rows, ahead, unit / common)
        for part, unit in zip(SEGMENTS[kind], units, strict=True)
        for ahead in [_AHEAD[part] if rows == 1 else 1]
    ]
    wide_lines = turn_lines(SEGMENTS[kind][0])
    # Quads of ternary begin at any multiple of four columns, steps at those of 32.
    element, elements = ("int32x4", 2) if kind in LINES or kind == "mixed" else ("int32", QUADS)

    @T.prim_func(s_tir=True)
    def kernel(
        q_data: T.handle(element),
        q_scale_data: T.handle("float32"),
        q_sums_data: T.handle("int32"),
        weight_data: T.handle("int32x4"),
        scale_data: T.handle("float16x4"),
        bias_data: T.handle("float32"),
        b_data: T.handle("float16x4"),
        t_data: T.handle("float32"),
        y_data: T.handle("float32"),
        m_size: T.int32,
        n_size: T.int32,
        row_steps: T.int32,
        lines: T.int32,
        groups: T.int32,
        group_factor: T.int32,
        steps: T.int32,
        rank: T.int32,
        has_bias: T.int32,
    ):
        T.func_attr({"global_symbol": name, "tirx.noalias": True, "calling_conv": 2, "tirx.is_global_func": True})
        n_blocks = (n_size + 15) // 16
        q = T.decl_buffer((m_size * row_steps * elements,), element, data=q_data)
        q_scale = T.decl_buffer((m_size,), "float32", data=q_scale_data)
        q_sums = T.decl_buffer((m_size * row_steps,), "int32", data=q_sums_data)
        weight = T.decl_buffer((n_blocks * lines * 4,), "int32x4", data=weight_data)
        scale = T.decl_buffer((n_blocks * groups * 4,), "float16x4", data=scale_data)
        bias = T.decl_buffer((n_size,), "float32", data=bias_data)
        b = T.decl_buffer((n_blocks * rank * 4,), "float16x4", data=b_data)
        t = T.decl_buffer((m_size * rank,), "float32", data=t_data)
        y = T.decl_buffer((m_size * n_size,), "float32", data=y_data)
        block = T.launch_thread("blockIdx.x", n_blocks)
        chunk = T.launch_thread("blockIdx.y", (m_size + (rows - 1)) // rows)
        lane = T.launch_thread("threadIdx.x", WARP)
        warp = T.launch_thread("threadIdx.y", WARPS)
        partial = T.alloc_buffer((WARPS * rows * 16,), "float32", scope="shared")
        total = T.alloc_buffer((rows * 4,), "float32", scope="local")
        row = T.alloc_buffer((rows,), "int32", scope="local")
        halves = T.alloc_buffer((4,), "float16", scope="local")
        quarter = lane % 4
        place = warp * (WARP // 4) + lane // 4
        start(total, row, 4, rows, chunk, m_size)
        operands = T.meta_var(
            _Operands(q, q_sums, weight, scale, row_steps, lines, groups, group_factor, steps // groups)
        )
        here = T.meta_var(Lane(total, row, quarter, place, block))
        add_segments(add, wide_lines, here, lines, steps, operands)
        _scale_and_branch(here, rows, common, halves, q_scale, b, t, rank)
        finish(total, 4, rows, block, chunk, lane, warp, partial, bias, has_bias, y, m_size, n_size)

    return kernel
