"""Coordinate descent and refitted scales, against float64, against enumeration, and on a gptq that it follows."""

import itertools

import pytest
import torch
from torch import Tensor

from hikui.lowering.engine.workers import Workers
from hikui.lowering.errors import UsageError
from hikui.lowering.formats import KINDS, Format
from hikui.passes import Gptq
from hikui.passes.measure.evidence import OwnEvidence
from hikui.passes.quantise.descent import descend
from hikui.passes.quantise.rounding import Rounded, dequantise, round_matrix
from tests.passes.helpers import calibration, canonical, lower, random, run
from tests.passes.quantise.test_gptq import covariance

FORMATS = ("int4-g32", "int3-g64", "int2-g32", "nf4-g32", "sign-g32", "ternary-channel", "mixed-g32-c64")


def error(weight: Tensor, rounded: Rounded, fmt: Format, gram: Tensor) -> Tensor:
    """Float64 [n]: what each row loses at the output."""
    off = (weight - dequantise(rounded, fmt)).double()
    return ((off @ gram) * off).sum(1)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("k", [96, 150])
def test_no_row_gets_worse_and_most_get_better(name: str, k: int) -> None:
    fmt, gram, weight = Format.parse(name), covariance(k), random(9, k, seed=1)
    start = round_matrix(weight, fmt)
    before = error(weight, start, fmt, gram)
    for sweeps in (1, 3):
        found = descend(weight, start, fmt, gram.float(), sweeps)
        after = error(weight, found, fmt, gram)
        assert bool((after <= before * (1 + 1e-5)).all())
        assert float(after.sum()) < 0.9 * float(before.sum())
        assert torch.equal(found.scale, found.scale.half().float())
        before = after


def test_without_sweeps_nothing_changes() -> None:
    fmt, weight = Format("int4", 32), random(5, 64, seed=1)
    start = round_matrix(weight, fmt)
    same = descend(weight, start, fmt, covariance(64).float(), 0)
    assert torch.equal(same.codes, start.codes) and torch.equal(same.scale, start.scale)


def test_scales_are_the_least_squares_ones() -> None:
    """With codes that no sweep would change, only the scales move: to the solution of the normal equations."""
    fmt, k = Format("int4", 32), 96
    gram, weight = covariance(k), random(4, k, seed=2)
    start = round_matrix(weight, fmt, "minmax")
    found = descend(weight, start, fmt, gram.float(), 6)
    groups = k // 32
    for row in range(4):
        spread = torch.zeros(k, groups, dtype=torch.float64)
        for group in range(groups):
            own = slice(group * 32, group * 32 + 32)
            spread[own, group] = found.codes[row, own].double()
        best = torch.linalg.solve(spread.t() @ gram @ spread, spread.t() @ gram @ weight[row].double())
        assert torch.allclose(found.scale[row].double(), best, rtol=2e-3)


def test_every_code_is_best_while_the_others_stay() -> None:
    fmt, k = Format("int3", 32), 64
    gram, weight = covariance(k), random(3, k, seed=3)
    found = descend(weight, round_matrix(weight, fmt), fmt, gram.float(), 30)
    reached = error(weight, found, fmt, gram)
    for column, level in itertools.product(range(k), KINDS["int3"].levels):
        codes = found.codes.clone()
        codes[:, column] = level
        assert bool((error(weight, Rounded(codes, found.scale), fmt, gram) >= reached * (1 - 1e-4)).all())


def test_gptq_with_sweeps_loses_less_on_every_row() -> None:
    fmt, k = Format("int3", 32), 128
    gram, weight = covariance(k), random(24, k, seed=4)
    found = {}
    for sweeps in (0, 2):
        step = Gptq(bits=3, group=32, sweeps=sweeps)
        with Workers(1) as workers:
            prepared = step.prepare(OwnEvidence(gram=gram.clone()), workers, fmt)
        found[sweeps] = error(weight, step.quantise(weight, fmt, prepared), fmt, prepared_hessian(gram, step))
    assert bool((found[2] <= found[0] * (1 + 1e-5)).all())
    assert float(found[2].sum()) < 0.95 * float(found[0].sum())


def prepared_hessian(gram: Tensor, step: Gptq) -> Tensor:
    return gram + step.damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


def test_a_recipe_may_ask_for_sweeps() -> None:
    program = canonical("llama")
    packed = lower(program, "gptq{bits=3,group=32,sweeps=1},pack,dead_code", calibration(program))
    plain = lower(program, "gptq{bits=3,group=32},pack,dead_code", calibration(program))
    logits, _ = run(packed)
    assert bool(logits.isfinite().all())
    assert not torch.equal(logits, run(plain)[0])


def test_sweeps_below_zero_are_refused() -> None:
    with pytest.raises(UsageError, match=r"gptq cannot take -1 sweeps; give 0 or more\."):
        Gptq(sweeps=-1)
