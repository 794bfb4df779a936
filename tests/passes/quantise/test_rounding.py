"""The quantiser: against brute force, and its guarantees."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from hikui.lowering.formats import KINDS, Format
from hikui.passes.quantise.rounding import dequantise, round_matrix
from tests.passes.helpers import random

FORMATS = [f"{kind}-{group}" for kind in KINDS for group in ("g32", "g64", "channel")]


def squared_error(weight: torch.Tensor, fmt: Format, clip: str, importance: torch.Tensor | None = None) -> float:
    difference = dequantise(round_matrix(weight, fmt, clip, importance), fmt).double() - weight.double()
    columns = torch.ones(weight.shape[1]) if importance is None else importance
    return float((difference.square() * columns.double()).sum())


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(FORMATS),
    clip=st.sampled_from(["mse", "minmax"]),
    n=st.integers(1, 19),
    k=st.integers(1, 150),
    seed=st.integers(0, 2**31),
    size=st.sampled_from([1e-6, 1e-2, 1.0, 300.0]),
)
def test_codes_are_the_nearest_ones_to_float16_scales(
    name: str, clip: str, n: int, k: int, seed: int, size: float
) -> None:
    fmt, weight = Format.parse(name), random(n, k, seed=seed) * size
    codes, scale = round_matrix(weight, fmt, clip)
    levels = torch.tensor(fmt.levels, dtype=torch.float64)
    assert codes.shape == (n, k)
    assert codes.dtype == torch.int8
    assert scale.shape == (n, fmt.groups(k))
    assert torch.equal(scale, scale.half().float())
    wide = scale.double().repeat_interleave(fmt.group_size(k), 1)[:, :k]
    exact = torch.where(wide != 0, weight.double() / wide, 0.0)
    distance = (codes - exact).abs()
    nearest = (exact.unsqueeze(-1) - levels).abs().amin(-1)
    # A zero scale makes all codes alike; float32 quotients may fall on the other side of a middle.
    assert bool((distance <= nearest + 1e-4 * (1 + exact.abs()) + 300 * (wide == 0)).all())
    if clip == "minmax" and fmt.kind in ("int4", "int8"):
        assert bool(((codes - exact).abs() <= 0.5 + 0.1 * (wide.abs() < 1e-6)).all() or float(wide.min()) < 1e-5)


@pytest.mark.parametrize("name", FORMATS)
def test_mse_beats_minmax_and_comes_near_an_exhaustive_search(name: str) -> None:
    fmt, weight = Format.parse(name), random(6, 100, seed=3)
    levels = torch.tensor(fmt.levels, dtype=torch.float64)
    found = squared_error(weight, fmt, "mse")
    assert found <= squared_error(weight, fmt, "minmax")
    best = 0.0
    for row in weight.double():
        for group in row.split(fmt.group_size(100)):
            scales = torch.linspace(0.1, 1.7, 3000, dtype=torch.float64) * float(group.abs().max()) / levels[-1]
            scales = torch.cat([scales, -scales]).half().double().unsqueeze(1)
            codes = levels[torch.bucketize(group / scales, (levels[1:] + levels[:-1]) / 2)]
            best += float((codes * scales - group).square().sum(1).min())
    assert best <= found * (1 + 1e-4)
    # With 8 bits the error jumps from scale to scale, so a grid of 24 cannot find the very best one.
    assert found <= (1.3 if fmt.kind == "int8" else 1.02) * best


@pytest.mark.parametrize(
    ("kind", "error"),
    # Of a Gaussian: 1 − 2/π for signs; Max (Quantizing for minimum distortion, 1960), table II, for uniform levels on
    # both sides of zero alike (int4 is near them). For −2 … 1 and −4 … 3 the least ∫ (x − ŵ(x))² φ(x) dx over the step.
    [("sign", 0.3634), ("ternary", 0.1902), ("int2", 0.1494), ("int3", 0.0406), ("int4", 0.01154)],
)
def test_a_gaussian_channel_loses_what_theory_says(kind: str, error: float) -> None:
    weight = random(64, 4096, seed=9)
    found = squared_error(weight, Format(kind), "mse") / float(weight.double().square().sum())
    assert found == pytest.approx(error, rel=0.03)


@pytest.mark.parametrize("clip", ["mse", "minmax"])
def test_signs_are_scaled_by_the_weighted_mean_magnitude(clip: str) -> None:
    weight, importance = random(5, 70, seed=10), random(70, seed=11).square()
    rounded = round_matrix(weight, Format("sign", 32), clip, importance)
    for group, columns in enumerate(torch.arange(70).split(32)):
        parts, weights = weight[:, columns].abs().double(), importance[columns].double()
        want = (parts * weights).sum(1) / weights.sum()
        torch.testing.assert_close(rounded.scale[:, group].double(), want, rtol=1e-3, atol=0)
    assert torch.equal(rounded.codes, torch.where(weight < 0, -1, 1).to(torch.int8))


def test_mixed_rounds_each_part_on_its_own() -> None:
    fmt, weight, importance = Format.parse("mixed-g32-c64"), random(7, 150, seed=12), torch.ones(150)
    whole = round_matrix(weight, fmt, "mse", importance)
    heavy = round_matrix(weight[:, :64], Format("int4", 32))
    light = round_matrix(weight[:, 64:], Format("sign", 32))
    assert torch.equal(whole.codes, torch.cat((heavy.codes, light.codes), 1))
    assert whole.scale.shape == (7, 8) and not whole.scale[:, 5:].any(), "groups of padding alone have scale 0"
    assert torch.equal(whole.scale[:, :5], torch.cat((heavy.scale, light.scale), 1))
    together = torch.cat((dequantise(heavy, Format("int4", 32)), dequantise(light, Format("sign", 32))), 1)
    assert torch.equal(dequantise(whole, fmt), together)


def test_important_columns_are_rounded_more_closely() -> None:
    fmt, weight = Format.parse("int4-channel"), random(8, 64, seed=4)
    importance = torch.ones(64)
    importance[::8] = 1000.0
    weighted = squared_error(weight, fmt, "mse", importance)
    codes = round_matrix(weight, fmt, "mse")
    plain = (dequantise(codes, fmt) - weight).double().square() * importance
    assert weighted < float(plain.sum())


def test_the_scale_of_importances_does_not_matter() -> None:
    fmt, weight, importance = Format.parse("int4-g32"), random(5, 64, seed=5), random(64, seed=6).square()
    one, other = (round_matrix(weight, fmt, "mse", importance * by) for by in (1.0, 1e-12))
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.scale, other.scale)


@pytest.mark.parametrize("clip", ["mse", "minmax"])
@pytest.mark.parametrize("kind", KINDS)
def test_zeros_and_dead_columns(kind: str, clip: str) -> None:
    fmt = Format(kind, 32)
    assert squared_error(torch.zeros(3, 40), fmt, clip) == 0.0
    assert squared_error(torch.zeros(3, 40), fmt, clip, torch.zeros(40)) == 0.0


@pytest.mark.parametrize("name", ["int4-g32", "nf4-g32", "sign-g32", "mixed-g32-c32"])
def test_chunks_do_not_change_the_result(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fmt, weight = Format.parse(name), random(37, 96, seed=8)
    whole = round_matrix(weight, fmt)
    monkeypatch.setattr("hikui.passes.quantise.rounding._CHUNK", 96 * 5)
    parts = round_matrix(weight, fmt)
    assert torch.equal(whole.codes, parts.codes)
    assert torch.equal(whole.scale, parts.scale)


def test_a_scale_beyond_float16_is_refused() -> None:
    with pytest.raises(OverflowError, match="beyond float16"):
        round_matrix(torch.full((2, 32), 1e9), Format.parse("int8-g32"))


@pytest.mark.parametrize("kind", ["ternary", "int8", "fp4"])
@pytest.mark.parametrize("clip", ["mse", "minmax"])
def test_scales_of_symmetric_levels_are_never_below_zero(kind: str, clip: str) -> None:
    weight = random(16, 64, seed=13)
    rounded = round_matrix(weight, Format(kind, 32), clip)
    assert bool((rounded.scale > 0).all())
    turned = round_matrix(-weight, Format(kind, 32), clip)
    assert torch.equal(turned.scale, rounded.scale), "which side the largest value lies on does not matter"


@pytest.mark.parametrize("kind", ["int2", "int3", "int4"])
def test_the_extreme_value_lies_where_there_is_a_level_more(kind: str) -> None:
    """−8 times a step of int4, or 8 times it with a scale below zero: both are exact."""
    levels = torch.tensor(KINDS[kind].levels, dtype=torch.float32)
    weight = levels.repeat(32 // len(levels))[None] * 0.5
    for sign in (1.0, -1.0):
        rounded = round_matrix(sign * weight, Format(kind, 32))
        assert rounded.scale.tolist() == [[0.5 * sign]]
        assert torch.equal(dequantise(rounded, Format(kind, 32)), sign * weight)
