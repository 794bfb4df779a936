"""gptq against the algorithm as it is printed, and against enumeration of all codes."""

import itertools

import pytest
import torch
from torch import Tensor

from hikui.lowering.engine.workers import Workers
from hikui.lowering.errors import HikuiError, UsageError
from hikui.lowering.formats import KINDS, Format
from hikui.lowering.ir.program import Program
from hikui.passes import Gptq
from hikui.passes.measure.evidence import OwnEvidence
from hikui.passes.quantise.gptq import compensate
from hikui.passes.quantise.rounding import Rounded, dequantise, group_codes, round_matrix
from tests.passes.helpers import (
    SMALL_VOCABULARY,
    assert_settled,
    calibration,
    canonical,
    check,
    lower,
    program_of,
    random,
    run,
)

DAMPING = 0.01


def covariance(k: int, tokens: int = 400) -> Tensor:
    """E[x·xᵀ] of activations that are correlated and of very different size."""
    mixing = torch.eye(k) + 0.1 * random(k, k, seed=5)
    x = (random(tokens, k, seed=6) * torch.linspace(0.1, 3, k)) @ mixing
    return x.double().t() @ x.double() / tokens


def assert_printed(got: Rounded, weight: Tensor, gram: Tensor, fmt: Format, *, act_order: bool, clip: str) -> None:
    """Algorithm 1 of Frantar et al., in float64 and column by column: the update with the Cholesky factor of H⁻¹.

    It goes on with the codes and scales that were chosen, so that each choice is judged alone: what a code is to be
    nearest to is known to within the error of float32 sums in any order, and only where it lies so near to the middle
    of two codes may either be chosen. The same goes for scales.
    """
    n, k = weight.shape
    damped = gram + DAMPING * gram.diagonal().mean() * torch.eye(k, dtype=torch.float64)
    order = torch.arange(k)
    if act_order:
        order = torch.sort(damped.diagonal(), descending=True, stable=True).indices
    damped = damped[order][:, order]
    factor = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    # H = U·Uᵀ: what is to be made up for in a column is Σ e_j·U_jk / U_kk, whose terms bound the error of the sum.
    upper = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
    scaled = (upper / upper.diagonal()).abs().triu(1)
    size, rounding = fmt.group_size(k), (k + 10) * 2.0**-24
    left, lost = weight.double()[:, order].clone(), torch.zeros(n, k, dtype=torch.float64)
    scales, codes = got.scale.double(), got.codes.double()
    if act_order or fmt.group is None:
        assert torch.equal(got.scale, round_matrix(weight, fmt, clip).scale)
    for at in range(k):
        column = int(order[at])
        error = rounding * (weight[:, column].abs() + lost.abs() @ scaled[:, at])
        if not act_order and fmt.group is not None and at % size == 0:
            assert_chosen(scales[:, at // size], left[:, at : at + size], float(error.max()), fmt.kind, clip)
        scale, code = scales[:, column // size], codes[:, column]
        levels = torch.tensor(KINDS[fmt.kind].levels, dtype=torch.float64)
        away = (left[:, at, None] - scale[:, None] * levels).abs()
        value = code * scale
        assert bool(((left[:, at] - value).abs() <= away.min(1).values + 2 * error).all()), f"column {column}"
        lost[:, at] = weight[:, column] - value
        left[:, at:] -= torch.outer((left[:, at] - value) / factor[at, at], factor[at, at:])


def assert_chosen(scale: Tensor, part: Tensor, error: float, kind: str, clip: str) -> None:
    """The scales [n] are those of a group's values [n, group], which are known to within an error."""
    fmt = Format(kind)
    want = round_matrix(part.float(), fmt, clip).scale[:, 0].double()
    if clip == "minmax":
        # Where the quotient lies at the middle of two float16 numbers, either.
        assert bool(((scale - want).abs() <= 2.0**-10 * want.abs()).all())
        quotient = part.abs().amax(1) / KINDS[kind].levels[-1] if kind != "sign" else part.abs().mean(1)
        assert bool(((scale - quotient).abs() <= (2.0**-11 + 1e-6) * quotient + error).all())
        return
    levels = torch.tensor(KINDS[kind].levels, dtype=torch.float64)

    def squares(candidate: Tensor) -> Tensor:
        return (part[..., None] - candidate[:, None, None] * levels).abs().amin(-1).square().sum(1)

    allowed = 2 * error * part.abs().sum(1)
    assert bool((squares(scale) <= squares(want) + allowed).all())


def nearest_codes(values: Tensor, scale: Tensor, kind: str) -> Tensor:
    """The nearest codes to values [n], each with a scale of its own."""
    return group_codes(values.unsqueeze(-1), scale, kind).squeeze(-1)


def rounded(step: Gptq, weight: Tensor, gram: Tensor, fmt: Format) -> Rounded:
    with Workers(1) as workers:
        prepared = step.prepare(OwnEvidence(gram=gram.clone()), workers, fmt)
    return step.quantise(weight, fmt, prepared)


def loss(difference: Tensor, gram: Tensor) -> float:
    return float((difference.double() @ gram * difference.double()).sum())


@pytest.mark.parametrize("name", ["int4-g32", "int3-g64", "int2-channel", "nf4-g32", "sign-g64", "ternary-g128"])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("clip", ["mse", "minmax"])
def test_it_is_the_printed_algorithm(name: str, act_order: bool, clip: str) -> None:
    fmt, weight, gram = Format.parse(name), random(19, 200), covariance(200)
    step = Gptq(format=name, act_order=act_order, clip=clip, damping=DAMPING)  # type: ignore[arg-type]
    got = rounded(step, weight, gram, fmt)
    assert_printed(got, weight, gram, fmt, act_order=act_order, clip=clip)
    nearest = dequantise(round_matrix(weight, fmt, clip), fmt)
    assert loss(weight - dequantise(got, fmt), gram) < 0.9 * loss(weight - nearest, gram)


def test_mixed_columns_have_scales_of_their_own_kind() -> None:
    fmt, weight, gram = Format.parse("mixed-g32-c64"), random(9, 160), covariance(160)
    got = rounded(Gptq(format=str(fmt)), weight, gram, fmt)
    assert set(got.codes[:, 64:].unique().tolist()) == {-1, 1}
    assert got.codes[:, :64].unique().numel() > 4
    assert loss(weight - dequantise(got, fmt), gram) < loss(weight - dequantise(round_matrix(weight, fmt), fmt), gram)


def test_stages_are_gptq_twice_signs_first() -> None:
    """Against both stages written out: int4 throughout, then signs by rising activations, then the int4 columns."""
    fmt, weight, gram = Format.parse("mixed-g32-c64"), random(9, 160), covariance(160)
    got = rounded(Gptq(format=str(fmt), staged=True), weight, gram, fmt)
    buffer = dequantise(rounded(Gptq(format="int4-g32"), weight, gram, Format.parse("int4-g32")), Format("int4", 32))
    order = sorted(range(64, 160), key=lambda column: (float(gram[column, column]), column)) + list(range(64))
    damped = gram + 0.01 * float(gram.diagonal().mean()) * torch.eye(160, dtype=torch.float64)
    factor = torch.linalg.cholesky(torch.linalg.inv(damped[order][:, order])).t()
    scales = round_matrix(buffer, fmt).scale
    assert torch.equal(got.scale, scales)
    left, different = buffer.double()[:, order], 0
    for at, column in enumerate(order):
        scale = scales[:, column // 32].double()
        kind = "int4" if column < 64 else "sign"
        code = nearest_codes(left[:, at].float(), scale.float(), kind).double()
        different += int((got.codes[:, column] != code).sum())
        # From where it is, whichever of two near codes it took.
        lost = (left[:, at] - got.codes[:, column].double() * scale) / factor[at, at]
        left[:, at:] -= torch.outer(lost, factor[at, at:])
    assert different <= 2
    # Formats that are not mixed have one stage.
    fmt = Format.parse("int2-g32")
    one, two = (rounded(Gptq(format=str(fmt), staged=staged), weight, gram, fmt) for staged in (False, True))
    assert torch.equal(one.codes, two.codes)


def test_it_lies_between_the_best_codes_and_the_nearest_ones() -> None:
    """Of all 3⁸ ternary rows with the same scale, the best one bounds what compensation can reach."""
    fmt, k = Format.parse("ternary-channel"), 8
    gram, total = covariance(k), {"best": 0.0, "gptq": 0.0, "nearest": 0.0}
    every = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=k)))
    for seed in range(20):
        weight = random(1, k, seed=seed)
        got = rounded(Gptq(format=str(fmt), damping=1e-9), weight, gram, fmt)
        differences = weight - every * got.scale[0, 0]
        total["best"] += float(torch.einsum("ri,ij,rj->r", differences.double(), gram, differences.double()).min())
        total["gptq"] += loss(weight - dequantise(got, fmt), gram)
        total["nearest"] += loss(weight - nearest_codes(weight[0], got.scale[0].expand(k), "ternary") * got.scale, gram)
    assert total["best"] <= total["gptq"] * (1 + 1e-9)
    assert total["gptq"] < total["nearest"]


def test_uncorrelated_columns_are_rounded_to_nearest() -> None:
    fmt, weight = Format.parse("int3-g32"), random(7, 96)
    got = rounded(Gptq(format=str(fmt)), weight, torch.eye(96, dtype=torch.float64), fmt)
    want = round_matrix(weight, fmt)
    assert torch.equal(got.codes, want.codes)
    assert torch.equal(got.scale, want.scale)


def test_the_rows_do_not_see_each_other() -> None:
    fmt, weight, gram = Format.parse("int3-g64"), random(40, 128), covariance(128)
    with Workers(1) as workers:
        factor = Gptq(act_order=False).prepare(OwnEvidence(gram=gram.clone()), workers, fmt)
    whole = compensate(weight, fmt, factor, "mse")
    parts = [compensate(part, fmt, factor, "mse") for part in weight.split(16)]
    assert torch.equal(whole.codes, torch.cat([part.codes for part in parts]))
    assert torch.equal(whole.scale, torch.cat([part.scale for part in parts]))


def two_sites() -> Program:
    def body(x: Tensor, a__weight: Tensor, b__weight: Tensor) -> Tensor:
        return torch.nn.functional.linear(torch.tanh(torch.nn.functional.linear(x, a__weight)), b__weight)

    weights = {"a__weight": random(70, 40, seed=1), "b__weight": random(SMALL_VOCABULARY, 70, seed=3)}
    return lower(program_of(body, embedding=random(SMALL_VOCABULARY, 40), **weights), "canonicalise")


def test_text() -> None:
    program = two_sites()
    check(
        lower(program, "gptq{bits=3,group=32}", calibration(program)),
        """
        // CHECK: %w_a_weight_int3_g32 = weight "a.weight.int3-g32" : u8[5, 6, 16, 4]
        // CHECK: hikui.linear(%{{.*}}, %w_a_weight_int3_g32, %w_a_weight_int3_g32_scale, None, "int3-g32", 70)
        // CHECK-SAME: site=a group=a format=int3-g32
        // CHECK: hikui.linear(%{{.*}}, %w_b_weight_int3_g32, %w_b_weight_int3_g32_scale, None, "int3-g32", 24)
        // CHECK-SAME: site=b group=b format=int3-g32
        """,
    )


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_logits_are_nearer_than_those_of_nearest_codes(family: str) -> None:
    program = canonical(family)
    data = calibration(program, chunks=12)
    want = [run(program, chunk)[0] for chunk in data.chunks]
    errors = {}
    for name in ("rtn{bits=3,group=32}", "gptq{bits=3,group=32}", "gptq{bits=3,group=32,inputs=float}"):
        rounded_program = lower(program, name, data)
        errors[name] = sum(
            float((run(rounded_program, chunk)[0] - logits).square().mean())
            for chunk, logits in zip(data.chunks, want, strict=True)
        )
    nearest, *compensated = errors.values()
    assert max(compensated) < nearest


def test_settled_and_refused() -> None:
    program = canonical("llama")
    data = calibration(program)
    assert_settled(Gptq(), lower(program, "gptq", data), data)
    with pytest.raises(HikuiError, match="It follows real text through the model and none was given"):
        lower(program, "gptq")
    with pytest.raises(HikuiError, match=r"`qep` asks for model\.layers\.0\.self_attn\.q_proj to be corrected"):
        lower(program, "qep,gptq{inputs=float}", data)
    with pytest.raises(UsageError, match="damping is above 0"):
        Gptq(damping=0)
    with pytest.raises(UsageError, match="gptq cannot round to 16 bits; it takes 1, 2, 3, 4, 8"):
        Gptq(bits=16)


@pytest.mark.parametrize("act_order", [True, False])
def test_weighted_scales_are_chosen_by_the_mean_squares(act_order: bool) -> None:
    """By those of the Gram matrix as it was measured, in the columns' own order; with act_order for every group."""
    name, weight, gram = "int4-g32", random(19, 96, seed=7), covariance(96)
    fmt, importance = Format.parse(name), gram.diagonal().float()
    step = Gptq(format=name, act_order=act_order, weighted=True)
    got, plain = rounded(step, weight, gram, fmt), rounded(Gptq(format=name, act_order=act_order), weight, gram, fmt)
    seen = slice(None) if act_order else slice(0, 1)
    if act_order:
        want = round_matrix(weight, fmt, "mse", importance).scale
    else:
        # Only the first group is met before anything is lost.
        want = round_matrix(weight[:, :32], Format("int4"), "mse", importance[:32]).scale
    assert torch.equal(got.scale[:, seen], want)
    assert not torch.equal(got.scale[:, seen], plain.scale[:, seen])


@pytest.mark.parametrize(("name", "k"), [("int4-g128", 256), ("int4-g128", 300), ("int4-g256", 512)])
def test_a_group_as_wide_as_a_block_or_wider_is_met_when_its_turn_comes(name: str, k: int) -> None:
    fmt, weight, gram = Format.parse(name), random(7, k, seed=8), covariance(k)
    got = rounded(Gptq(format=name, act_order=False, damping=DAMPING), weight, gram, fmt)
    assert_printed(got, weight, gram, fmt, act_order=False, clip="mse")
    assert got.codes.dtype == torch.int8 and got.scale.dtype == torch.float32
    beforehand = round_matrix(weight, fmt).scale
    assert torch.equal(got.scale[:, 0], beforehand[:, 0]) and not torch.equal(got.scale[:, 1], beforehand[:, 1])
