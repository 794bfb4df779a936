"""Rotary embedding and attention against float64."""

import pytest
import torch
import torch.nn.functional as F

import hikui.lowering.ir.dialect  # noqa: F401
from hikui.backends.kernels.replay import Recorded
from hikui.lowering.formats import dequantize_cache, quantize_cache

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


def quantised_cache(fmt: str, past: torch.Tensor, context: int) -> list[torch.Tensor]:
    """Codes and scales of a cache that holds tokens [1, KV, past, D]; what follows them must not matter."""
    codes, scale = quantize_cache(past, fmt)
    room = context - past.shape[2]
    filler = torch.randint(0, 127, (*codes.shape[:2], room, codes.shape[3]), dtype=codes.dtype)
    return [
        torch.cat((codes, filler), 2),
        torch.cat((scale, torch.full((*scale.shape[:2], room), torch.nan)), 2).half(),
    ]


def tokens_of(generator: torch.Generator, heads: int, tokens: int, size: int) -> torch.Tensor:
    """Rows of very different sizes, some of them nothing, near nothing, or more than a half times 127 can be."""
    x = torch.randn(1, heads, tokens, size, generator=generator)
    x = x * 10 ** torch.randint(-3, 2, (1, heads, tokens, 1), generator=generator)
    x[:, 0, 0] *= torch.tensor([0.0, 1e-7, 1.0])[int(torch.randint(0, 3, (1,), generator=generator))]
    return x


@pytest.mark.parametrize("fmt", ["int8", "int4"])
def test_attention_over_a_quantised_cache(runner: Runner, fmt: str) -> None:
    """Codes and scales to the bit, the result against float64 over what they stand for."""
    generator = torch.Generator().manual_seed(3)
    calls, references = [], []
    for heads, kv_heads, tokens, context, past, size in CASES:
        q = torch.randn(1, heads, tokens, size, generator=generator)
        k, v = (tokens_of(generator, kv_heads, tokens, size) for _ in range(2))
        before = [tokens_of(generator, kv_heads, past, size) if past else k[:, :, :0] for _ in range(2)]
        keys, values = (quantised_cache(fmt, held, context) for held in before)
        scale = size**-0.5
        arguments = (
            q,
            k,
            v,
            keys[0],
            values[0],
            keys[1],
            values[1],
            torch.tensor([past]),
            scale,
            torch.full_like(q, torch.nan),
        )
        calls.append(Recorded(f"hikui_attention_{fmt}", arguments))
        wanted, seen = [keys[0].clone(), values[0].clone(), keys[1].clone(), values[1].clone()], []
        for at, new in enumerate((k, v)):
            codes, scales = quantize_cache(new, fmt)
            wanted[at][:, :, past : past + tokens], wanted[2 + at][:, :, past : past + tokens] = codes, scales
            whole = dequantize_cache(wanted[at], wanted[2 + at])[:, :, : past + tokens].double()
            seen.append(whole.repeat_interleave(heads // kv_heads, 1))
        mask = torch.arange(past + tokens) <= past + torch.arange(tokens).unsqueeze(1)
        attended = F.scaled_dot_product_attention(q.double(), seen[0], seen[1], attn_mask=mask, scale=scale)
        references.append((wanted, attended, float(seen[0].abs().max()), float(seen[1].abs().max())))
    expected = runner.run(calls)
    for result, (wanted, attended, largest_key, largest) in zip(expected, references, strict=True):
        assert_done(result)
        for found, due in zip(result.tensors[3:7], wanted, strict=True):
            assert torch.equal(found.view(torch.uint8), due.view(torch.uint8))
        # The error of a score, and with it the relative one of a weight, grows with the keys.
        tolerance = 3e-6 * (1 + largest_key)
        torch.testing.assert_close(result.tensors[-1].double(), attended, rtol=1e-5, atol=tolerance * max(1.0, largest))
    for result, reference in zip(runner.run(calls, threads=2), expected, strict=True):
        assert torch.equal(result.tensors[-1], reference.tensors[-1])


@pytest.mark.parametrize("fmt", ["int8", "int4"])
def test_a_quantised_cache_is_updated_and_read(runner: Runner, fmt: str) -> None:
    """To the bit, and zero where no token is."""
    generator = torch.Generator().manual_seed(4)
    calls, references = [], []
    for _, heads, tokens, context, past, size in CASES:
        codes, scale = quantised_cache(fmt, tokens_of(generator, heads, past + 1, size)[:, :, :past], context)
        new = tokens_of(generator, heads, tokens, size)
        values = torch.full((1, heads, context, size), torch.nan)
        calls.append(Recorded(f"hikui_cache_update_{fmt}", (codes, scale, new, torch.tensor([past]), values)))
        references.append(torch.ops.hikui.cache_update_quantized(codes, scale, new, torch.tensor([past])))
    for threads in (1, 2):
        for result, (values, codes, scale) in zip(runner.run(calls, threads), references, strict=True):
            assert_done(result)
            assert torch.equal(result.tensors[0], codes)
            assert torch.equal(result.tensors[1].view(torch.int16), scale.view(torch.int16))
            assert torch.equal(result.tensors[-1], values)
