"""mixed formats: the columns chosen, the order shared by tied sites, and what all of that takes."""

import re

import pytest
import torch
from torch import Tensor

from hikui.lowering.errors import HikuiError, UsageError
from hikui.lowering.formats import Format, unpack
from hikui.lowering.ir import sizes
from hikui.lowering.ir.program import COLUMNS, FORMAT, GROUP, SENSITIVITY, SITE, STATISTICS, Program
from hikui.lowering.pipeline.text import parse_pipeline
from hikui.passes import PASSES, Activation, Mixed
from hikui.passes.graph import aten, hikui, is_weight, matrix_shape, sites, weight_of
from hikui.passes.quantise.columns import mixed_order
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
    order_of,
    program_of,
    random,
    run,
)

EMBEDDING = random(SMALL_VOCABULARY, 96)
MIXED_32 = Format.parse("mixed-g32-c32")
QKV = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]


def measured(family: str = "llama") -> Program:
    return lower(canonical(family), "calibrate", calibration(canonical(family)))


def one_site(weight: Tensor) -> Program:
    def body(x: Tensor, a__weight: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, a__weight)

    program = lower(program_of(body, embedding=EMBEDDING, a__weight=weight), "canonicalise")
    return lower(program, "calibrate", calibration(program))


def test_text() -> None:
    check(
        lower(measured(), "mixed{group=32},rtn,activation,dead_code"),
        """
        // CHECK: %w_model_layers_0_self_attn_q_proj_weight_mixed_g32_c32 = weight
        // CHECK-SAME: "model.layers.0.self_attn.q_proj.weight.mixed-g32-c32" : u8[
        // CHECK: %[[X:.*]] = aten.index_select(%{{.*}}, -1, %[[ORDER:w_.*order_mixed_g32_c32]]) : f32[1, T, 48]
        // CHECK-NEXT: %[[A:.*]] = hikui.quantize_activation(%[[X]])
        // CHECK-NEXT: %[[Q:.*]] = getitem(%[[A]], 0)
        // CHECK-NEXT: %[[S:.*]] = getitem(%[[A]], 1)
        // CHECK-NEXT: %[[U:.*]] = getitem(%[[A]], 2)
        // CHECK-NEXT: hikui.linear_a8(%[[Q]], %[[S]], %[[U]], %w_model_layers_0_self_attn_q_proj_weight_mixed_g32_c32,
        // CHECK-SAME: "mixed-g32-c32", 48) : f32[1, T, 48]
        // CHECK: hikui.linear_a8(%[[Q]], %[[S]], %[[U]], %w_model_layers_0_self_attn_k_proj_weight_mixed_g32_c32,
        // CHECK: hikui.linear_a8(%[[Q]], %[[S]], %[[U]], %w_model_layers_0_self_attn_v_proj_weight_mixed_g32_c32,
        """,
    )


@pytest.mark.parametrize("by", ["pbar", "obs", "activation", "weight"])
def test_columns_lead_by_what_they_are_chosen_by(by: str) -> None:
    """Against the formulas in float64, weight by weight, over all sites of the group."""
    exact = canonical("llama")
    program = lower(exact, f"calibrate{{gram=true}},mixed{{group=32,by={by}}}", calibration(exact))
    tied = [node for node in sites(program) if node.meta[SITE] in QKV]
    assert {node.meta[COLUMNS] for node in tied} == {by}
    statistics = tied[0].meta[STATISTICS]
    mean_square = program.store.load(statistics["mean_square"]).tolist()
    gram = program.store.load(statistics["gram"]).double()
    gram += 0.01 * float(gram.diagonal().mean()) * torch.eye(len(gram))
    inverse = torch.linalg.inv(gram).diagonal().tolist()
    counts = [0.0] * len(mean_square)
    for node in tied:
        for row in program.store.load(program.weight_of(weight_of(node))).double().tolist():
            mean = sum(map(abs, row)) / len(row)
            for j, value in enumerate(row):
                off = value - (mean if value >= 0 else -mean)
                counts[j] += {
                    "pbar": off * off * mean_square[j],
                    "obs": off * off / inverse[j],
                    "activation": mean_square[j] / (len(row) * len(tied)),
                    "weight": value * value,
                }[by]
    ranked = sorted(range(len(counts)), key=lambda j: -counts[j])
    order = mixed_order(program, tied, MIXED_32).tolist()
    assert order == sorted(ranked[:32]) + sorted(ranked[32:])
    if by != "activation":
        plain = lower(exact, "calibrate{gram=true},mixed{group=32,by=activation}", calibration(exact))
        assert order != mixed_order(plain, [n for n in sites(plain) if n.meta[SITE] in QKV], MIXED_32).tolist()


def test_chance_is_the_same_in_every_run_and_another_for_each_group_and_seed() -> None:
    exact = canonical("llama")

    def drawn(seed: int) -> list[list[int]]:
        program = lower(exact, f"calibrate,mixed{{group=32,by=random,seed={seed}}}", calibration(exact))
        tied = [
            [node for node in sites(program) if f"layers.{layer}.self_attn.q" in node.meta[SITE]] for layer in (0, 1)
        ]
        return [mixed_order(program, nodes, MIXED_32).tolist() for nodes in tied]

    first, again, other = drawn(0), drawn(0), drawn(1)
    assert first == again
    assert first[0] != first[1] and first[0] != other[0]
    assert sorted(first[0]) == list(range(48))


def test_a_choice_by_the_inverse_wants_the_gram_matrix() -> None:
    sentence = (
        "has no Gram matrix, which 'obs' chooses the int4 columns of mixed-g32-c32 by; run `calibrate{gram=true}`"
    )
    with pytest.raises(HikuiError, match=re.escape(sentence)):
        lower(measured(), "mixed{group=32,by=obs}")
    # Or where it is gone by the time that a quantiser asks.
    exact = canonical("llama")
    program = lower(exact, "calibrate{gram=true},mixed{group=32,by=obs}", calibration(exact))
    for node in sites(program):
        node.meta[STATISTICS] = {key: name for key, name in node.meta[STATISTICS].items() if key != "gram"}
    with pytest.raises(HikuiError, match=re.escape(sentence)):
        lower(program, "rtn")


def test_the_most_important_columns_lead_in_their_order() -> None:
    """Against brute force in float64, over all sites of the group."""
    program = measured()
    tied = [node for node in sites(program) if node.meta[SITE] in QKV]
    assert len({node.meta[GROUP] for node in tied}) == 1
    mean_square = program.store.load(tied[0].meta[STATISTICS]["mean_square"]).double()
    counts = [0.0] * len(mean_square)
    for node in tied:
        for j, column in enumerate(program.store.load(program.weight_of(weight_of(node))).double().t()):
            counts[j] += float(column @ column) * float(mean_square[j])
    ranked = sorted(range(len(counts)), key=lambda j: (-counts[j], j))
    order = mixed_order(program, tied, Format.parse("mixed-g32-c32")).tolist()
    assert order == sorted(ranked[:32]) + sorted(ranked[32:])


def test_equal_columns_are_taken_from_the_front() -> None:
    program = one_site(torch.zeros(8, 96))
    (site,) = sites(program)
    assert mixed_order(program, [site], Format.parse("mixed-g32-c64")).tolist() == list(range(96))


def test_parts_of_rows_do_not_change_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    program = one_site(random(SMALL_VOCABULARY, 96, seed=1))
    fmt, found = Format.parse("mixed-g32-c32"), sites(program)
    whole = mixed_order(program, found, fmt)
    monkeypatch.setattr("hikui.passes.matrices.PART", 96 * 5)
    assert torch.equal(mixed_order(program, found, fmt), whole)


@pytest.mark.parametrize("weighted", ["false", "true"])
def test_the_program_computes_with_the_rounded_matrix(weighted: str) -> None:
    weight = random(21, 96, seed=2)
    program = one_site(weight)
    (site,) = sites(program)
    out = lower(program, f"rtn{{format=mixed-g32-c64,weighted={weighted}}}")
    (node,) = sites(out)
    assert node.args[4] == "mixed-g32-c64"
    order, fmt = order_of(out, node), Format.parse("mixed-g32-c64")
    assert order is not None and order.tolist() == mixed_order(program, [site], fmt).tolist()
    importance = program.store.load(site.meta[STATISTICS]["mean_square"])[order] if weighted == "true" else None
    rounded = dequantise(round_matrix(weight[:, order], fmt, "mse", importance), fmt)
    held = [out.store.load(out.weight_of(operand)) for operand in node.args[1:3] if is_weight(operand)]
    assert torch.equal(unpack(fmt, held[0], held[1], 21, 96), rounded)
    dense = torch.empty(21, 96, dtype=torch.float64)
    dense[:, order] = rounded.double()
    tokens = torch.arange(6)[None]
    want = EMBEDDING[tokens].double() @ dense.t()
    got, _ = run(out, tokens, decode=2)
    assert float((got.double() - want).abs().max()) <= 1e-5 * float(want.abs().max())


def test_tied_sites_share_one_order_and_one_quantiser() -> None:
    out = lower(measured(), "mixed{group=32},rtn,activation,dead_code")
    groups = {node.meta[GROUP] for node in sites(out)}
    assert len(calls(out, aten.index_select.default)) == len(groups)
    assert len(calls(out, hikui.quantize_activation.default)) == len(groups)
    assert len([key for key in out.store.keys() if ".order." in key]) == len(groups)
    assert_settled(Mixed(group=32), out)
    assert_settled(Activation(), out)


def test_only_the_mixed_members_of_a_group_are_permuted() -> None:
    out = lower(measured(), f"override{{sites={QKV[0]},format=mixed-g32-c32}},rtn{{bits=8}},dead_code")
    assert len(calls(out, aten.index_select.default)) == 1
    orders = {node.meta[SITE]: order_of(out, node) for node in sites(out)}
    assert [name for name, order in orders.items() if order is not None] == [QKV[0]]


def test_what_has_a_format_keeps_it() -> None:
    program = lower(measured(), "override{sites=lm_head,format=int8-g32},mixed{group=32,skip=down_proj}")
    formats = {node.meta[SITE]: node.meta.get(FORMAT) for node in sites(program)}
    assert formats.pop("lm_head") == "int8-g32"
    assert {name for name, fmt in formats.items() if fmt is None} == {name for name in formats if "down_proj" in name}
    assert {fmt for fmt in formats.values() if fmt} == {"mixed-g32-c32"}
    assert_settled(Mixed(group=32, skip="down_proj"), program)


@pytest.mark.parametrize(("share", "columns"), [(0.01, 32), (0.5, 64), (0.4, 32), (1.0, 96)])
def test_the_share_is_rounded_to_whole_groups(share: float, columns: int) -> None:
    (site,) = sites(lower(one_site(random(16, 100, seed=3)[:, :96]), f"mixed{{group=32,share={share}}}"))
    assert site.meta[FORMAT] == f"mixed-g32-c{columns}"


def test_sizes_count_the_order_once() -> None:
    out = lower(measured(), "mixed{group=32},rtn,pack,activation,fuse,dead_code")
    found = sizes.measure(out)
    fmt = Format.parse("mixed-g32-c32")
    by_name = {site.name: site for site in found.sites}
    first, *others = (by_name[name] for name in QKV)
    assert first.nbytes == fmt.nbytes(first.out_features, first.in_features) + 4 * first.in_features
    assert [site.nbytes for site in others] == [fmt.nbytes(s.out_features, s.in_features) for s in others]
    stored = sum(out.store.load(key).numel() * 4 for key in out.store.keys() if ".order." in key)
    assert stored == sum(4 * next(s.in_features for s in found.sites if s.name == name) for name in _first_of(out))


def _first_of(program: Program) -> list[str]:
    first: dict[str, str] = {}
    for node in sites(program):
        first.setdefault(node.meta[GROUP], node.meta[SITE])
    return list(first.values())


def test_the_budget_counts_the_order_once_a_group() -> None:
    formats = "int2-g32|mixed-g32-c32"
    program = lower(measured(), f"sensitivity{{formats={formats}}},assign{{formats={formats},target_bpw=12}}")
    nbytes = weights = 0
    for name in {node.meta[GROUP] for node in sites(program)}:
        tied = [node for node in sites(program) if node.meta[GROUP] == name]
        assert len({node.meta[FORMAT] for node in tied}) == 1
        for index, node in enumerate(tied):
            fmt, (n, k) = Format.parse(node.meta[FORMAT]), matrix_shape(node)
            nbytes += fmt.nbytes(n, k) + (4 * k if fmt.is_mixed and index == 0 else 0)
            weights += n * k
    assert any("mixed" in node.meta[FORMAT] for node in sites(program))
    out = lower(program, "rtn,pack,activation,fuse,dead_code")
    assert sizes.measure(out).true_bpw == pytest.approx(8 * nbytes / weights)


def test_sensitivity_is_of_the_matrix_that_rtn_makes() -> None:
    weight = random(21, 96, seed=4)
    program = one_site(weight)
    out = lower(lower(program, "sensitivity{metric=output,formats=mixed-g32-c32}"), "rtn{format=mixed-g32-c32}")
    (node,) = sites(out)
    order, fmt = order_of(out, node), Format.parse("mixed-g32-c32")
    assert order is not None
    held = [out.store.load(out.weight_of(operand)) for operand in node.args[1:3] if is_weight(operand)]
    dense = torch.empty_like(weight)
    dense[:, order] = unpack(fmt, held[0], held[1], 21, 96)
    diagonal = program.store.load(sites(program)[0].meta[STATISTICS]["mean_square"]).double()
    error = ((dense - weight).double().square() * diagonal).sum() / (weight.double().square() * diagonal).sum()
    assert node.meta[SENSITIVITY]["mixed-g32-c32"] == pytest.approx(float(error), rel=1e-9)


@pytest.mark.parametrize("calibrate", ["calibrate", "calibrate{gram=true}"])
def test_a_branch_of_full_rank_takes_the_error_back(calibrate: str) -> None:
    program = canonical("llama")
    pipeline = f"{calibrate},mixed{{group=32}},rtn,sub_branch{{rank=400}},dead_code"
    out = lower(program, pipeline, calibration(program))
    assert_same(program, out, 5e-3)
    fused = lower(out, "pack{format=float16},activation,fuse,dead_code")
    assert len(calls(fused, hikui.linear_a8_branch.default)) == len(sites(out))


def test_errors() -> None:
    with pytest.raises(HikuiError, match=r"q_proj has no statistics to choose the int4 columns of mixed-g32-c32 by"):
        lower(canonical("llama"), "mixed{group=32}")
    with pytest.raises(HikuiError, match="run `calibrate` first"):
        lower(canonical("llama"), "rtn{format=mixed-g32-c32}")
    with pytest.raises(HikuiError, match="has no statistics to choose"):
        lower(canonical("llama"), "sensitivity{metric=weight,formats=mixed-g32-c32}")
    with pytest.raises(HikuiError, match=r"has 48 columns, fewer than a group of 128; choose a smaller group"):
        lower(measured(), "mixed")
    with pytest.raises(HikuiError, match=r"has 48 columns, fewer than the int4 ones of mixed-g32-c64"):
        lower(measured(), "rtn{format=mixed-g32-c64}")
    with pytest.raises(UsageError, match="2 of the columns int4; share is above 0 and at most 1"):
        parse_pipeline("mixed{share=2}", PASSES)
    with pytest.raises(UsageError, match="group of 0; choose 32, 64, 128"):
        parse_pipeline("mixed{group=0}", PASSES)
    with pytest.raises(HikuiError, match="run `canonicalise` first"):
        lower(program_of(lambda x: x * 2, embedding=EMBEDDING), "mixed")
