"""activation and dead_code."""

import pytest
import torch

from hikui.lowering.errors import UsageError
from hikui.lowering.passes_base import PassContext
from hikui.lowering.program import FORMAT, GROUP, SITE
from hikui.models.synthetic import FAMILIES
from hikui.passes import Activation, DeadCode
from hikui.passes.graph import FLOAT_WEIGHT, hikui, sites

from .helpers import assert_settled, calibration, calls, canonical, check, lower, run


def test_text_and_sharing() -> None:
    check(
        lower(canonical("llama"), "rtn{bits=4,group=32},activation"),
        """
        // CHECK: %[[A:.*]] = hikui.quantize_activation(%{{.*}}) : (i8[1, T, 128], f32[1, T], i32[1, T, 4])
        // CHECK-NEXT: %[[Q:.*]] = getitem(%[[A]], 0) : i8[1, T, 128]
        // CHECK-NEXT: %[[S:.*]] = getitem(%[[A]], 1) : f32[1, T]
        // CHECK-NEXT: %[[U:.*]] = getitem(%[[A]], 2) : i32[1, T, 4]
        // CHECK-NEXT: hikui.linear_a8(%[[Q]], %[[S]], %[[U]], %w_model_layers_0_self_attn_q_proj_weight_int4_g32,
        // CHECK-SAME: %w_model_layers_0_self_attn_q_proj_weight_int4_g32_scale, None, "int4-g32", 48) : f32[1, T, 48]
        // CHECK-SAME: site=model.layers.0.self_attn.q_proj
        // CHECK: hikui.linear_a8(%[[Q]], %[[S]], %[[U]], %w_model_layers_0_self_attn_k_proj_weight_int4_g32,
        // CHECK: hikui.linear_a8(%[[Q]], %[[S]], %[[U]], %w_model_layers_0_self_attn_v_proj_weight_int4_g32,
        """,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_one_quantiser_a_tied_group(family: str) -> None:
    out = lower(canonical(family), "rtn{bits=8},activation")
    groups = {node.meta[GROUP] for node in sites(out)}
    assert len(calls(out, hikui.quantize_activation.default)) == len(groups)
    assert {node.target for node in sites(out)} == {hikui.linear_a8.default}
    assert_settled(Activation(), out)


def test_stays_near_the_weight_only_program() -> None:
    before = lower(canonical("llama"), "rtn{bits=8,group=32}")
    a, b = run(before)[0], run(lower(before, "activation"))[0]
    assert 0 < float((a - b).norm() / a.norm()) < 0.03


def test_float_weights_keep_float_activations() -> None:
    program = lower(canonical("llama"), "rtn{bits=16}")
    result = Activation().run(program, PassContext())
    assert not result.modified
    mixed = lower(canonical("llama"), "rtn{bits=8,skip=lm_head},pack,activation")
    (head,) = [node for node in sites(mixed) if node.meta[SITE] == "lm_head"]
    assert head.target is hikui.linear.default
    assert head.meta[FORMAT] == "float32"


def test_bits() -> None:
    with pytest.raises(UsageError, match="4 bits; it takes 8"):
        Activation(bits=4)


def test_dead_code_drops_float_weights_and_statistics() -> None:
    program = lower(canonical("qwen2"), "calibrate,rtn{bits=8}", calibration(canonical("qwen2")))
    assert "model.layers.0.mlp.up_proj.weight" in program.store
    out = lower(program, "dead_code")
    left = out.store.keys()
    assert not [key for key in left if key.startswith("statistics/")]
    assert "model.layers.0.mlp.up_proj.weight" not in left
    # The head is tied to the embedding, which is still read.
    assert "lm_head.weight" in left or "model.embed_tokens.weight" in left
    assert set(left) == {out.weight_of(node) for node in out.weight_nodes()}
    assert all(FLOAT_WEIGHT not in node.meta for node in out.graph.nodes)
    assert torch.equal(run(program)[0], run(out)[0])
    assert_settled(DeadCode(), out)
    assert "model.layers.0.mlp.up_proj.weight" in program.store


def test_dead_code_drops_calls() -> None:
    program = canonical("llama").clone()
    with program.graph.inserting_before(program.output_node):
        first, *_ = program.output_node.args[0]
        program.graph.call_function(torch.ops.aten.erf.default, (first,))
    program.recompile()
    assert calls(program, torch.ops.aten.erf.default)
    assert not calls(lower(program, "dead_code"), torch.ops.aten.erf.default)
