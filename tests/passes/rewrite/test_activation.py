"""activation and dead_code."""

import pytest
import torch
from torch import fx

from hikui.lowering.errors import HikuiError, UsageError
from hikui.lowering.ir.interpreter import Interpreter
from hikui.lowering.ir.program import FLOAT_WEIGHT, FORMAT, GROUP, SITE
from hikui.lowering.pipeline.contract import PassContext
from hikui.models.synthetic import FAMILIES
from hikui.passes import Activation, DeadCode
from hikui.passes.graph import hikui, sites
from tests.passes.helpers import assert_settled, calibration, calls, canonical, check, lower, run


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


def test_text_of_four_bits() -> None:
    check(
        lower(canonical("llama"), "rtn{bits=4,group=32},activation{bits=4}"),
        """
        // CHECK-NOT: hikui.quantize_activation(
        // CHECK: %[[A:.*]] = hikui.quantize_activation_int4(%{{.*}}) : (i8[1, T, 128], f32[1, T], i32[1, T, 4])
        // CHECK-NEXT: %[[Q:.*]] = getitem(%[[A]], 0) : i8[1, T, 128]
        // CHECK: hikui.linear_a8(%[[Q]],
        """,
    )


def test_text_of_a_static_step() -> None:
    program = canonical("llama")
    check(
        lower(program, "calibrate,rtn{bits=4,group=32},activation{static=true},dead_code", calibration(program)),
        """
        // CHECK: %[[STEP:w_.*_step]] = weight "{{.*}}.step" : f32[1]
        // CHECK: %[[A:.*]] = hikui.quantize_activation_static(%{{.*}}, %{{.*}}_step) : (i8[1, T, 128], f32[1, T],
        // CHECK-NEXT: %[[Q:.*]] = getitem(%[[A]], 0) : i8[1, T, 128]
        // CHECK: hikui.linear_a8(%[[Q]],
        """,
    )


def test_the_static_step_is_the_calibrated_largest_value_over_127() -> None:
    """Over the calibration text itself, so nothing is clipped; in float64 from what the sites read."""
    program, data = canonical("qwen2"), calibration(canonical("qwen2"))
    before = lower(program, "calibrate,rtn{bits=8,group=32}", data)
    largest: dict[str, float] = {}

    def observe(node: fx.Node, args: tuple[object, ...], result: object) -> None:
        if SITE in node.meta:
            assert isinstance(args[0], torch.Tensor)
            largest[node.meta[GROUP]] = max(largest.get(node.meta[GROUP], 0.0), float(args[0].abs().max()))

    for chunk in data.chunks:
        interpreter = Interpreter(lower(program, "rtn{bits=32}"), observe=observe)
        interpreter.run(chunk, 0, interpreter.new_caches())
    after = lower(before, "activation{static=true},dead_code")
    steps = {key.removesuffix(".step"): after.store.load(key) for key in after.store.keys() if key.endswith(".step")}
    assert steps.keys() == {node.meta[GROUP] for node in sites(after)}
    for group, step in steps.items():
        assert step.shape == (1,) and float(step) == pytest.approx(largest[group] / 127, rel=1e-5)
    a, b = run(before)[0], run(after)[0]
    assert 0 < float((a - b).norm() / a.norm()) < 0.1
    assert_settled(Activation(static=True), after)


def test_four_bits_are_coarser_than_eight() -> None:
    before = lower(canonical("llama"), "rtn{bits=8,group=32}")
    a = run(before)[0]
    eight, four = (run(lower(before, f"activation{{bits={bits}}}"))[0] for bits in (8, 4))
    # A step is 127/7 times as large.
    ratio = float((four - a).norm() / (eight - a).norm())
    assert 6 < ratio < 40
    assert_settled(Activation(bits=4), lower(before, "activation{bits=4}"))


def test_a_static_step_wants_statistics() -> None:
    with pytest.raises(HikuiError, match=r"q_proj has no statistics to take a static step from; run `calibrate`"):
        lower(canonical("llama"), "rtn{bits=8},activation{static=true}")
    program = canonical("llama")
    with pytest.raises(HikuiError, match="no statistics to take a static step from"):
        lower(program, "calibrate,rtn{bits=8},dead_code,activation{static=true}", calibration(program))


@pytest.mark.parametrize("options", ["bits=4", "static=true"])
def test_branches_are_fused_with_every_quantiser(options: str) -> None:
    program = canonical("llama")
    pipeline = f"calibrate,rtn{{bits=2,group=32}},sub_branch{{rank=2}},pack{{format=float16}},activation{{{options}}}"
    unfused = lower(program, pipeline, calibration(program))
    fused = lower(unfused, "fuse,dead_code")
    assert len(calls(fused, hikui.linear_a8_branch.default)) == len(sites(unfused))
    assert torch.allclose(run(unfused)[0], run(fused)[0], rtol=1e-4, atol=1e-4)


def test_bits() -> None:
    with pytest.raises(UsageError, match="5 bits; it takes 8 or 4"):
        Activation(bits=5)
    with pytest.raises(UsageError, match="static step for 8 bits only"):
        Activation(bits=4, static=True)


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
        first, *_ = program.outputs()
        program.graph.call_function(torch.ops.aten.erf.default, (first,))
    program.recompile()
    assert calls(program, torch.ops.aten.erf.default)
    assert not calls(lower(program, "dead_code"), torch.ops.aten.erf.default)
