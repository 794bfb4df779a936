"""Attention without the keys that no query sees."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hikui.lowering.ir.attention import attend


def operands(tokens: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens * 100 + keys)
    return tuple(torch.randn(1, 3, count, 8, generator=generator) for count in (tokens, keys, keys))  # type: ignore[return-value]


def causal(tokens: int, keys: int, past: int) -> Tensor:
    return torch.arange(keys) <= past + torch.arange(tokens)[:, None]


def as_floats(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))


@pytest.mark.parametrize("past", [0, 5, 12])
@pytest.mark.parametrize("form", [torch.Tensor.bool, as_floats])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_gives_what_torch_gives(past: int, form: Callable[[Tensor], Tensor], scale: float | None) -> None:
    query, key, value = operands(4, 16)
    mask = form(causal(4, 16, past))[None, None]
    want = F.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), as_floats(causal(4, 16, past)).double(), scale=scale
    )
    torch.testing.assert_close(attend(query, key, value, mask, scale=scale), want.float(), rtol=1e-5, atol=1e-6)


def test_a_mask_with_a_hole_keeps_what_is_behind_it() -> None:
    query, key, value = operands(2, 9)
    mask = torch.tensor([[1, 0, 0, 1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0, 1, 0, 0]]).bool()
    want = F.scaled_dot_product_attention(query, key, value, mask)
    torch.testing.assert_close(attend(query, key, value, mask), want)


def test_what_nobody_sees_is_not_read() -> None:
    """Torch multiplies it by zero."""
    query, key, value = operands(4, 16)
    value[:, :, 4:] = float("nan")
    mask = as_floats(causal(4, 16, 0))
    assert F.scaled_dot_product_attention(query, key, value, mask).isnan().any()
    assert attend(query, key, value, mask).isfinite().all()


def test_gradients_are_those_of_torch() -> None:
    found = []
    for function in (F.scaled_dot_product_attention, attend):
        query, key, value = leaves = [operand.requires_grad_() for operand in operands(4, 16)]
        function(query, key, value, as_floats(causal(4, 16, 2))).square().sum().backward()
        found.append([leaf.grad for leaf in leaves])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("mask", "is_causal"), [(None, False), (None, True), (torch.ones(4, 1).bool(), False)])
def test_what_needs_no_cut_is_torch(mask: Tensor | None, is_causal: bool) -> None:
    query, key, value = operands(4, 4)
    want = F.scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal)
    assert torch.equal(attend(query, key, value, mask, is_causal=is_causal), want)
