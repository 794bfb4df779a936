"""Products in integers: forwards against the formula of what a packed site computes, backwards within a rounding."""

import pytest
import torch
from torch import Tensor

from hikui.lowering.formats import quantize_activation
from hikui.passes.gradients import coded_matrix
from hikui.passes.gradients.coded_matrix import CodedMatrix, integer_product
from tests.passes.helpers import random

SHAPES = [(1, 1, 1), (1, 33, 7), (3, 64, 16), (5, 100, 48), (17, 576, 40), (64, 31, 130)]


def matrix(n: int, k: int) -> CodedMatrix:
    generator = torch.Generator().manual_seed(n * 1000 + k)
    codes = torch.randint(-8, 8, (n, k), generator=generator, dtype=torch.int8)
    # A scale may be below zero, and of a row of zeros it is zero.
    scale = torch.randn(n, generator=generator) / 10
    scale[0] = 0.0
    return CodedMatrix(codes, scale)


def gradients(held: CodedMatrix, x: Tensor, outer: Tensor) -> tuple[Tensor, Tensor]:
    assert held.leaf is not None
    of_x, _ = torch.autograd.grad(held.product(x, None), (x, held.leaf.stand_in), outer)
    return of_x, held.leaf.gradient().multiplied()


@pytest.mark.parametrize(("tokens", "k", "n"), SHAPES)
def test_forwards_is_what_a_packed_site_computes(tokens: int, k: int, n: int) -> None:
    held, x, bias = matrix(n, k), random(2, tokens, k, seed=1), random(n, seed=2)
    codes, scale, _ = quantize_activation(x)
    read = codes[..., :k].double() * scale.double().unsqueeze(-1)
    expected = read @ held.dense().double().t() + bias.double()
    assert torch.allclose(held.product(x, bias).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("tokens", "k", "n"), SHAPES)
def test_gradients_are_within_a_rounding_of_the_exact_ones(tokens: int, k: int, n: int) -> None:
    held, x = matrix(n, k).as_leaf(), random(1, tokens, k, seed=1).requires_grad_()
    # Tokens and rows of very different sizes, as gradients are.
    outer = random(1, tokens, n, seed=3) * torch.logspace(-3, 3, tokens).view(1, -1, 1)
    of_x, of_matrix = gradients(held, x, outer)
    codes, scale, _ = quantize_activation(x.detach()[0])
    read, dense, flat = codes[:, :k].double() * scale.double().unsqueeze(1), held.dense().double(), outer[0].double()

    # Half a step of each rounded gradient, times what it is multiplied by.
    scaled = flat * held.scale.double()
    steps = scaled.abs().amax(1, keepdim=True) / 127
    room = steps / 2 * held.codes.double().abs().sum(0) * 1.001 + 1e-6
    assert bool(((of_x[0].double() - flat @ dense).abs() <= room + 1e-5 * (flat.abs() @ dense.abs())).all())
    scaled = flat * scale.double().unsqueeze(1)
    steps = scaled.abs().amax(0) / 127
    room = steps.unsqueeze(1) / 2 * codes[:, :k].double().abs().sum(0) * 1.001 + 1e-6
    assert bool(((of_matrix.double() - flat.t() @ read).abs() <= room + 1e-5 * (flat.abs().t() @ read.abs())).all())


def test_texts_share_one_product() -> None:
    """The rows of both are rounded with one scale, so the second's are those of a text of both."""
    held, outer = matrix(16, 64).as_leaf(), random(1, 12, 16, seed=3)
    x = random(1, 12, 64, seed=1)
    # Each token is rounded by itself, so a text may be cut anywhere.
    for part in (slice(0, 5), slice(5, 12)):
        gradients(held, x[:, part].requires_grad_(), outer[:, part])
    _, whole = gradients(matrix(16, 64).as_leaf(), x.requires_grad_(), outer)
    assert held.leaf is not None and len(held.leaf.found) == 2
    assert torch.equal(held.leaf.gradient().multiplied(), whole)


def test_what_is_not_finite_stays_so() -> None:
    held, x = matrix(8, 32).as_leaf(), random(1, 4, 32, seed=1).requires_grad_()
    outer = random(1, 4, 8, seed=2)
    outer[0, 1, 3] = float("nan")
    of_x, of_matrix = gradients(held, x, outer)
    assert bool(of_x[0, 1].isnan().all()) and bool(of_x[0, 0].isfinite().all())
    assert bool(of_matrix[3].isnan().all()) and bool(of_matrix[2].isfinite().all())
    with torch.no_grad():
        x[0, 2, 5] = float("inf")
    assert not bool(held.product(x, None)[0, 2].isfinite().any())


@pytest.mark.parametrize("is_exact", [True, False])
def test_the_largest_products_are_exact(is_exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if is_exact and not coded_matrix._is_exact():
        pytest.skip("int8 products of this processor saturate, and are not used")
    monkeypatch.setattr(coded_matrix, "_is_exact", lambda: is_exact)
    a, b = (torch.full((5, 96), sign * 127, dtype=torch.int8) for sign in (1, -1))
    found: Tensor = integer_product(a, b.t())
    assert torch.equal(found.long(), torch.full((5, 5), -127 * 127 * 96))
