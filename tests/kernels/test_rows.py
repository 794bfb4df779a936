"""Quantisation, norm, SwiGLU and their fused forms against the formats' reference and float64."""

import torch
import torch.nn.functional as F
from torch import Tensor

from hikui.backends.kernels.replay import Recorded
from hikui.lowering.formats import activation_k, quantize_activation, quantize_activation_static

from .conftest import Runner, assert_done

SHAPES = [(1, 1), (1, 8), (1, 31), (2, 64), (3, 172), (5, 300), (17, 129), (1, 2048), (70, 260)]
EPS = 1e-5


def outputs(m: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Poisoned places for q, scale and sums."""
    padded = activation_k(k)
    poison = (m, padded // 32)
    return (
        torch.full((m, padded), 99, dtype=torch.int8),
        torch.full((m,), torch.nan),
        torch.full(poison, -12345, dtype=torch.int32),
    )


def assert_quantized(tensors: tuple[Tensor, ...], x: Tensor) -> None:
    """Bit for bit what the reference makes of x."""
    for given, reference in zip(tensors, quantize_activation(x), strict=True):
        assert torch.equal(given, reference)


def test_quantize_activation(runner: Runner) -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(m, k, generator=generator) * 10.0 ** (i - 4) for i, (m, k) in enumerate(SHAPES)]
    inputs[4][1] = 0.0  # a row of zeros
    inputs[5][2, 299] = -1e4  # the largest in the tail
    # Ties: max 127 makes the factor one, and halves go to the even neighbour.
    inputs.append(torch.cat([torch.arange(-126, 127) + 0.5, torch.tensor([127.0])]).unsqueeze(0))
    calls = [Recorded("hikui_quantize_activation", (x, *outputs(*x.shape))) for x in inputs]
    for threads in (1, 2):
        for result, x in zip(runner.run(calls, threads), inputs, strict=True):
            assert_done(result)
            assert_quantized(result.tensors[1:], x)


def adversarial(k: int) -> Tensor:
    """All alike, ±max, zeros, one outlier, denormals, and magnitudes whose inverse is not finite."""
    x = torch.ones(7, k)
    x[1] = torch.where(torch.arange(k) % 2 == 0, 3.0e38, -3.0e38)
    x[2] = 0
    x[3] = 1e-3
    x[3, k // 2] = 1e4
    x[4] = 1e-42
    x[5] = torch.linspace(-1e-37, 1e-37, k)
    x[6] = torch.linspace(-1e-30, 1e-30, k)
    return x


def test_quantisers_of_activations(runner: Runner) -> None:
    generator = torch.Generator().manual_seed(4)
    inputs = [torch.randn(m, k, generator=generator) for m, k in SHAPES] + [adversarial(200), adversarial(32)]
    step = torch.tensor([0.0123])
    symbols = ("hikui_quantize_activation", "hikui_quantize_activation_int4", "hikui_quantize_activation_static")
    calls = [
        Recorded(symbol, (x, *((step,) if "static" in symbol else ()), *outputs(*x.shape)))
        for x in inputs
        for symbol in symbols
    ]
    calls.append(Recorded(symbols[2], (inputs[0], torch.zeros(1), *outputs(*inputs[0].shape))))
    results = runner.run(calls)
    for i, x in enumerate(inputs):
        references = (quantize_activation(x), quantize_activation(x, 4), quantize_activation_static(x, step))
        for result, reference in zip(results[3 * i : 3 * i + 3], references, strict=True):
            assert_done(result)
            for given, wanted in zip(result.tensors[-3:], reference, strict=True):
                assert torch.equal(given, wanted)
    assert not results[-1].tensors[2].any()


def test_rms_norm(runner: Runner) -> None:
    generator = torch.Generator().manual_seed(2)
    calls, references = [], []
    for m, k in SHAPES:
        x, weight = torch.randn(m, k, generator=generator) * 3, torch.randn(k, generator=generator)
        wide = x.double()
        references.append(wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double())
        calls.append(Recorded("hikui_rms_norm", (x, weight, EPS, torch.full((m, k), torch.nan)), misalignment=4))
        calls.append(
            Recorded("hikui_rms_norm_quantize", (x, weight, EPS, torch.full((m, k), torch.nan), *outputs(m, k)))
        )
    results = runner.run(calls)
    for plain, fused, reference in zip(results[0::2], results[1::2], references, strict=True):
        assert_done(plain)
        assert_done(fused)
        torch.testing.assert_close(plain.tensors[2].double(), reference, rtol=2e-6, atol=1e-9)
        assert torch.equal(plain.tensors[2], fused.tensors[2])
        assert_quantized(fused.tensors[3:], fused.tensors[2])


def test_swiglu(runner: Runner) -> None:
    generator = torch.Generator().manual_seed(3)
    calls, references = [], []
    for m, k in SHAPES:
        gate, up = torch.randn(m, k, generator=generator) * 20, torch.randn(m, k, generator=generator)
        gate[0, : k // 2] *= 10  # beyond where e^-gate leaves float32
        references.append(F.silu(gate.double()) * up.double())
        calls.append(Recorded("hikui_swiglu", (gate, up, torch.full((m, k), torch.nan)), misalignment=4))
        calls.append(Recorded("hikui_swiglu_quantize", (gate, up, torch.full((m, k), torch.nan), *outputs(m, k))))
    results = runner.run(calls)
    for plain, fused, reference in zip(results[0::2], results[1::2], references, strict=True):
        assert_done(plain)
        assert_done(fused)
        torch.testing.assert_close(plain.tensors[2].double(), reference, rtol=2e-6, atol=1e-30)
        assert torch.equal(plain.tensors[2], fused.tensors[2])
        assert_quantized(fused.tensors[3:], fused.tensors[2])
