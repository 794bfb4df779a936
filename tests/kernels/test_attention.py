"""Rotary embedding and attention against float64."""

import torch
import torch.nn.functional as F

from hikui.backends.kernels.replay import Recorded

from .conftest import Runner, assert_done

# heads, key-value heads, tokens, context, past, size
CASES = [
    (1, 1, 1, 1, 0, 8),
    (8, 4, 1, 16, 3, 8),
    (4, 4, 7, 9, 2, 12),
    (6, 2, 5, 200, 100, 64),
    (2, 1, 70, 70, 0, 32),
    (3, 3, 1, 130, 129, 6),
    (4, 2, 66, 300, 64, 40),
]


def test_rotary(runner: Runner) -> None:
    generator = torch.Generator().manual_seed(1)
    calls, references = [], []
    for heads, _, tokens, _, _, size in CASES:
        x = torch.randn(1, heads, tokens, size, generator=generator)
        cos, sin = (torch.randn(1, tokens, size, generator=generator) for _ in range(2))
        rotated = torch.cat((-x[..., size // 2 :], x[..., : size // 2]), dim=-1)
        references.append(x.double() * cos.double() + rotated.double() * sin.double())
        calls.append(Recorded("hikui_rotary", (x, cos, sin, torch.full_like(x, torch.nan)), misalignment=4))
    for result, reference in zip(runner.run(calls), references, strict=True):
        assert_done(result)
        torch.testing.assert_close(result.tensors[-1].double(), reference, rtol=1e-6, atol=1e-6)


def test_attention(runner: Runner) -> None:
    """What lies in the caches beyond the last token must not matter: it is NaN here."""
    generator = torch.Generator().manual_seed(2)
    calls, references = [], []
    for heads, kv_heads, tokens, context, past, size in CASES:
        q = torch.randn(1, heads, tokens, size, generator=generator) * 3
        k, v = (torch.randn(1, kv_heads, tokens, size, generator=generator) for _ in range(2))
        caches = [torch.full((1, kv_heads, context, size), torch.nan) for _ in range(2)]
        for cache in caches:
            cache[:, :, :past] = torch.randn(1, kv_heads, past, size, generator=generator)
        scale = size**-0.5
        out = torch.full_like(q, torch.nan)
        calls.append(Recorded("hikui_attention", (q, k, v, *caches, torch.tensor([past]), scale, out)))
        wanted = [cache.clone() for cache in caches]
        for cache, new in zip(wanted, (k, v), strict=True):
            cache[:, :, past : past + tokens] = new
        keys, values = (
            cache[:, :, : past + tokens].double().repeat_interleave(heads // kv_heads, 1) for cache in wanted
        )
        mask = torch.arange(past + tokens) <= past + torch.arange(tokens).unsqueeze(1)
        attended = F.scaled_dot_product_attention(q.double(), keys, values, attn_mask=mask, scale=scale)
        references.append((wanted, attended))
    expected = runner.run(calls)
    for result, ((keys, values), attended) in zip(expected, references, strict=True):
        assert_done(result)
        assert torch.equal(result.tensors[3].view(torch.int32), keys.view(torch.int32))
        assert torch.equal(result.tensors[4].view(torch.int32), values.view(torch.int32))
        torch.testing.assert_close(result.tensors[-1].double(), attended, rtol=1e-5, atol=3e-6)
    for result, reference in zip(runner.run(calls, threads=2), expected, strict=True):
        assert torch.equal(result.tensors[-1], reference.tensors[-1])
