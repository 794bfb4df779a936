"""Tiled sums and factors: right to float64's last digits, and the same bits for any number of threads."""

import pytest
import torch
from torch import Tensor

from hikui.lowering.engine.workers import Workers
from hikui.passes.measure import linalg
from tests.passes.helpers import random


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linalg, "_TILE", 32)


def gram(k: int, tokens: int = 300, workers: int = 1) -> Tensor:
    total = torch.zeros(k, k, dtype=torch.float64)
    with Workers(workers) as pool:
        for part in random(tokens, k).split(77):
            linalg.add_gram(total, part, pool)
    linalg.mirror(total)
    return total


@pytest.mark.parametrize("k", [1, 31, 32, 33, 100])
@pytest.mark.parametrize("damping", [1e-9, 0.01, 1.0])
def test_the_factor_multiplies_out(k: int, damping: float) -> None:
    x = random(300, k).double()
    total = gram(k)
    assert torch.allclose(total, x.t() @ x, rtol=1e-5, atol=1e-4)
    wanted = total + damping * total.diagonal().mean() * torch.eye(k, dtype=torch.float64)
    diagonal, factor = total.diagonal().clone(), total.clone()
    with Workers(1) as pool:
        assert linalg.factor_upper(factor, damping, pool) == damping
    upper = factor.triu()
    assert torch.allclose(upper @ upper.t(), wanted, rtol=1e-12, atol=1e-10 * float(wanted.max()))
    rows = random(7, k, seed=3).double()
    assert torch.allclose(linalg.solve_right(rows, factor) @ wanted, rows, atol=1e-6)
    linalg.unfactor(factor, diagonal)
    assert torch.equal(factor, total)


@pytest.mark.parametrize("n", [70, 9, 90])
def test_cross_products(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linalg, "_TILE", 32)
    x, y = random(50, n), random(50, 70, seed=1)
    total = torch.zeros(n, 70, dtype=torch.float64)
    with Workers(2) as pool:
        linalg.add_cross(total, x, y, pool)
    assert torch.allclose(total, x.double().t() @ y.double(), rtol=1e-5, atol=1e-5)


def test_permuted() -> None:
    matrix, order = random(70, 70), torch.randperm(70, generator=torch.Generator().manual_seed(2))
    assert torch.equal(linalg.permuted(matrix, order), matrix[order][:, order])


def test_threads_change_no_bit() -> None:
    one, three = gram(100), gram(100, workers=3)
    assert torch.equal(one, three)
    with Workers(1) as pool:
        linalg.factor_upper(one, 0.01, pool)
    with Workers(3) as pool:
        linalg.factor_upper(three, 0.01, pool)
    assert torch.equal(one, three)


def test_what_is_not_positive_definite_is_damped_until_it_is() -> None:
    square = random(90, 90).double()
    square = square + square.t() + 3 * torch.eye(90, dtype=torch.float64)
    factor = square.clone()
    with Workers(1) as pool:
        taken = linalg.factor_upper(factor, 0.01, pool)
    assert taken > 0.01
    shifted = square + taken * square.diagonal().mean() * torch.eye(90, dtype=torch.float64)
    assert torch.allclose(factor.triu() @ factor.triu().t(), shifted, atol=1e-9)
    zeros = torch.zeros(5, 5, dtype=torch.float64)
    with Workers(1) as pool:
        assert linalg.factor_upper(zeros, 0.01, pool) == 0.01
        with pytest.raises(ValueError, match="NaN"):
            linalg.factor_upper(torch.full((2, 2), float("nan"), dtype=torch.float64), 0.01, pool)
