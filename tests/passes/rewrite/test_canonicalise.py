"""canonicalise: one form for every traced model, and names for its linear sites."""

import pytest
import torch
from torch import Tensor

from hikui.lowering.errors import HikuiError
from hikui.lowering.ir.program import BLOCK, GROUP, SITE
from hikui.lowering.pipeline.contract import PassContext
from hikui.models.synthetic import FAMILIES
from hikui.passes import Canonicalise
from hikui.passes.graph import aten, matrix_shape, sites
from tests.passes.helpers import (
    SMALL_VOCABULARY,
    assert_same,
    assert_settled,
    calls,
    canonical,
    check,
    lower,
    program_of,
    random,
    traced,
)

EMBEDDING = random(SMALL_VOCABULARY, 12)


@pytest.mark.parametrize("family", FAMILIES)
def test_keeps_the_numbers(family: str) -> None:
    assert_same(traced(family), canonical(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_second_run_changes_nothing(family: str) -> None:
    assert_settled(Canonicalise(), canonical(family))


@pytest.mark.parametrize(
    ("family", "count", "tied"),
    [
        ("llama", 22, {"self_attn.q_proj+k_proj+v_proj": 3, "mlp.gate_proj+up_proj": 3}),
        ("qwen2", 15, {"self_attn.q_proj+k_proj+v_proj": 2, "mlp.gate_proj+up_proj": 2}),
        ("opt", 13, {"self_attn.q_proj+k_proj+v_proj": 2}),
        ("gpt2", 9, {}),
        ("bloom", 9, {}),
    ],
)
def test_names_sites_and_tied_groups(family: str, count: int, tied: dict[str, int]) -> None:
    found = sites(canonical(family))
    assert len({node.meta[SITE] for node in found}) == len(found) == count
    assert found[-1].meta[SITE] == "lm_head"
    names = {node.meta[GROUP] for node in found}
    for suffix, groups in tied.items():
        assert sum(name.endswith(suffix) for name in names) == groups
    assert sum("+" in name for name in names) == sum(tied.values())
    blocks = [node.meta[BLOCK] for node in found[:-1]]
    assert blocks == sorted(blocks)
    assert set(blocks) == set(range(max(blocks) + 1))


def test_llama_text() -> None:
    check(
        canonical("llama"),
        """
        // CHECK: %[[Q:.*]] = aten.linear(%[[X:.*]], %w_model_layers_0_self_attn_q_proj_weight) : f32[1, T, 48]
        // CHECK-SAME: site=model.layers.0.self_attn.q_proj group=model.layers.0.self_attn.q_proj+k_proj+v_proj block=0
        // CHECK: aten.linear(%[[X]], %w_model_layers_0_self_attn_k_proj_weight)
        // CHECK-NOT: aten.view
        // CHECK-NOT: aten.to
        // CHECK: %[[LOGITS:.*]] = aten.linear({{.*}}, %w_lm_head_weight){{.*}}site=lm_head group=lm_head
        // CHECK: return %[[LOGITS]],
        """,
    )


def test_conv1d_of_gpt2_becomes_linear() -> None:
    program = canonical("gpt2")
    assert not calls(program, aten.addmm.default)
    check(
        program,
        """
        // CHECK: %w_transformer_h_0_attn_c_attn_weight_transposed = weight
        // CHECK-SAME: "transformer.h.0.attn.c_attn.weight.transposed" : f32[144, 48]
        // CHECK: aten.linear({{.*}}, %w_transformer_h_0_attn_c_attn_weight_transposed,
        // CHECK-SAME: %w_transformer_h_0_attn_c_attn_bias)
        // CHECK-SAME: f32[1, T, 144]  // site=transformer.h.0.attn.c_attn
        """,
    )
    assert "transformer.h.0.attn.c_attn.weight" not in program.store
    want = traced("gpt2").store.load("transformer.h.0.attn.c_attn.weight").t()
    assert torch.equal(program.store.load("transformer.h.0.attn.c_attn.weight.transposed"), want)


def test_products_in_every_form() -> None:
    a, b, c, d = random(12, 20, seed=1), random(9, 20, seed=2), random(9, 7, seed=3), random(7, 5, seed=4)

    def body(x: Tensor, a__weight: Tensor, b__weight: Tensor, c__weight: Tensor, d__weight: Tensor) -> Tensor:
        y = torch.matmul(x, a__weight)
        y = torch.matmul(y, b__weight.t())
        y = torch.matmul(y, c__weight.transpose(-1, 0).permute(1, 0))
        return torch.mm(y.reshape(-1, 7), d__weight).reshape(1, -1, 5)

    program = program_of(body, embedding=EMBEDDING, a__weight=a, b__weight=b, c__weight=c, d__weight=d)
    out = lower(program, "canonicalise")
    assert [node.meta[SITE] for node in sites(out)] == ["a", "b", "c", "d"]
    assert [matrix_shape(node) for node in sites(out)] == [(20, 12), (9, 20), (7, 9), (5, 7)]
    assert_same(program, out)


def test_a_weight_read_twice_is_two_sites() -> None:
    def body(x: Tensor, a__weight: Tensor) -> Tensor:
        return torch.nn.functional.linear(torch.nn.functional.linear(x, a__weight).relu(), a__weight)

    out = lower(program_of(body, embedding=EMBEDDING, a__weight=random(12, 12)), "canonicalise")
    assert [node.meta[SITE] for node in sites(out)] == ["a", "a#2"]


def test_equal_tables_become_one_but_equal_parameters_stay() -> None:
    table = random(12)

    def body(x: Tensor, one: Tensor, two: Tensor, n__bias: Tensor, m__bias: Tensor) -> Tensor:
        return x * one + x * two + n__bias + m__bias

    weights = {"one": table, "two": table.clone(), "n__bias": table.clone(), "m__bias": table.clone()}
    program = program_of(body, embedding=EMBEDDING, **weights)
    out = lower(program, "canonicalise")
    assert out.store.keys() == ["embedding", "m.bias", "n.bias", "one"]
    assert_same(program, out)


def test_noops_go_and_what_only_looks_like_one_stays() -> None:
    def body(x: Tensor) -> Tensor:
        y = torch.nn.functional.dropout(x, 0.5, training=False).contiguous().clone().detach() * 1.0
        y = y.to(torch.float32).reshape(1, -1, 12).expand(1, -1, 12)[..., 0:12]
        return (y.half().float() * 2.0)[..., 1:]

    program = program_of(body, embedding=EMBEDDING)
    out = lower(program, "canonicalise")
    check(
        out,
        """
        // CHECK: aten.add
        // CHECK-NOT: dropout
        // CHECK-NOT: reshape
        // CHECK: f16[1, T, 12]
        // CHECK-NEXT: f32[1, T, 12]
        // CHECK-NEXT: aten.mul.Tensor({{.*}}, 2.0)
        // CHECK-NEXT: aten.slice.Tensor
        // CHECK-NEXT: return
        """,
    )
    assert_same(program, out)


def test_unread_calls_go() -> None:
    def body(x: Tensor, a__weight: Tensor) -> Tensor:
        torch.nn.functional.linear(x, a__weight)
        return x * 2

    out = lower(program_of(body, embedding=EMBEDDING, a__weight=random(3, 12)), "canonicalise")
    assert not sites(out)
    assert out.store.keys() == ["embedding"]


def test_blocks_out_of_order_are_refused() -> None:
    program = traced("llama").clone()
    for node in calls(program, aten.linear.default)[:3]:
        node.meta[BLOCK] = 2
    with pytest.raises(HikuiError, match=r"o_proj of block 0 comes after block 2"):
        Canonicalise().run(program, PassContext())
