"""rtn and pack: packed weights in the store, `hikui::linear` in the graph."""

import pytest
import torch
from torch import Tensor

from hikui.lowering.errors import HikuiError, UsageError
from hikui.lowering.formats import Format, unpack
from hikui.lowering.ir.program import FORMAT, SITE, Program
from hikui.lowering.pipeline.contract import PassContext
from hikui.lowering.pipeline.text import parse_pipeline
from hikui.passes import PASSES, Pack, Rtn
from hikui.passes.graph import aten, hikui, sites
from hikui.passes.quantise.rounding import dequantise, round_matrix
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
    run,
)

EMBEDDING = random(SMALL_VOCABULARY, 40)


def two_sites(first: Tensor | None = None) -> Program:
    def body(x: Tensor, a__weight: Tensor, a__bias: Tensor, b__weight: Tensor) -> Tensor:
        return torch.nn.functional.linear(torch.nn.functional.linear(x, a__weight, a__bias), b__weight)

    a = random(70, 40, seed=1) if first is None else first
    weights = {"a__weight": a, "a__bias": random(70, seed=2), "b__weight": random(SMALL_VOCABULARY, 70, seed=3)}
    return lower(program_of(body, embedding=EMBEDDING, **weights), "canonicalise")


def test_text() -> None:
    check(
        lower(two_sites(), "rtn{bits=4,group=32}"),
        """
        // CHECK: %w_a_weight_int4_g32 = weight "a.weight.int4-g32" : u8[5, 8, 16, 4]
        // CHECK: %w_a_weight_int4_g32_scale = weight "a.weight.int4-g32.scale" : f16[5, 2, 16]
        // CHECK: %w_b_weight_int4_g32 = weight "b.weight.int4-g32" : u8[2, 12, 16, 4]
        // CHECK: %[[Y:.*]] = hikui.linear(%[[X:.*]], %w_a_weight_int4_g32, %w_a_weight_int4_g32_scale, %{{[a-z0-9_]+}},
        // CHECK-SAME: "int4-g32", 70) : f32[1, T, 70]  // site=a group=a format=int4-g32
        // CHECK-NEXT: hikui.linear(%[[Y]], %w_b_weight_int4_g32, %w_b_weight_int4_g32_scale, None, "int4-g32", 24)
        // CHECK-SAME: site=b group=b format=int4-g32
        """,
    )


OPTIONS = ["bits=4,group=32", "bits=8,group=0", "bits=4,group=128,clip=minmax", "bits=16", "bits=1", "bits=2", "bits=3"]
OPTIONS += ["format=ternary-g32", "format=nf4-channel", "format=fp4-g64,clip=minmax", "format=sign-g32"]


@pytest.mark.parametrize("options", OPTIONS)
def test_the_packed_matrix_is_the_rounded_one(options: str) -> None:
    program = two_sites()
    (step,) = parse_pipeline(f"rtn{{{options}}}", PASSES)
    assert isinstance(step, Rtn)
    out = step.run(program, PassContext()).program
    for node in sites(out):
        key = f"{node.meta[SITE]}.weight"
        weight = program.store.load(key)
        want = weight.half().float()
        if step.default_format().is_integer:
            want = dequantise(round_matrix(weight, step.default_format(), step.clip), step.default_format())
        scale = out.store.load(f"{key}.{step.default_format()}.scale") if step.default_format().is_integer else None
        got = unpack(step.default_format(), out.store.load(f"{key}.{step.default_format()}"), scale, *weight.shape)
        assert torch.equal(got, want)


def test_the_program_computes_with_the_rounded_matrices() -> None:
    out = lower(two_sites(), "rtn{bits=8,group=64}")
    tokens = torch.arange(6)[None]
    x = EMBEDDING[tokens].double()
    for name, bias in (("a", random(70, seed=2)), ("b", None)):
        weight = two_sites().store.load(f"{name}.weight")
        fmt = Format.parse("int8-g64")
        x = x @ dequantise(round_matrix(weight, fmt), fmt).double().t()
        x = x if bias is None else x + bias.double()
    got, _ = run(out, tokens, decode=2)
    assert float((got.double() - x).abs().max()) <= 1e-5 * float(x.abs().max())


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_bits_32_and_pack_are_exact(family: str) -> None:
    for pipeline in ("rtn{bits=32}", "pack", "pack{format=float32},dead_code"):
        packed = lower(canonical(family), pipeline)
        assert not calls(packed, aten.linear.default)
        assert_same(canonical(family), packed, 1e-6)


def test_pack_takes_what_rtn_left() -> None:
    out = lower(two_sites(), "rtn{bits=8,skip=^b$},pack{format=float16},dead_code")
    assert {node.meta[SITE]: node.meta[FORMAT] for node in sites(out)} == {"a": "int8-g64", "b": "float16"}
    assert "a.weight" not in out.store
    assert_settled(Pack("float16"), out)


@pytest.mark.parametrize(
    ("options", "name"),
    [("bits=1,group=128", "sign-g128"), ("bits=2", "int2-g64"), ("bits=3,group=0", "int3-channel"), ("", "int4-g64")],
)
def test_bits_name_a_format(options: str, name: str) -> None:
    (step,) = parse_pipeline(f"rtn{{{options}}}" if options else "rtn", PASSES)
    assert isinstance(step, Rtn) and str(step.default_format()) == name


def test_sites_and_skip_choose() -> None:
    program = canonical("llama")
    out = lower(program, "rtn{sites=mlp,skip=down_proj}")
    names = {node.meta[SITE] for node in calls(out, hikui.linear.default)}
    assert len(names) == 6
    assert all(name.endswith(("gate_proj", "up_proj")) for name in names)
    assert_settled(Rtn(sites="mlp", skip="down_proj"), out)


def test_an_assigned_format_wins() -> None:
    out = lower(two_sites(), "override{sites=^b$,format=int8-channel},rtn{bits=4,group=32}")
    assert {node.meta[SITE]: node.args[4] for node in sites(out)} == {"a": "int4-g32", "b": "int8-channel"}


def test_padding_and_wide_groups_are_noted() -> None:
    notes = Rtn(bits=4, group=64).run(two_sites(), PassContext()).notes
    assert "a: group 64 is wider than K=40: one group for the whole channel" in notes
    assert "b: groups of 96 columns instead of 64, which does not divide K=70" in notes
    assert "b: K=70 is padded to 96 to fill the last group of 96" in notes


def test_weighted_errors_use_the_statistics() -> None:
    program = lower(canonical("llama"), "calibrate", calibration(canonical("llama")))
    plain, weighted = (lower(program, f"rtn{{bits=4,weighted={value}}}") for value in ("false", "true"))
    key = "model.layers.0.mlp.gate_proj.weight.int4-g64"
    assert not torch.equal(plain.store.load(key), weighted.store.load(key))
    with pytest.raises(HikuiError, match=r"gate_proj has no statistics.*run `calibrate` first"):
        lower(canonical("llama"), "rtn{weighted=true,sites=gate_proj}")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("pipeline", ["rtn", "rtn{bits=32}", "pack", "sensitivity{metric=weight}"])
def test_broken_weights_are_named(bad: float, pipeline: str) -> None:
    weight = random(70, 40, seed=1)
    weight[3, 5] = bad
    with pytest.raises(HikuiError, match=r"Site a: 1 of 2800 values of 'a.weight' are NaN or infinite"):
        lower(two_sites(weight), pipeline)


def test_weights_beyond_float16_are_named() -> None:
    for pipeline in ("rtn{bits=16}", "pack{format=float16}"):
        with pytest.raises(HikuiError, match=r"Site a: its weights.*float32"):
            lower(two_sites(random(70, 40) * 1e6), pipeline)
    with pytest.raises(HikuiError, match=r"Site a: a scale of .* is beyond float16"):
        lower(two_sites(random(70, 40) * 1e8), "rtn")


def test_wrong_options() -> None:
    with pytest.raises(UsageError, match="5 bits; it takes 1, 2, 3, 4, 8, 16, 32"):
        parse_pipeline("rtn{bits=5}", PASSES)
    with pytest.raises(UsageError, match="either format, or bits and group"):
        parse_pipeline("rtn{bits=3,format=nf4-g64}", PASSES)
    with pytest.raises(UsageError, match="Format 'nf4' is not known"):
        parse_pipeline("rtn{format=nf4}", PASSES)
    with pytest.raises(UsageError, match="group of 48; choose 32, 64, 128"):
        parse_pipeline("rtn{group=48}", PASSES)
    with pytest.raises(HikuiError, match="run `canonicalise` first"):
        lower(program_of(lambda x: x * 2, embedding=EMBEDDING), "rtn")
    with pytest.raises(UsageError, match="not a regular expression"):
        lower(two_sites(), "rtn{sites=[}")


@pytest.mark.parametrize("pipeline", ["rtn{bits=4,group=32}", "rtn{bits=8,group=64}", "pack{format=float16}"])
def test_parts_of_rows_give_the_same_bytes(pipeline: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = lower(canonical("llama"), pipeline)
    monkeypatch.setattr("hikui.passes.matrices.PART", 1)
    parts = lower(canonical("llama"), pipeline)
    assert parts.store.keys() == whole.store.keys()
    assert all(torch.equal(parts.store.load(key), whole.store.load(key)) for key in whole.store.keys())
