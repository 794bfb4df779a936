"""awq: the exponent against brute force on the activations themselves, and what it buys."""

from functools import cache

import pytest
import torch

from hikui.lowering.errors import HikuiError, UsageError
from hikui.lowering.formats import Format, unpack
from hikui.lowering.ir.program import SITE, STATISTICS, Program
from hikui.lowering.pipeline.contract import PassContext
from hikui.lowering.pipeline.text import parse_pipeline
from hikui.passes import PASSES, Awq
from hikui.passes.graph import groups, hikui, is_weight, sites
from hikui.passes.quantise.rounding import dequantise, round_matrix
from tests.passes.helpers import assert_settled, calibration, calls, canonical, check, lower

from .test_smooth import FAMILIES, assert_equal_logits, inputs, weights

QKV = "model.layers.1.self_attn.q_proj+k_proj+v_proj"
OUT = "model.layers.1.self_attn.o_proj"
DOWN = "model.layers.1.mlp.down_proj"


@cache
def measured(family: str) -> Program:
    """With a few activations much larger than the others, as in grown models."""
    program = canonical(family).clone()
    for node in program.weight_nodes():
        if node.meta["val"].dim() == 1 and node.name.endswith("norm_weight"):
            norm = program.store.load(program.weight_of(node)).clone()
            norm[::9] *= 6.0
            program.store.put(program.weight_of(node), norm)
    return lower(program, "calibrate{gram=true}", calibration(program, 8, 40))


def test_text() -> None:
    check(
        lower(measured("llama"), "awq{bits=3,group=32,sites=layers.0.mlp}"),
        """
        // CHECK: "model.layers.0.mlp.gate_proj.weight.awq" : f32[116, 48]
        // CHECK: "model.layers.0.mlp.up_proj.weight.awq" : f32[116, 48]
        // CHECK: "model.layers.0.mlp.down_proj.weight.awq" : f32[48, 116]
        // CHECK-NOT: .awq"
        // CHECK: %[[X:.*]] = aten.mul.Tensor(%w_model_layers_0_post_attention_layernorm_weight_awq,
        // CHECK-NEXT: aten.linear(%[[X]], %w_model_layers_0_mlp_gate_proj_weight_awq)
        """,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_stay_and_a_second_run_does_nothing(family: str) -> None:
    program = measured(family)
    out = lower(program, "awq{bits=3,group=32}")
    assert_equal_logits(program, out)
    assert_settled(Awq(bits=3, group=32), out)
    assert_settled(Awq(bits=8), out)


@pytest.mark.parametrize("clip", ["minmax", "mse"])
@pytest.mark.parametrize(("group", "shared"), [(QKV, 1), (OUT, 3), (DOWN, 1)])
@pytest.mark.parametrize("judged", [1024, 20])
def test_the_exponent_is_the_best_on_the_activations(
    group: str, shared: int, clip: str, judged: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hikui.passes.transform.awq._ROWS", judged)
    program, data, fmt = measured("llama"), calibration(canonical("llama"), 8, 40), Format.parse("int3-g32")
    out = lower(program, f"awq{{bits=3,group=32,clip={clip},sites={group.rpartition('.')[0]}}}")
    x, matrices = inputs(program, group, data), weights(program, group)
    magnitude = x.abs().mean(0)
    if shared > 1:  # Three query heads of eight columns read one KV head.
        magnitude = magnitude.view(2, shared, 8).mean(1, keepdim=True).expand(2, shared, 8).flatten()
    errors, factors = [], []
    for step in range(20):
        s = magnitude ** (step / 20)
        s = s / (s.max() * s.min()).sqrt()
        error = 0.0
        for w in matrices:
            every = -(-w.shape[0] // judged)  # Of 48 rows with 20 judged: each third.
            some = w[::every]
            rounded = dequantise(round_matrix((some * s).float(), fmt, clip), fmt).double() / s
            error += every * float((x @ (rounded - some).t()).square().sum())
        errors.append(error)
        factors.append(s)
    best = min(range(20), key=errors.__getitem__)
    second = min(error for step, error in enumerate(errors) if step != best)
    assert second > errors[best] * (1 + 1e-5), "the best is clear enough for float32"
    factor = inputs(program, group, data).square().mean(0).sqrt() / inputs(out, group, data).square().mean(0).sqrt()
    torch.testing.assert_close(factor, factors[best], rtol=1e-4, atol=0)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [QKV, OUT, DOWN])
def test_rounded_activations_count_too(group: str, bits: int) -> None:
    """Against brute force: both errors on the activations themselves, the second of each 16th token."""
    program, data, fmt = measured("llama"), calibration(canonical("llama"), 8, 40), Format.parse("int4-g32")
    out = lower(program, f"awq{{bits=4,group=32,activation_bits={bits},sites={group.rpartition('.')[0]}}}")
    x, matrices = inputs(program, group, data), weights(program, group)
    magnitude = x.abs().mean(0)
    if group == OUT:
        magnitude = magnitude.view(2, 3, 8).mean(1, keepdim=True).expand(2, 3, 8).flatten()
    high = {8: 127, 4: 7}[bits]
    errors, factors = [], []
    for step in range(20):
        s = magnitude ** (step / 20)
        s = s / (s.max() * s.min()).sqrt()
        tokens = x[::16] / s
        scale = tokens.abs().amax(1, keepdim=True) / high
        off = (tokens / scale).round() * scale - tokens
        error = 0.0
        for w in matrices:
            rounded = dequantise(round_matrix((w * s).float(), fmt, "minmax"), fmt).double() / s
            error += float((x @ (rounded - w).t()).square().sum()) / len(x)
            error += float((off @ (w * s).t()).square().sum()) / len(tokens)
        errors.append(error)
        factors.append(s)
    best = min(range(20), key=errors.__getitem__)
    assert min(error for step, error in enumerate(errors) if step != best) > errors[best] * (1 + 1e-5)
    factor = x.square().mean(0).sqrt() / inputs(out, group, data).square().mean(0).sqrt()
    torch.testing.assert_close(factor, factors[best], rtol=1e-4, atol=0)
    plain = lower(program, f"awq{{bits=4,group=32,sites={group.rpartition('.')[0]}}}")
    same = torch.equal(inputs(plain, group, data), inputs(out, group, data))
    assert not same or bits == 8, "four bits of activations count for more than four of weights"


def test_activations_of_other_widths_are_refused() -> None:
    with pytest.raises(UsageError, match="awq cannot judge activations of 6 bits; give 8, 4, or 0 for float ones"):
        Awq(activation_bits=6)


def output_error(program: Program, original: Program, fmt: Format, group: str) -> float:
    """E‖(Ŵ−W)x‖² summed over a group's sites, of a program that `rtn` has packed."""
    total = 0.0
    before = {node.meta[SITE]: node for node in groups(sites(original))[group]}
    for node in groups(sites(program))[group]:
        metric = original.store.load(before[node.meta[SITE]].meta[STATISTICS]["gram"]).double()
        key = node.meta["hikui.float_weight"]
        weight = program.store.load(key).double()
        scale = program.store.load(f"{key}.{fmt}.scale")
        off = unpack(fmt, program.store.load(f"{key}.{fmt}"), scale, *weight.shape).double() - weight
        total += float((off @ metric * off).sum())
    return total


def test_outputs_change_less_after_rounding() -> None:
    program, fmt = measured("llama"), Format.parse("int3-g32")
    rtn = "rtn{bits=3,group=32,clip=minmax}"
    scaled = lower(program, "awq{bits=3,group=32}")
    plain, better = lower(program, rtn), lower(scaled, rtn)
    gains = []
    for group in groups(sites(program)):
        # Statistics moved with the factors, so each program is judged in its own.
        gains.append(output_error(better, scaled, fmt, group) / output_error(plain, program, fmt, group))
    assert max(gains) <= 1 + 1e-4
    assert sum(gains) / len(gains) < 0.9


def test_assigned_formats_are_what_is_judged() -> None:
    program = measured("llama")
    some = "override{sites=layers.0.mlp.(gate|up),format=float16},override{sites=down,format=sign-g32}"
    steps = parse_pipeline(f"{some},awq{{bits=8,sites=layers.0.mlp}}", PASSES)
    for step in steps:
        result = step.run(program, PassContext())
        program = result.program
    assert result.notes[0] == "model.layers.0.mlp.gate_proj+up_proj: its formats are not rounded"
    assert result.notes[1].startswith("model.layers.0.mlp.down_proj: a=0.")
    assert not [key for key in program.store.keys() if "gate_proj" in key and key.endswith(".awq")]


def test_mixed_formats_keep_their_columns() -> None:
    program = lower(measured("llama"), "mixed{share=0.5,group=32,skip=lm_head}")
    out = lower(program, "awq")
    assert_equal_logits(program, out)
    packed = [lower(work, "rtn{skip=lm_head}") for work in (program, out)]
    orders = []
    for work in packed:
        held = [
            work.weight_of(order)
            for node in calls(work, torch.ops.aten.index_select.default)
            if is_weight(order := node.args[2])
        ]
        # v and up have had rows divided, so what the columns before them count has changed.
        orders.append({key: work.store.load(key) for key in held if "o_proj" in key or "down_proj" in key})
    assert orders[0].keys() == orders[1].keys() and len(orders[0]) == 6
    for key, order in orders[0].items():
        # Σ w²·E[x²] of a column does not change when the one is multiplied by what the other is divided by.
        assert torch.equal(order, orders[1][key])
    assert len(calls(packed[1], hikui.linear.default)) == 21


@pytest.mark.parametrize("judged", [1024, 20])
def test_parts_of_rows_choose_alike(judged: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hikui.passes.transform.awq._ROWS", judged)
    whole = lower(measured("llama"), "awq{bits=3,group=32,sites=layers.1}")
    monkeypatch.setattr("hikui.passes.matrices.PART", 48 * 7)
    parts = lower(measured("llama"), "awq{bits=3,group=32,sites=layers.1}")
    assert parts.store.keys() == whole.store.keys()
    for key in whole.store.keys():
        assert torch.equal(parts.store.load(key), whole.store.load(key))


def test_dead_columns_stay_in_bounds() -> None:
    program = measured("llama").clone()
    key = groups(sites(program))[QKV][0].meta[STATISTICS]["mean_abs"]
    dead = program.store.load(key).clone()
    dead[3] = 0.0
    program.store.put(key, dead)
    out = lower(program, "awq{bits=3,group=32}")
    assert_equal_logits(program, out)
    program.store.put(key, torch.zeros(48))
    result = Awq().run(program, PassContext())
    assert f"{QKV}: it reads nothing but zeros" in result.notes


def test_what_is_missing() -> None:
    data = calibration(canonical("llama"))
    with pytest.raises(HikuiError, match=r"no statistics of the kind 'mean_abs'; run `calibrate\{gram=true\}` first"):
        lower(canonical("llama"), "awq")
    with pytest.raises(HikuiError, match=r"no statistics of the kind 'gram'; run `calibrate\{gram=true\}` first"):
        lower(canonical("llama"), "calibrate,awq", data)
    with pytest.raises(UsageError, match="awq cannot round to 5 bits"):
        Awq(bits=5)
    with pytest.raises(UsageError, match="awq takes either format, or bits and group"):
        Awq(bits=3, format="nf4-g64")


def test_a_sample_is_needed_only_where_activations_are_judged() -> None:
    program = measured("llama").clone()
    for node in sites(program):
        node.meta[STATISTICS] = {kind: key for kind, key in node.meta[STATISTICS].items() if kind != "sample"}
    lower(program, "awq{sites=layers.1.self_attn}")
    with pytest.raises(HikuiError, match=r"no statistics of the kind 'sample'; run `calibrate\{gram=true\}` first"):
        lower(program, "awq{activation_bits=8}")
