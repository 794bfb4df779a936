"""A packed matrix in the place of a float one: where its tensors are stored, and what becomes of the node."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hikui.lowering.errors import HikuiError
from hikui.lowering.formats import Format, Packed, pack
from hikui.lowering.ir.packed import PackedLinear
from hikui.lowering.ir.program import BLOCK, FLOAT_WEIGHT, FORMAT, GROUP, SITE, Program
from hikui.lowering.ir.verifier import verify
from hikui.passes.graph import sites, weight_of
from hikui.passes.quantise.packing import float_linears, pack_by_rows, replace_with_packed
from hikui.passes.quantise.rounding import round_matrix
from tests.passes.helpers import calls, lower, program_of, random

FMT = Format("int8", 32)
N, K = 24, 32


def read_often(times: int = 4) -> Program:
    """One matrix that several linears read, each of another activation."""

    def body(x: Tensor, a__weight: Tensor) -> Tensor:
        return sum((F.linear(x * (2 + at), a__weight) for at in range(times)), torch.zeros(1))

    program = program_of(body, embedding=random(N, K), a__weight=random(N, K, seed=1))
    return lower(program, "canonicalise").clone()


def packed(seed: int) -> Packed:
    rounded = round_matrix(random(N, K, seed=seed), FMT)
    return pack(FMT, rounded.codes, rounded.scale)


def held(program: Program) -> list[tuple[str, str]]:
    """Keys of weight and scales of every packed site, in graph order."""
    apart = [PackedLinear.of(node) for node in calls(program, torch.ops.hikui.linear.default)]
    return [(program.weight_of(each.weight), program.weight_of(each.scale)) for each in apart if each.scale is not None]


def test_equal_contents_share_a_placeholder_and_others_get_a_number() -> None:
    program = read_often()
    for node, seed in zip(float_linears(program), (2, 3, 2, 3), strict=True):
        replace_with_packed(program, node, FMT, packed(seed))
    first = ("a.weight.int8-g32", "a.weight.int8-g32.scale")
    second = ("a.weight.int8-g32#2", "a.weight.int8-g32.scale#2")
    assert held(program) == [first, second, first, second]
    keys = [program.weight_of(node) for node in program.weight_nodes()]
    assert len(keys) == len(set(keys)), "a tensor has one placeholder"
    assert set(keys) == {"embedding", "a.weight", *first, *second}
    for (weight, scale), seed in zip(held(program), (2, 3, 2, 3), strict=True):
        assert torch.equal(program.store.load(weight), packed(seed).weight)
        assert torch.equal(program.store.load(scale), packed(seed).scale)  # type: ignore[arg-type]
    program.recompile()
    verify(program)


def test_a_third_of_other_contents_gets_the_next_number() -> None:
    program = read_often()
    for node, seed in zip(float_linears(program), (2, 3, 4, 4), strict=True):
        replace_with_packed(program, node, FMT, packed(seed))
    assert [weight.partition("#")[2] for weight, _ in held(program)] == ["", "2", "3", "3"]


def test_weight_and_scales_are_compared_each_on_its_own() -> None:
    program = read_often(2)
    codes, scale = packed(2)
    assert scale is not None
    for node, by in zip(float_linears(program), (1, 2), strict=True):
        replace_with_packed(program, node, FMT, Packed(codes, scale * by))
    assert held(program) == [
        ("a.weight.int8-g32", "a.weight.int8-g32.scale"),
        ("a.weight.int8-g32", "a.weight.int8-g32.scale#2"),
    ]


def test_a_stored_tensor_without_a_placeholder_gets_one() -> None:
    program = read_often(1)
    program.store.put("a.weight.int8-g32", packed(2).weight)
    replace_with_packed(program, float_linears(program)[0], FMT, packed(2))
    assert held(program) == [("a.weight.int8-g32", "a.weight.int8-g32.scale")]


def test_another_format_of_the_same_matrix_has_a_name_of_its_own() -> None:
    program = read_often(2)
    for node, fmt in zip(float_linears(program), (Format("float32"), Format("float16")), strict=True):
        replace_with_packed(program, node, fmt, pack(fmt, random(N, K, seed=1)))
    stored = [PackedLinear.of(node) for node in calls(program, torch.ops.hikui.linear.default)]
    assert [program.weight_of(each.weight) for each in stored] == ["a.weight.float32", "a.weight.float16"]
    assert [each.scale for each in stored] == [None, None]


@pytest.mark.parametrize("named", [True, False])
def test_the_node_in_its_place_takes_over_what_is_known(named: bool) -> None:
    program = read_often(1)
    (node,) = float_linears(program)
    node.meta[BLOCK] = 3
    if not named:
        del node.meta[SITE], node.meta[GROUP]
    x = node.args[0]
    assert isinstance(x, torch.fx.Node)
    readers = set(node.users)
    out = replace_with_packed(program, node, FMT, packed(2))
    assert out.meta[FLOAT_WEIGHT] == "a.weight" and out.meta[BLOCK] == 3
    assert (out.meta.get(SITE), out.meta.get(FORMAT)) == (("a", "int8-g32") if named else (None, None))
    assert out.args[0] is x and out.args[3] is None and out.args[5] == N
    assert set(out.users) == readers and not float_linears(program)


@pytest.mark.parametrize("by_name", [True, False])
def test_a_bias_is_kept_and_another_activation_can_be_given(by_name: bool) -> None:
    def body(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.linear(x, a, b)

    program = program_of(body, embedding=random(N, K), a=random(N, K, seed=1), b=random(N)).clone()
    (node,) = float_linears(program)
    x, weight, bias = node.args
    assert isinstance(x, torch.fx.Node)
    if by_name:
        node.args, node.kwargs = (x, weight), {"bias": bias}
    with program.graph.inserting_before(node):
        other = program.graph.call_function(torch.ops.aten.neg.default, (x,))
    program.infer(other)
    out = replace_with_packed(program, node, FMT, packed(2), other)
    assert out.args[0] is other and out.args[3] is bias


@pytest.mark.parametrize("name", ["int4-g32", "float16", "nf4-channel"])
@pytest.mark.parametrize("instead", [True, False])
def test_parts_of_rows_are_put_together(name: str, instead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hikui.passes.matrices.PART", 16 * K)
    n, fmt = 53, Format.parse(name)
    weight, other = random(n, K, seed=1), random(n, K, seed=2)

    def body(x: Tensor, a: Tensor) -> Tensor:
        return F.linear(x, a)

    program = lower(program_of(body, embedding=random(n, K), a=weight), "canonicalise")
    seen: list[int] = []

    def pack_rows(rows: Tensor) -> Packed:
        seen.append(len(rows))
        if not fmt.is_integer:
            return pack(fmt, rows)
        rounded = round_matrix(rows, fmt)
        return pack(fmt, rounded.codes, rounded.scale)

    (site,) = sites(program)
    got = pack_by_rows(program, weight_of(site), "a", fmt, pack_rows, instead=other if instead else None)
    assert seen == [16, 16, 16, 5]
    want = pack_rows(other if instead else weight)
    assert torch.equal(got.weight, want.weight) and got.weight.dtype == want.weight.dtype
    assert (got.scale is None) == (want.scale is None)
    if got.scale is not None and want.scale is not None:
        assert torch.equal(got.scale, want.scale)
    seen.clear()
    pack_by_rows(program, weight_of(site), "a", fmt, pack_rows, times=2)
    assert seen == [32, 21]


def test_a_broken_matrix_is_named() -> None:
    program = read_often(1)
    weight = program.store.load("a.weight").clone()
    weight[3, 4] = torch.nan
    program.store.put("a.weight", weight)
    (node,) = sites(program)
    with pytest.raises(HikuiError, match=r"Site here: 1 of 768 values of 'a.weight' are NaN or infinite"):
        pack_by_rows(program, weight_of(node), "here", FMT, lambda rows: packed(2))
