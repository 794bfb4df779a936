"""Factors of signs: what they stand for, how far from a matrix they are, and that nothing makes them worse."""

import itertools

import pytest
import torch
from torch import Tensor

from hikui.passes.quantise import factor_descent
from hikui.passes.quantise.binary_factors import Factors, factorise, shrunk, signs
from hikui.passes.quantise.factor_descent import error, refine
from tests.passes.helpers import random


def start(weight: Tensor, rank: int, importance: Tensor | None = None, iterations: int = 40) -> Factors:
    return factorise(weight, rank, importance, iterations, torch.Generator().manual_seed(3))


def metric(k: int, seed: int = 1) -> Tensor:
    """Of activations that go together: float32 [k, k]."""
    x = random(3 * k, k, seed=seed) @ random(k, k, seed=seed + 1)
    return x.t() @ x / len(x)


def test_a_product_of_signs_is_found_again() -> None:
    u, v = signs(random(24, 4, seed=1)), signs(random(40, 4, seed=2))
    rows, columns = random(24, seed=3).abs() + 0.5, random(40, seed=4).abs() + 0.5
    weight = rows.unsqueeze(1) * (u @ v.t()) * columns
    found = start(weight, 4)
    assert float((found.dense() - weight).norm() / weight.norm()) < 0.1
    found = refine(weight, found, torch.eye(40), 6)
    assert float((found.dense() - weight).norm() / weight.norm()) < 2e-3


def test_more_rank_leaves_less() -> None:
    weight = random(40, 48)
    left = [float((start(weight, rank).dense() - weight).square().sum()) for rank in (8, 16, 32, 64, 96)]
    assert left == sorted(left, reverse=True)
    # Of Gaussian weights signs with a scale leave .36; at 1.4 bits a weight factors leave a third less.
    assert float((start(weight, 32).dense() - weight).square().sum() / weight.square().sum()) < 0.25


def test_what_is_read_more_is_nearer() -> None:
    weight, importance = random(32, 32), torch.ones(32)
    importance[:4] = 100.0
    even, weighed = start(weight, 16), start(weight, 16, importance)

    def left(factors: Factors) -> Tensor:
        return (factors.dense() - weight).square().sum(0)

    assert float(left(weighed)[:4].sum()) < 0.5 * float(left(even)[:4].sum())
    assert float((left(weighed) * importance).sum()) < float((left(even) * importance).sum())


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_the_size_of_a_matrix_does_not_matter(size: float) -> None:
    weight = random(16, 24)
    found = start(weight * size, 8)
    torch.testing.assert_close(found.dense() / size, start(weight, 8).dense(), rtol=1e-3, atol=1e-4)


def test_zeros_stay_zeros() -> None:
    found = start(torch.zeros(16, 24), 8)
    assert all(bool(part.isfinite().all()) for part in found)
    assert torch.equal(found.dense(), torch.zeros(16, 24))


def test_the_same_seed_gives_the_same_bits() -> None:
    weight = random(16, 24)
    assert all(map(torch.equal, start(weight, 8), start(weight, 8)))


def test_columns_that_nothing_excites_count_too() -> None:
    importance = shrunk(torch.tensor([0.0, 1.0, 2.0]))
    assert importance is not None
    torch.testing.assert_close(importance, torch.tensor([0.2, 1.0, 1.8]))
    assert shrunk(torch.zeros(3)) is None


@pytest.mark.parametrize("part", ["_refit_middle", "_refit_columns", "_turn_left", "_turn_right"])
def test_no_part_of_a_round_makes_the_error_larger(part: str) -> None:
    weight, hessian = random(24, 20), metric(20)
    factors = start(weight, 16, iterations=10)
    before = error(weight, factors, hessian)
    after = getattr(factor_descent, part)(weight, factors, hessian)
    assert error(weight, after, hessian) < before
    assert error(weight, getattr(factor_descent, part)(weight, after, hessian), hessian) <= before


def test_the_error_is_that_of_the_output() -> None:
    weight, x = random(6, 5), random(50, 5, seed=9).double()
    factors = start(weight, 4)
    off = x @ (weight - factors.dense()).double().t()
    hessian = (x.t() @ x).float()
    assert error(weight, factors, hessian) == pytest.approx(float(off.square().sum()), rel=1e-4)


@pytest.mark.parametrize(("part", "name"), [("_refit_middle", "middle"), ("_refit_columns", "columns")])
def test_scales_are_those_of_least_error(part: str, name: str) -> None:
    weight, hessian = random(12, 10), metric(10)
    factors = getattr(factor_descent, part)(weight, start(weight, 8, iterations=10), hessian)
    least = error(weight, factors, hessian)
    for seed in range(6):
        moved = getattr(factors, name) * (1 + 0.02 * random(len(getattr(factors, name)), seed=seed))
        # The ridge leaves them a thousandth beside the least.
        assert error(weight, factors._replace(**{name: moved}), hessian) > least * 0.999


def test_signs_that_turn_side_by_side_do_not_undo_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = random(1, 30).repeat(30, 1), torch.ones(30, 30) + 0.01 * torch.eye(30)
    factors = start(weight, 12, iterations=2)
    factors = factors._replace(right=-factors.right)
    one, many = (lowered(factors, weight, hessian, columns, monkeypatch) for columns in (1, 32))
    before = error(weight, factors, hessian)
    assert many < before and many < one + 0.02 * before


def lowered(factors: Factors, weight: Tensor, hessian: Tensor, columns: int, monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setattr(factor_descent, "_COLUMNS", columns)
    return error(weight, factor_descent._turn_right(weight, factors, hessian), hessian)


@pytest.mark.parametrize("columns", [1, 3, 32])
def test_no_single_sign_of_the_right_factor_would_gain(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factor_descent, "_COLUMNS", columns)
    weight, hessian = random(10, 7), metric(7)
    factors = start(weight, 6, iterations=10)
    for _ in range(8):
        factors = factor_descent._turn_right(weight, factors, hessian)
    least = error(weight, factors, hessian)
    for at in itertools.product(range(7), range(6)):
        right = factors.right.clone()
        right[at] = -right[at]
        assert error(weight, factors._replace(right=right), hessian) >= least * (1 - 1e-5)


def test_rounds_help_where_inputs_go_together() -> None:
    weight, hessian = random(48, 40), metric(40)
    factors = start(weight, 24)
    assert error(weight, refine(weight, factors, hessian, 4), hessian) < 0.7 * error(weight, factors, hessian)
    assert refine(weight, factors, hessian, 0) is factors


def test_signs_that_stay_keep_their_latents() -> None:
    weight, hessian = random(24, 20), metric(20)
    before = start(weight, 16)
    after = refine(weight, before, hessian, 2)
    for one, two in ((before.left, after.left), (before.right, after.right)):
        assert torch.equal(one.abs(), two.abs())
        assert 0 < float((signs(one) != signs(two)).float().mean()) < 0.5
