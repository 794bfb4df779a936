"""Rounding in the metric of the inputs: against an exhaustive search in float64, and against plain rounding."""

import pytest
import torch
from torch import Tensor

from hikui.lowering.formats import KINDS, Format, unpack
from hikui.lowering.ir.program import SITE, STATISTICS
from hikui.passes.graph import sites
from hikui.passes.quantise.output_rounding import OutputMetric, round_to_output
from hikui.passes.quantise.rounding import Rounded, dequantise, round_matrix
from tests.passes.helpers import calibration, canonical, lower, random

FORMATS = [f"{kind}-{group}" for kind in KINDS for group in ("g32", "g64", "channel")]


def gram(k: int, seed: int = 1) -> Tensor:
    """E[x·xᵀ] of correlated inputs of very different sizes."""
    mix = torch.eye(k) + 0.3 * random(k, k, seed=seed)
    x = (random(4 * k, k, seed=seed + 1) @ mix * (0.5 * random(k, seed=seed + 2)).exp()).double()
    return x.t() @ x / len(x)


def group_errors(weight: Tensor, rounded: Rounded, fmt: Format, metric: Tensor) -> Tensor:
    """d·G·dᵀ of every row and group in float64: [n, groups]."""
    off = dequantise(rounded, fmt).double() - weight.double()
    columns = torch.arange(weight.shape[1]).split(fmt.group_size(weight.shape[1]))
    return torch.stack([((off[:, own] @ metric[own][:, own]) * off[:, own]).sum(1) for own in columns], 1)


@pytest.mark.parametrize("name", FORMATS)
def test_it_comes_near_an_exhaustive_search_and_never_loses_to_the_diagonal(name: str) -> None:
    fmt, weight, metric = Format.parse(name), random(5, 100, seed=3), gram(100)
    rounded = round_to_output(weight, fmt, metric)
    assert rounded.codes.shape == (5, 100) and rounded.codes.dtype == torch.int8
    assert rounded.scale.shape == (5, fmt.groups(100))
    assert torch.equal(rounded.scale, rounded.scale.half().float())
    assert set(rounded.codes.unique().tolist()) <= set(fmt.levels)
    found = group_errors(weight, rounded, fmt, metric)
    diagonal = round_matrix(weight, fmt, "mse", metric.diagonal().float())
    assert bool((found <= group_errors(weight, diagonal, fmt, metric) * (1 + 1e-3)).all())
    levels = torch.tensor(fmt.levels, dtype=torch.float64)
    best = 0.0
    for row in weight.double():
        for own in torch.arange(100).split(fmt.group_size(100)):
            scales = torch.linspace(0.1, 1.7, 1500, dtype=torch.float64) * float(row[own].abs().max()) / levels[-1]
            scales = torch.cat([scales, -scales]).half().double().unsqueeze(1)
            off = levels[torch.bucketize(row[own] / scales, (levels[1:] + levels[:-1]) / 2)] * scales - row[own]
            best += float(((off @ metric[own][:, own]) * off).sum(1).min())
    # In a metric the error is no smooth function of the scale; a grid of 24 stays behind most where steps are finest.
    assert float(found.sum()) <= (1.7 if fmt.kind == "int8" else 1.1) * best


def test_it_beats_weighing_by_the_diagonal_where_inputs_are_correlated() -> None:
    fmt, weight, metric = Format.parse("int3-g64"), random(64, 128, seed=4), gram(128, seed=5)
    ours = group_errors(weight, round_to_output(weight, fmt, metric), fmt, metric).sum()
    diagonal = round_matrix(weight, fmt, "mse", metric.diagonal().float())
    assert float(ours) < 0.99 * float(group_errors(weight, diagonal, fmt, metric).sum())


def test_the_refit_is_least_squares_for_signs() -> None:
    fmt, weight, metric = Format.parse("sign-g32"), random(6, 70, seed=6), gram(70)
    rounded = round_to_output(weight, fmt, metric)
    assert torch.equal(rounded.codes, torch.where(weight < 0, -1, 1).to(torch.int8))
    for group, own in enumerate(torch.arange(70).split(32)):
        signs, part = rounded.codes[:, own].double(), metric[own][:, own]
        want = ((weight[:, own].double() @ part) * signs).sum(1) / ((signs @ part) * signs).sum(1)
        torch.testing.assert_close(rounded.scale[:, group].double(), want, rtol=1e-3, atol=1e-5)


def test_mixed_rounds_each_part_in_its_own_corner() -> None:
    fmt, weight, metric = Format.parse("mixed-g32-c64"), random(7, 150, seed=7), gram(150)
    whole = round_to_output(weight, fmt, OutputMetric(metric))
    scaled = metric / metric.diagonal().mean()
    heavy = round_to_output(weight[:, :64], Format("int4", 32), scaled[:64, :64])
    light = round_to_output(weight[:, 64:], Format("sign", 32), scaled[64:, 64:])
    assert whole.scale.shape == (7, 8) and not whole.scale[:, 5:].any(), "groups of padding alone have scale 0"
    together = torch.cat((dequantise(heavy, Format("int4", 32)), dequantise(light, Format("sign", 32))), 1)
    assert torch.equal(whole.codes, torch.cat((heavy.codes, light.codes), 1))
    assert torch.allclose(dequantise(whole, fmt), together, rtol=2e-3, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_unexcited_inputs_are_rounded_to_nearest(kind: str) -> None:
    fmt, weight = Format(kind, 32), random(4, 70, seed=8)
    metric = gram(70)
    metric[32:64] = metric[:, 32:64] = 0.0
    errors = [
        group_errors(weight, rounded, fmt, torch.eye(70, dtype=torch.float64))[:, 1]
        for rounded in (round_to_output(weight, fmt, metric), round_matrix(weight, fmt))
    ]
    assert bool((errors[0] <= errors[1] * (1 + 1e-4)).all())
    for nothing in (torch.zeros(70, 70, dtype=torch.float64), metric):
        zero = round_to_output(torch.zeros(3, 70), fmt, nothing)
        assert not dequantise(zero, fmt).any()


def test_parts_of_rows_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    fmt, weight, metric = Format.parse("int4-g32"), random(37, 96, seed=9), gram(96)
    whole = round_to_output(weight, fmt, metric)
    monkeypatch.setattr("hikui.passes.quantise.output_rounding._CHUNK", 96 * 5)
    parts = round_to_output(weight, fmt, metric)
    # Products of fewer rows may add up in another order, so two nearly equal scales may change places.
    one, two = (group_errors(weight, rounded, fmt, metric) for rounded in (whole, parts))
    assert torch.allclose(one, two, rtol=1e-4)
    assert float((whole.codes == parts.codes).double().mean()) > 0.98


def test_wrong_input() -> None:
    with pytest.raises(OverflowError, match="beyond float16"):
        round_to_output(torch.full((2, 32), 1e9), Format.parse("int8-g32"), gram(32))
    with pytest.raises(ValueError, match="a metric of 32 columns does not fit 40"):
        round_to_output(random(2, 40), Format.parse("int8-g32"), gram(32))


def test_rtn_with_it_changes_outputs_less() -> None:
    program = lower(canonical("llama"), "calibrate{gram=true}", calibration(canonical("llama"), 8, 40))
    fmt, totals = Format.parse("int3-g32"), []
    for clip in ("mse", "output"):
        out, total = lower(program, f"rtn{{bits=3,group=32,clip={clip}}}"), 0.0
        for node in sites(program):
            weight = program.store.load(f"{node.meta[SITE]}.weight")
            key = f"{node.meta[SITE]}.weight.int3-g32"
            off = unpack(fmt, out.store.load(key), out.store.load(f"{key}.scale"), *weight.shape) - weight
            metric = program.store.load(node.meta[STATISTICS]["gram"]).double()
            total += float((off.double() @ metric * off.double()).sum())
        totals.append(total)
    assert totals[1] < 0.9 * totals[0]
