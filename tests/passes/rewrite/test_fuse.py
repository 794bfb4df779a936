"""fuse: each fusion, what it takes and what it leaves."""

import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hikui.lowering.ir.program import Program
from hikui.lowering.pipeline.contract import PassContext
from hikui.models.synthetic import FAMILIES
from hikui.passes import Fuse
from hikui.passes.graph import aten, hikui, sites
from tests.lowering import handmade
from tests.passes.helpers import (
    SMALL_VOCABULARY,
    assert_same,
    assert_settled,
    calibration,
    calls,
    canonical,
    check,
    lower,
    program_of,
    random,
    traced,
)

EMBEDDING = random(SMALL_VOCABULARY, 40)


def small(body: Callable[..., Tensor], **weights: Tensor) -> Program:
    return lower(program_of(body, embedding=EMBEDDING, **weights), "canonicalise")


def notes(program: Program, step: Fuse | None = None) -> list[str]:
    return (step or Fuse()).run(program, PassContext()).notes


@pytest.mark.parametrize("family", FAMILIES)
def test_float_program_stays_the_same(family: str) -> None:
    fused = lower(canonical(family), "fuse,pack,dead_code")
    assert_same(traced(family), fused)
    assert_settled(Fuse(), fused)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_program_stays_the_same(family: str, bits: int) -> None:
    data = calibration(canonical(family))
    start = f"canonicalise,calibrate,rtn{{bits={bits},group=32}},sub_branch{{rank=3}},activation,"
    plain = lower(traced(family), start + "pack,dead_code", data)
    fused = lower(traced(family), start + "fuse,pack,dead_code", data)
    assert_same(plain, fused)
    assert_settled(Fuse(), fused)


def test_llama_is_made_of_fused_ops_alone() -> None:
    fused = lower(canonical("llama"), "rtn{bits=4},activation,fuse,dead_code")
    kinds = {str(node.target) for node in fused.graph.nodes if node.op == "call_function"}
    assert not {
        name for name in kinds if any(op in name for op in ("softmax", "rsqrt", "silu", "cache", "mask", "neg"))
    }
    counted = {op: len(calls(fused, getattr(hikui, op).default)) for op in ("rms_norm_quantize", "swiglu_quantize")}
    assert counted == {"rms_norm_quantize": 7, "swiglu_quantize": 3}
    assert len(calls(fused, hikui.attention.default)) == 3
    assert len(calls(fused, hikui.rotary.default)) == 6
    check(
        fused,
        """
        // CHECK: %[[N:.*]] = hikui.rms_norm_quantize(%{{.*}}, %w_model_layers_0_input_layernorm_weight, 1e-05)
        // CHECK: %[[Q:.*]] = getitem(%[[N]], 1) : i8[1, T, 128]
        // CHECK: hikui.linear_a8(%[[Q]], {{.*}} site=model.layers.0.self_attn.q_proj
        // CHECK: hikui.rotary({{.*}}) : f32[1, 6, T, 8]
        // CHECK: %[[K:.*]] = hikui.rotary({{.*}}) : f32[1, 2, T, 8]
        // CHECK: %[[A:.*]] = hikui.attention({{.*}}, %[[K]], {{.*}}, %key_cache_0, %value_cache_0, %past,
        // CHECK-SAME: : (f32[1, 6, T, 8], f32[1, 2, 64, 8], f32[1, 2, 64, 8])
        // CHECK: %[[KEYS:.*]] = getitem(%[[A]], 1)
        // CHECK: %[[VALUES:.*]] = getitem(%[[A]], 2)
        // CHECK: hikui.swiglu_quantize(
        // CHECK: return %{{.*}}, %[[KEYS]], %[[VALUES]],
        """,
    )


@pytest.mark.parametrize("option", ["norm", "attention", "rotary", "swiglu", "branch", "quantise"])
def test_each_fusion_can_be_left_out(option: str) -> None:
    program = lower(canonical("llama"), "calibrate,rtn,sub_branch{rank=2},activation", calibration(canonical("llama")))
    fused = lower(program, f"fuse{{{option}=false}}")
    kept = {
        "norm": aten.rsqrt.default,
        "attention": aten.scaled_dot_product_attention.default,
        "rotary": aten.neg.default,
        "swiglu": aten.silu.default,
        "branch": hikui.linear_a8.default,
        "quantise": hikui.rms_norm.default,
    }
    for name, target in kept.items():
        assert bool(calls(fused, target)) == (name == option)
    assert_same(program, fused)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_range_of_t_stays(family: str) -> None:
    program = lower(canonical(family), "rtn,activation,fuse,dead_code")
    length = program.input_nodes()[0].meta["val"].shape[1].node
    found = length.shape_env.var_to_range[length.expr]
    assert (found.lower, found.upper) == (1, program.config.context_length)


# ── norm ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _square(x: Tensor) -> Tensor:
    return x * x


@pytest.mark.parametrize("square", [lambda x: x.pow(2), torch.square, _square])
@pytest.mark.parametrize("weight_first", [True, False])
def test_norm_forms(square: Callable[[Tensor], Tensor], weight_first: bool) -> None:
    def body(x: Tensor, n__weight: Tensor) -> Tensor:
        normed = x.float() * torch.rsqrt(square(x.float()).mean(-1, keepdim=True) + 1e-3)
        return n__weight * normed.to(x.dtype) if weight_first else normed * n__weight

    program = small(body, n__weight=random(40))
    fused = lower(program, "fuse")
    assert len(calls(fused, hikui.rms_norm.default)) == 1
    assert not calls(fused, aten.rsqrt.default)
    assert_same(program, fused, 1e-6)
    x = EMBEDDING.double()
    (node,) = calls(fused, hikui.rms_norm.default)
    assert node.args[2] == 1e-3
    want = random(40).double() * x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    assert torch.allclose(hikui.rms_norm(EMBEDDING, random(40), 1e-3).double(), want, atol=1e-5)


def test_norm_near_misses_say_why() -> None:
    def over_all(x: Tensor, n__weight: Tensor) -> Tensor:
        return n__weight * (x * torch.rsqrt(x.pow(2).mean((-1, -2), keepdim=True) + 1e-6))

    def cubed(x: Tensor, n__weight: Tensor) -> Tensor:
        return n__weight * (x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 1e-6))

    def other(x: Tensor, n__weight: Tensor) -> Tensor:
        return n__weight * (x.tanh() * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    def no_eps(x: Tensor, n__weight: Tensor) -> Tensor:
        return n__weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)))

    for body, reason in (
        (over_all, "no mean over the last dimension"),
        (cubed, "not taken of squares"),
        (other, "does not multiply"),
        (no_eps, "no eps"),
    ):
        program = small(body, n__weight=random(40))
        result = Fuse().run(program, PassContext())
        assert not result.modified
        assert len(result.notes) == 1
        assert reason in result.notes[0]


# ── swiglu, rotary, quantise, bias ──────────────────────────────────────────────────────────────────────────────────


def test_swiglu_near_misses() -> None:
    def squared(x: Tensor) -> Tensor:
        return F.silu(x) * F.silu(x)

    def broadcast(x: Tensor, n__weight: Tensor) -> Tensor:
        return F.silu(x) * n__weight

    def alone(x: Tensor) -> Tensor:
        return F.silu(x) + x

    for program in (small(broadcast, n__weight=random(40)), small(alone)):
        result = Fuse().run(program, PassContext())
        assert not result.modified
        assert "swiglu: not fused" in result.notes[0]
    program = small(squared)
    assert_same(program, lower(program, "fuse"))


def rotate(x: Tensor, cos: Tensor, sin: Tensor, half: int) -> Tensor:
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos.unsqueeze(1) + turned * sin.unsqueeze(1)


@pytest.mark.parametrize(
    ("half", "twice", "fused"), [(20, True, True), (20, False, False), (8, True, False)], ids=["whole", "unequal", "8"]
)
def test_rotary_needs_two_equal_halves(half: int, twice: bool, fused: bool) -> None:
    def body(x: Tensor, table: Tensor) -> Tensor:
        angles = torch.arange(x.shape[1], dtype=torch.float32)[None, :, None] * table[: 20 if twice else 40]
        both = torch.cat((angles, angles), -1) if twice else angles
        return rotate(x.unsqueeze(1), both.cos(), both.sin(), half).squeeze(1)

    program = small(body, table=random(40))
    out = lower(program, "fuse")
    assert len(calls(out, hikui.rotary.default)) == int(fused)
    assert_same(program, out, 1e-6)
    if not fused:
        assert any("rotary: not fused" in note for note in notes(program))


def test_quantised_norm_keeps_its_float_output_for_other_readers() -> None:
    def body(x: Tensor, n__weight: Tensor, a__weight: Tensor) -> Tensor:
        y = n__weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        return F.linear(y, a__weight) + y

    program = small(body, n__weight=random(40), a__weight=random(40, 40))
    plain, fused = lower(program, "rtn,activation"), lower(program, "rtn,activation,fuse")
    (node,) = calls(fused, hikui.rms_norm_quantize.default)
    assert {user.args[1] for user in node.users if user.target is operator.getitem} == {0, 1, 2, 3}
    assert_same(plain, fused)


def test_bias_added_beside_goes_into_the_site() -> None:
    def body(x: Tensor, a__weight: Tensor, a__bias: Tensor, b__weight: Tensor, c: Tensor) -> Tensor:
        return F.linear(F.linear(x, a__weight) + a__bias, b__weight) + c.reshape(1, 1, 1)

    weights = {"a__weight": random(40, 40), "a__bias": random(40), "b__weight": random(24, 40), "c": random(1)}
    program = small(body, **weights)
    plain, fused = lower(program, "rtn,activation"), lower(program, "rtn,activation,fuse")
    first, second = sites(fused)
    assert fused.weight_of(first.args[5]) == "a.bias"  # type: ignore[arg-type]
    assert second.args[5] is None
    assert_same(plain, fused)


# ── attention ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_attention_with_repeated_heads() -> None:
    program = lower(handmade.program(), "canonicalise")
    fused = lower(program, "fuse")
    assert len(calls(fused, hikui.attention.default)) == 1
    assert not calls(fused, hikui.cache_update.default)
    assert not calls(fused, hikui.causal_mask.default)
    assert_same(program, fused)


def test_attention_scale() -> None:
    for family in ("llama", "opt"):
        for node in calls(lower(canonical(family), "fuse"), hikui.attention.default):
            size = int(node.args[0].meta["val"].shape[-1])  # type: ignore[union-attr]
            assert node.args[6] == pytest.approx(1.0 if family == "opt" else size**-0.5)


def change(program: Program, edit: Callable[[Program], None]) -> Program:
    out = program.clone()
    edit(out)
    out.recompile()
    return out


def test_attention_near_misses_say_why() -> None:
    sdpa = aten.scaled_dot_product_attention.default
    program = canonical("opt")

    def unmasked(work: Program) -> None:
        node = calls(work, sdpa)[0]
        node.args = (*node.args[:3], None)

    def biased(work: Program) -> None:
        node = calls(work, sdpa)[0]
        with work.graph.inserting_before(node):
            bias = work.graph.call_function(aten.add.Tensor, (node.args[3], 1.0))
        node.args = (*node.args[:3], bias)

    def twice(work: Program) -> None:
        node = calls(work, hikui.cache_update.default)[0]
        first, *caches = work.outputs()
        with work.graph.inserting_before(work.output_node):
            extra = work.graph.call_function(aten.mul.Tensor, (node, 2.0))
        work.output_node.args = ((first, extra, *caches[1:]),)

    def uncached(work: Program) -> None:
        node = calls(work, sdpa)[0]
        with work.graph.inserting_before(node):
            keys = work.graph.call_function(aten.tanh.default, (node.args[1],))
        node.args = (node.args[0], keys, *node.args[2:])

    for edit, reason in (
        (unmasked, "its mask is None"),
        (biased, "not hikui::causal_mask alone"),
        (twice, "read by 2 calls"),
        (uncached, "not an updated cache"),
    ):
        broken = change(program, edit)
        fused = lower(broken, "fuse")
        assert len(calls(fused, hikui.attention.default)) == 1
        assert any("attention: not fused" in note and reason in note for note in notes(broken))
        assert_same(broken, fused)


def test_bloom_says_why_its_attention_stays() -> None:
    found = notes(canonical("bloom"))
    assert len(found) == 2
    assert all("attention: not fused" in note and "ALiBi" in note for note in found)


# ── branch ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def branched() -> Program:
    return lower(canonical("llama"), "calibrate,rtn,sub_branch{rank=2},activation", calibration(canonical("llama")))


def test_branch_text() -> None:
    check(
        lower(branched(), "fuse,dead_code"),
        """
        // CHECK: "model.layers.0.self_attn.q_proj.branch.a.float16" : f16[1, 48, 16]
        // CHECK: "model.layers.0.self_attn.q_proj.branch.b.float16" : f16[3, 2, 16]
        // CHECK: %[[N:.*]] = hikui.rms_norm_quantize
        // CHECK: %[[X:.*]] = getitem(%[[N]], 0)
        // CHECK: hikui.linear_a8_branch({{.*}}, None, %[[X]], %w_model_layers_0_self_attn_q_proj_branch_a_float16,
        // CHECK-SAME: %w_model_layers_0_self_attn_q_proj_branch_b_float16, "int4-g64", 48) : f32[1, T, 48]
        // CHECK-SAME: site=model.layers.0.self_attn.q_proj
        // CHECK-NOT: aten.linear
        """,
    )


@pytest.mark.parametrize("first", ["pack{format=float16},fuse", "fuse{branch=false},pack{format=float16},fuse"])
def test_branch_fuses_after_packing_too(first: str) -> None:
    fused = lower(branched(), first + ",dead_code")
    assert len(calls(fused, hikui.linear_a8_branch.default)) == 22
    assert_same(branched(), fused)


def test_a_branch_in_float32_stays_beside() -> None:
    fused = lower(branched(), "pack{format=float32},fuse,dead_code")
    assert not calls(fused, hikui.linear_a8_branch.default)
    assert_same(branched(), fused)


def test_a_branch_of_another_activation_stays_beside() -> None:
    def edit(work: Program) -> None:
        for node in calls(work, aten.linear.default):
            if node.args[0].target is not aten.linear.default:  # type: ignore[union-attr]
                with work.graph.inserting_before(node):
                    other = work.graph.call_function(aten.mul.Tensor, (node.args[0], 0.5))
                node.args = (other, node.args[1])
                return

    broken = change(branched(), edit)
    fused = lower(broken, "fuse")
    assert len(calls(fused, hikui.linear_a8_branch.default)) == 21
    assert any("branch: not fused" in note for note in notes(broken))
    assert_same(broken, fused)
