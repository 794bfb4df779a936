"""Half-quadratic rounding: against a plain scalar implementation, and its guarantee."""

import math

import pytest
import torch
from torch import Tensor

from hikui.lowering.errors import UsageError
from hikui.lowering.formats import KINDS, Format, unpack
from hikui.lowering.pipeline.text import parse_pipeline
from hikui.passes import PASSES, Hqq
from hikui.passes.quantise.hqq import HalfQuadratic, round_hqq
from hikui.passes.quantise.rounding import Rounded, dequantise, round_matrix
from tests.passes.helpers import assert_settled, canonical, check, lower, random


def heavy_tailed(n: int, k: int, seed: int) -> Tensor:
    return random(n, k, seed=seed) * random(n, k, seed=seed + 1).exp()


def costs(weight: Tensor, rounded: Rounded, fmt: Format, p: float = 0.7) -> Tensor:
    """Σ|w−ŵ|^p of each row and group in float64."""
    off = (dequantise(rounded, fmt).double() - weight.double()).abs() ** p
    return torch.stack([part.sum(1) for part in off.split(fmt.group_size(weight.shape[1]), 1)], 1)


def half(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float64).half())


def scalar(values: list[float], scale: float, levels: list[int], search: HalfQuadratic) -> tuple[float, float]:
    """One group, one number at a time, as the method is written down: the best scale and its Σ|w−ŵ|^p."""

    def nearest(s: float) -> list[int]:
        return [min(levels, key=lambda level: abs(value - s * level)) for value in values]

    def cost(s: float, codes: list[int]) -> float:
        return sum(float(abs(value - s * code) ** search.p) for value, code in zip(values, codes, strict=True))

    unit = abs(scale) * (levels[-1] - levels[0]) / (len(levels) - 1)
    codes, beta = nearest(scale), search.beta
    best = (cost(scale, codes), scale)
    for _ in range(search.iterations):
        above = below = 0.0
        for value, code in zip(values, codes, strict=True):
            x = (value - scale * code) / unit
            size = abs(x) - abs(x) ** (search.p - 1) / beta if x else 0.0
            above += (value - math.copysign(max(size, 0.0), x) * unit) * code
            below += code * code
        scale = half(above / below)
        codes = nearest(scale)
        best = min(best, (cost(scale, codes), scale))
        beta *= search.kappa
    return best[1], best[0]


@pytest.mark.parametrize("name", ["int4-g32", "int3-g32", "int2-channel", "ternary-g32", "nf4-g32", "sign-g32"])
def test_it_does_what_the_scalar_form_does(name: str) -> None:
    fmt, weight, search = Format.parse(name), heavy_tailed(6, 70, seed=1), HalfQuadratic()
    start, found = round_matrix(weight, fmt), round_hqq(weight, fmt, search)
    got = costs(weight, found, fmt)
    same = 0
    groups = list(torch.arange(70).split(fmt.group_size(70)))
    for row in range(6):
        for group, own in enumerate(groups):
            scale, cost = scalar(weight[row, own].tolist(), float(start.scale[row, group]), list(fmt.levels), search)
            # A float32 sum may round to the neighbouring float16, and a step then takes another turn.
            assert float(got[row, group]) == pytest.approx(cost, rel=0.01)
            same += float(found.scale[row, group]) == scale
    assert same >= 0.8 * 6 * len(groups)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [32, None])
def test_no_group_ends_above_its_start(kind: str, group: int | None) -> None:
    fmt, weight = Format(kind, group), heavy_tailed(9, 100, seed=3)
    found = round_hqq(weight, fmt)
    assert torch.equal(found.scale, found.scale.half().float())
    before, after = (costs(weight, rounded, fmt) for rounded in (round_matrix(weight, fmt), found))
    assert bool((after <= before * (1 + 1e-5)).all())
    if kind not in ("int8", "sign"):
        assert float(after.sum()) < 0.995 * float(before.sum())


def test_outliers_are_let_go() -> None:
    weight = random(8, 64, seed=5)
    weight[:, 7] = 12.0
    fmt = Format.parse("int3-g64")
    rest = torch.arange(64) != 7
    off = [(dequantise(rounded, fmt) - weight)[:, rest].abs().mean() for rounded in
           (round_matrix(weight, fmt), round_hqq(weight, fmt))]  # fmt: skip
    assert off[1] < 0.9 * off[0]


def test_the_size_of_weights_does_not_matter() -> None:
    fmt, weight = Format.parse("int3-g32"), heavy_tailed(7, 96, seed=6)
    one, other = round_hqq(weight, fmt), round_hqq(weight * 0.0625, fmt)
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.scale * 0.0625, other.scale)


def test_mixed_rounds_each_part_on_its_own() -> None:
    fmt, weight = Format.parse("mixed-g32-c64"), heavy_tailed(7, 150, seed=7)
    whole = round_hqq(weight, fmt)
    heavy = round_hqq(weight[:, :64], Format("int4", 32))
    light = round_hqq(weight[:, 64:], Format("sign", 32))
    assert torch.equal(whole.codes, torch.cat((heavy.codes, light.codes), 1))
    assert torch.equal(whole.scale[:, :5], torch.cat((heavy.scale, light.scale), 1))
    assert whole.scale.shape == (7, 8) and not whole.scale[:, 5:].any()


def test_parts_of_rows_give_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    fmt, weight = Format.parse("nf4-g32"), heavy_tailed(37, 96, seed=8)
    whole = round_hqq(weight, fmt)
    monkeypatch.setattr("hikui.passes.quantise.hqq._CHUNK", 96 * 5)
    parts = round_hqq(weight, fmt)
    assert torch.equal(whole.codes, parts.codes) and torch.equal(whole.scale, parts.scale)


def test_zeros_stay_zeros() -> None:
    for kind in KINDS:
        assert not dequantise(round_hqq(torch.zeros(3, 40), Format(kind, 32)), Format(kind, 32)).any()


def test_text_and_the_packed_matrix() -> None:
    program = canonical("llama")
    out = lower(program, "override{sites=q_proj,format=int4-g32},hqq{bits=3,group=32,skip=lm_head}")
    check(
        out,
        """
        // CHECK: "model.layers.0.mlp.up_proj.weight.int3-g32" : u8[8, 6, 16, 4]
        // CHECK: %[[Y:.*]] = hikui.linear(%[[X:.*]], %w_model_layers_0_self_attn_q_proj_weight_int4_g32,
        // CHECK-SAME: "int4-g32", 48) : f32[1, T, 48]  // site=model.layers.0.self_attn.q_proj
        // CHECK: aten.linear({{.*}}, %w_lm_head_weight){{.*}} // site=lm_head
        """,
    )
    key, fmt = "model.layers.1.mlp.down_proj.weight", Format.parse("int3-g32")
    weight = program.store.load(key)
    got = unpack(fmt, out.store.load(f"{key}.int3-g32"), out.store.load(f"{key}.int3-g32.scale"), *weight.shape)
    assert torch.equal(got, dequantise(round_hqq(weight, fmt), fmt))
    assert_settled(Hqq(bits=3, group=32, skip="lm_head"), out)


@pytest.mark.parametrize(
    ("options", "match"),
    [("p=0", "norm p=0"), ("p=1.5", "norm p=1.5"), ("beta=0", "above 0"), ("iterations=0", "0 iterations")],
)
def test_wrong_options(options: str, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        parse_pipeline(f"hqq{{{options}}}", PASSES)
