"""Ops on packed weights: what each operand must be, and the matrix that one multiplies with, worked out in float64."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from hikui.lowering import formats
from hikui.lowering.errors import VerificationError
from hikui.lowering.formats import Format
from hikui.lowering.ir import packed as module
from hikui.lowering.ir.float_matrix import float_and_packed_rows
from hikui.lowering.ir.packed import (
    PACKED_OPS,
    PackedLinear,
    is_packed,
    is_stored,
    operand_names,
    verify_packed,
)
from hikui.lowering.ir.program import Program
from hikui.lowering.ir.store import WeightStore
from hikui.lowering.ir.verifier import verify
from tests.passes.helpers import program_of, random, run

LINEAR, LINEAR_A8, BRANCH = PACKED_OPS
N, K, RANK = 37, 100, 3
ops = torch.ops.hikui


@dataclass
class Case:
    """A program of one packed op, and what its stored tensors stand for in float64."""

    program: Program
    matrix: Tensor
    a: Tensor
    b: Tensor
    order: Tensor

    @property
    def node(self) -> torch.fx.Node:
        (node,) = filter(is_packed, self.program.graph.nodes)
        return node

    @property
    def packed(self) -> PackedLinear:
        return PackedLinear.of(self.node)

    @property
    def dense(self) -> Tensor:
        """The matrix with its branch, columns as stored."""
        return self.matrix + self.b @ self.a if self.node.target is BRANCH else self.matrix

    def give(self, name: str, operand: torch.fx.node.Argument | Tensor) -> None:
        """Puts something else in the place of an operand; a tensor becomes a stored one."""
        if isinstance(operand, Tensor):
            operand = self.program.add_weight(f"wrong.{name}", operand)
        self.node.update_arg(operand_names(self.node.target).index(name), operand)


def case(op: Any, text: str = "int4-g32", *, ordered: bool = False, bias: bool = True) -> Case:
    """x → [gather] → [quantiser] → op, of an n×k matrix whose codes and scales are drawn; it may be changed."""
    shared = _case(op, text, ordered, bias)
    return replace(shared, program=shared.program.clone())


@cache
def _case(op: Any, text: str, ordered: bool, use_bias: bool) -> Case:
    fmt, generator = Format.parse(text), torch.Generator().manual_seed(3)
    if fmt.is_integer:
        parts = []
        for part in fmt.segments(K):
            levels = torch.tensor(part.format.levels)
            parts.append(levels[torch.randint(0, len(levels), (N, part.stop - part.start), generator=generator)])
        codes, scale = torch.cat(parts, 1), (torch.rand((N, fmt.groups(K)), generator=generator) + 0.1).half().float()
        weight = formats.pack(fmt, codes, scale)
        columns = [codes[:, j].double() * scale[:, j // fmt.group_size(K)].double() for j in range(K)]
        matrix = torch.stack(columns, 1)
    else:
        plain = random(N, K, seed=3).half().float()
        weight, matrix = formats.pack(fmt, plain), plain.double()
    a, b = random(RANK, K, seed=4).half(), random(N, RANK, seed=5).half()
    order = torch.randperm(K, generator=generator)
    held = {"embedding": random(24, K), "w": weight.weight, "order": order.to(torch.int32), "bias": random(N, seed=6)}
    held |= {"a": formats.pack(Format("float16"), a).weight, "b": formats.pack(Format("float16"), b).weight}
    if weight.scale is not None:
        held["s"] = weight.scale

    def body(
        x: Tensor, w: Tensor, order: Tensor, bias: Tensor, a: Tensor, b: Tensor, s: Tensor | None = None
    ) -> Tensor:
        x = x.index_select(-1, order) if ordered else x
        added = bias if use_bias else None
        if op is LINEAR:
            return ops.linear(x, w, s, added, text, N)  # type: ignore[no-any-return]
        q, q_scale, sums = ops.quantize_activation(x)
        if op is LINEAR_A8:
            return ops.linear_a8(q, q_scale, sums, w, s, added, text, N)  # type: ignore[no-any-return]
        return ops.linear_a8_branch(q, q_scale, sums, w, s, added, x, a, b, text, N)  # type: ignore[no-any-return]

    return Case(program_of(body, **held), matrix, a.double(), b.double(), order)


def named(program: Program, key: str) -> torch.fx.Node:
    return next(node for node in program.weight_nodes() if program.weight_of(node) == key)


EVERY = [(op, text) for op in PACKED_OPS for text in ("int4-g32", "sign-channel")] + [(LINEAR_A8, "int8-g64")]
EVERY += [(BRANCH, "mixed-g32-c64"), (LINEAR, "float16"), (LINEAR, "float32")]


@pytest.mark.parametrize(("op", "text"), EVERY)
def test_what_is_right_passes(op: Any, text: str) -> None:
    verify(case(op, text).program)


@pytest.mark.parametrize("op", PACKED_OPS)
def test_a_bias_may_be_absent(op: Any) -> None:
    verify(case(op, bias=False).program)


WEIGHT, SCALE = (3, 16, 16, 4), (3, 4, 16)
"""Of int4-g32: three blocks of 16 rows; 100 columns padded to 128, four groups of 32."""

WRONG: list[tuple[str, object, str]] = [
    ("weight", torch.zeros(2, *WEIGHT[1:], dtype=torch.uint8), "weight of shape (2, 16, 16, 4); (3, 16, 16, 4) is due"),
    ("weight", torch.zeros(3, 12, 16, 4, dtype=torch.uint8), "weight of shape (3, 12, 16, 4); (3, 16, 16, 4) is due"),
    ("weight", torch.zeros(N, K, dtype=torch.uint8), "weight of shape (37, 100); (3, 16, 16, 4) is due"),
    ("weight", torch.zeros(WEIGHT, dtype=torch.int8), "weight of torch.int8; torch.uint8 is due"),
    ("scale", torch.zeros(3, 3, 16).half(), "scale of shape (3, 3, 16); (3, 4, 16) is due"),
    ("scale", torch.zeros(N, 4).half(), "scale of shape (37, 4); (3, 4, 16) is due"),
    ("scale", torch.zeros(SCALE), "scale of torch.float32; torch.float16 is due"),
    ("bias", torch.zeros(N - 1), "bias of shape (36,); (37,) is due"),
    ("bias", torch.zeros(1, N), "bias of shape (1, 37); (37,) is due"),
    ("bias", torch.zeros(N).double(), "bias of torch.float64; torch.float32 is due"),
    ("out_features", 33 + 16, "weight of shape (3, 16, 16, 4); (4, 16, 16, 4) is due"),
    ("out_features", 33, "bias of shape (37,); (33,) is due"),
    ("format", "int3-g32", "(int3-g32) has a weight of shape (3, 16, 16, 4); (3, 12, 16, 4) is due"),
    ("format", "int4-g64", "(int4-g64) has a scale of shape (3, 4, 16); (3, 2, 16) is due"),
    ("format", "mixed-g32-c32", "(mixed-g32-c32) has a weight of shape (3, 16, 16, 4); (3, 7, 16, 4) is due"),
    ("format", "mixed-g64-c128", "Format 'mixed-g64-c128' has more int4 columns than the matrix has columns, 100"),
    ("format", "float16", "(float16) has a weight of shape (3, 16, 16, 4); (3, 100, 16) is due"),
    ("format", "int5-g32", "Format 'int5-g32' is not known"),
    ("format", 4, "takes 4 as its format; str is due"),
    ("weight", None, "takes None as its weight; Tensor is due"),
    ("out_features", "37", "takes '37' as its out_features; int is due"),
    ("bias", 1.5, "takes 1.5 as its bias; Optional[Tensor] is due"),
]  # fmt: skip


@pytest.mark.parametrize("op", PACKED_OPS)
@pytest.mark.parametrize(("name", "operand", "sentence"), WRONG)
def test_what_is_wrong_is_refused(op: Any, name: str, operand: Any, sentence: str) -> None:
    found = case(op)
    found.give(name, operand)
    with pytest.raises(VerificationError) as caught:
        verify(found.program)
    assert sentence in str(caught.value)
    assert str(caught.value).startswith(f"Node {found.node.name}")


@pytest.mark.parametrize(
    ("name", "operand", "sentence"),
    [
        ("a", torch.zeros(1, K + 1, 16).half(), "has a a of shape (1, 101, 16); (1, 100, 16) is due"),
        ("a", torch.zeros(2, K, 16).half(), "has a a of shape (2, 100, 16); (1, 100, 16) is due"),
        ("a", torch.zeros(1, K, 16), "has a a of torch.float32; torch.float16 is due"),
        ("b", torch.zeros(2, RANK, 16).half(), "has a b of shape (2, 3, 16); (3, 3, 16) is due"),
        ("b", torch.zeros(3, 17, 16).half(), "has a a of shape (1, 100, 16); (2, 100, 16) is due"),
        ("b", torch.zeros(3, RANK, 16).bfloat16(), "has a b of torch.bfloat16; torch.float16 is due"),
        ("a", None, "takes None as its a; Tensor is due"),
        ("b", None, "takes None as its b; Tensor is due"),
        ("x", None, "takes None as its x; Tensor is due"),
    ],
)
def test_the_factors_of_a_branch_are_checked(name: str, operand: Any, sentence: str) -> None:
    found = case(BRANCH)
    found.give(name, operand)
    with pytest.raises(VerificationError) as caught:
        verify_packed(found.node)
    assert sentence in str(caught.value)


def test_scales_are_there_where_the_format_has_them_and_nowhere_else() -> None:
    without = case(LINEAR)
    without.give("scale", None)
    with pytest.raises(VerificationError, match=r"\(int4-g32\) has a scale of shape None; \(3, 4, 16\) is due"):
        verify(without.program)
    more = case(LINEAR, "float16")
    more.give("scale", torch.zeros(SCALE).half())
    with pytest.raises(VerificationError, match=r"\(float16\) has a scale of shape \(3, 4, 16\); None is due"):
        verify(more.program)
    for op in (LINEAR_A8, BRANCH):
        found = case(op)
        found.give("scale", None)
        with pytest.raises(VerificationError, match="takes None as its scale; Tensor is due"):
            verify(found.program)


def _too_few(node: torch.fx.Node) -> None:
    node.args = node.args[:-1]


def _too_many(node: torch.fx.Node) -> None:
    node.args = (*node.args, 1)


def _by_name(node: torch.fx.Node) -> None:
    node.kwargs = {"note": 1}


@pytest.mark.parametrize("damage", [_too_few, _too_many, _by_name])
def test_operands_stand_by_position(damage: Callable[[torch.fx.Node], None]) -> None:
    found = case(LINEAR)
    damage(found.node)
    sentence = r"does not have the operands x, weight, scale, bias, format, out_features, by position"
    with pytest.raises(VerificationError, match=sentence):
        PackedLinear.of(found.node)


@pytest.mark.parametrize("op", PACKED_OPS)
def test_a_packed_op_is_taken_apart(op: Any) -> None:
    found = case(op)
    packed, program = found.packed, found.program
    assert (packed.node, packed.format, packed.rows) == (found.node, Format("int4", 32), N)
    assert packed.weight is named(program, "w") and packed.scale is named(program, "s")
    assert packed.bias is named(program, "bias")
    factors = (named(program, "a"), named(program, "b"))
    assert packed.branch == (factors if op is BRANCH else None)
    assert packed.rank == (RANK if op is BRANCH else 0)
    assert packed.stored() == (packed.weight, packed.scale, *(factors if op is BRANCH else ()))
    assert list(packed.operands) == list(operand_names(op)) and list(packed.operands.values()) == list(found.node.args)
    assert packed.source.target is torch.ops.aten.add.Tensor and packed.columns == K
    assert packed.order is None and packed.column_order(program.store) is None
    assert is_stored(packed.weight) and not is_stored(packed.source) and not is_packed(packed.source)


def test_a_float_matrix_has_no_scales_and_a_bias_may_be_absent() -> None:
    packed = case(LINEAR, "float16", bias=False).packed
    assert packed.scale is None and packed.bias is None
    assert packed.stored() == (packed.weight,)


@pytest.mark.parametrize("op", PACKED_OPS)
def test_the_order_of_columns_is_found_behind_the_quantiser(op: Any) -> None:
    found = case(op, "mixed-g32-c64", ordered=True)
    packed = found.packed
    assert packed.source.target is torch.ops.aten.index_select.default
    assert packed.columns == K, "the quantised activation is padded, the order is not"
    assert packed.order is named(found.program, "order")
    order = packed.column_order(found.program.store)
    assert order is not None and order.dtype == torch.int64 and torch.equal(order, found.order)


@pytest.mark.parametrize("op", [LINEAR_A8, BRANCH])
def test_what_no_op_of_hikui_has_quantised_has_no_source(op: Any) -> None:
    found = case(op)
    item = found.node.args[0]
    assert isinstance(item, torch.fx.Node)
    for operand in (named(found.program, "bias"), found.packed.source):
        found.node.update_arg(0, operand)
        with pytest.raises(VerificationError, match=f"reads {operand.name}, which no hikui op has quantised"):
            verify_packed(found.node)


@pytest.mark.parametrize("blocks", [1, 2, 128])
@pytest.mark.parametrize(("op", "text", "ordered"), [*((*each, False) for each in EVERY), (BRANCH, "int4-g32", True)])
def test_the_matrix_is_the_one_that_is_multiplied_with(
    op: Any, text: str, ordered: bool, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BLOCKS", blocks)
    found = case(op, text, ordered=ordered)
    parts = list(found.packed.dense_rows(found.program.store))
    assert [len(part) for part in parts] == {1: [16, 16, 5], 2: [32, 5], 128: [37]}[blocks]
    assert all(part.dtype == torch.float32 and part.shape[1] == K for part in parts)
    # Codes times scales are exact to half a step of float32, and a branch adds RANK products.
    size = float(found.dense.abs().max())
    torch.testing.assert_close(torch.cat(parts).double(), found.dense, rtol=2**-23, atol=(RANK + 1) * 2**-23 * size)
    assert torch.equal(found.packed.dense(found.program.store), torch.cat(parts))


def test_no_more_blocks_are_unpacked_than_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCKS", 2)
    unpacked: list[tuple[Format, tuple[int, ...], int]] = []

    def recorded(fmt: Format, weight: Tensor, scale: Tensor | None, n: int, k: int) -> Tensor:
        unpacked.append((fmt, tuple(weight.shape), n))
        assert scale is None or scale.shape[0] == weight.shape[0]
        return formats.unpack(fmt, weight, scale, n, k)

    monkeypatch.setattr(module, "unpack", recorded)
    found = case(BRANCH)
    list(found.packed.dense_rows(found.program.store))
    int4, half = Format("int4", 32), Format("float16")
    a = (half, (1, K, 16), RANK)
    assert unpacked == [
        (int4, (2, 16, 16, 4), 32), (half, (2, RANK, 16), 32), a,
        (int4, (1, 16, 16, 4), 5), (half, (1, RANK, 16), 5), a,
    ]  # fmt: skip


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("op", PACKED_OPS)
def test_float_rows_have_the_columns_of_the_packed_ones(
    op: Any, ordered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BLOCKS", 1)
    found, floats = case(op, ordered=ordered), random(N, K, seed=9)
    store = WeightStore.in_memory({"float": floats.double(), "other": torch.zeros(1)})
    pairs = list(float_and_packed_rows(found.program, found.node, store, "float"))
    assert len(pairs) == 3 and all(rows.dtype == torch.float32 for pair in pairs for rows in pair)
    rows, packed = (torch.cat(part) for part in zip(*pairs, strict=True))
    assert torch.equal(rows, floats[:, found.order] if ordered else floats)
    assert torch.equal(packed, found.packed.dense(found.program.store))


def test_arguments_of_another_op_keep_what_is_not_changed() -> None:
    found = case(LINEAR)
    packed = found.packed
    q, q_scale, sums = (named(found.program, key) for key in ("a", "b", "order"))
    got = packed.arguments(LINEAR_A8, q=q, q_scale=q_scale, q_sums=sums, out_features=5)
    assert got == (q, q_scale, sums, packed.weight, packed.scale, packed.bias, "int4-g32", 5)
    back = case(BRANCH).packed
    assert back.arguments(LINEAR) == tuple(back.operands[name] for name in operand_names(LINEAR))


@pytest.mark.parametrize("op", PACKED_OPS)
@pytest.mark.parametrize("before", [False, True])
def test_a_bias_is_set(op: Any, before: bool) -> None:
    found = case(op, bias=before)
    plain, _ = run(case(op, bias=False).program)
    bias = found.program.add_weight("new", random(N, seed=8))
    found.packed.set_bias(bias)
    assert found.packed.bias is bias
    verify(found.program)
    got, _ = run(found.program)
    torch.testing.assert_close(got, plain + random(N, seed=8), rtol=1e-5, atol=1e-4)
