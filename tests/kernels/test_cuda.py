"""The CUDA kernels: their numbers, by emulation on the host, and their compilation for every architecture."""

import re
import shutil
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hikui.backends.kernels.cuda import launch
from hikui.backends.kernels.cuda.build import ARCHITECTURES, build_fatbin, cuda_source, resources
from hikui.backends.kernels.cuda.kernels import DENSE, KINDS, QUANTIZERS, makers
from hikui.lowering.formats import Format, activation_k, pack, quantize_activation, quantize_activation_static, unpack

from .cuda_emulation import FATBIN_MAGIC, Emulator, emulator

__all__ = ["emulator"]

# M, N, K: remainders of the tiles of 1, 4 and 8 rows, of 16 output rows, of 32 and 128 columns, of the 64 steps that a
# block of threads takes at once and of the several turns that kernels with few bits ask for ahead.
SHAPES = [(1, 1, 7), (1, 33, 172), (1, 40, 2100), (3, 17, 300), (4, 16, 32), (7, 20, 96), (9, 31, 257), (17, 5, 128)]
SHAPES += [(1, 17, 576), (5, 3, 1536)]


def formats(kind: str, k: int) -> list[Format]:
    if kind != "mixed":
        return [Format(kind, group) for group in (32, 64, 96, 128, 192, None)]
    return [Format(kind, group, columns) for group, columns in ((32, 32), (64, 128), (128, 128)) if columns <= k]


def poisoned(m: int, n: int) -> Tensor:
    return torch.full((m, n), torch.nan)


def matrix(generator: torch.Generator, fmt: Format, n: int, k: int) -> Tensor:
    """Codes over the whole range of the format, its ends among them."""
    codes = torch.empty(n, k, dtype=torch.int8)
    for segment in fmt.segments(k):
        levels = torch.tensor(segment.format.levels, dtype=torch.int8)
        part = levels[torch.randint(len(levels), (n, segment.stop - segment.start), generator=generator)]
        part[0] = levels[-1]
        part[-1, : k // 2] = levels[0]
        codes[:, segment.start : segment.stop] = part
    return codes


def terms(left: Tensor, right: Tensor) -> Tensor:
    """left · rightᵀ in float64, and the same with every term's magnitude: what rounding errors are measured against."""
    left, right = left.double(), right.double()
    return torch.stack((left @ right.T, left.abs() @ right.abs().T))


def assert_near(y: Tensor, reference: Tensor) -> None:
    assert not y.isnan().any(), "the kernel left elements unwritten"
    value, magnitude = reference
    assert ((y - value).abs() <= 1e-6 * magnitude).all()


@pytest.mark.parametrize("kind", KINDS)
def test_integer_products_are_exact(emulator: Emulator, kind: str) -> None:
    """With scales that are powers of two every partial sum is exact in float32, so nothing may differ."""
    generator = torch.Generator().manual_seed(1)
    for m, n, k in SHAPES:
        for fmt in formats(kind, k):
            codes = matrix(generator, fmt, n, k)
            # Float32 counts to 2²⁴: the widest codes take smaller activations.
            high = min(127, 2**24 // (k * max(map(abs, fmt.levels))))
            q = torch.zeros(m, activation_k(k), dtype=torch.int8)
            q[:, :k] = torch.randint(-high, high + 1, (m, k), generator=generator, dtype=torch.int8)
            q[0, :k] = high
            q[-1, : k // 2] = -high
            sums = q.view(m, -1, 32).sum(-1, dtype=torch.int32)
            packed = pack(fmt, codes, torch.full((n, fmt.groups(k)), 0.5))
            assert packed.scale is not None
            two = torch.full((m,), 2.0)
            call = launch.integer(kind, q, two, sums, packed.weight, packed.scale, torch.empty(0), poisoned(m, n))
            y = emulator.run(call)[-1]
            assert torch.equal(y.double(), (q[:, :k].long() @ codes.long().T).double())


@given(st.integers(1, 2**26 - 1), st.data())
@settings(max_examples=300, deadline=None)
def test_the_group_of_a_step_is_exact(steps: int, data: st.DataObject) -> None:
    """As `block.group_of` computes it from the factor, wherever the loader lets a matrix through."""
    width = data.draw(st.integers(1, min(steps, (2**31 - 1) // steps)))
    groups = max(1, steps // width)
    whole = groups * width
    factor = launch._factor(whole, groups) & 0xFFFFFFFF
    step = data.draw(st.integers(0, whole - 1) | st.sampled_from([0, whole - 1, max(0, whole - width - 1)]))
    assert ((2 * step) * factor) >> 32 == (0 if groups == 1 else step // width)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [0, 21, 70])
def test_scales_bias_and_branch(emulator: Emulator, kind: str, rank: int) -> None:
    half = Format("float16")
    generator = torch.Generator().manual_seed(2)
    for i, (m, n, k) in enumerate(SHAPES):
        choice = formats(kind, k)
        if not choice:
            continue
        fmt = choice[i % len(choice)]
        scale = torch.rand(n, fmt.groups(k), generator=generator) * 0.01 + 0.001
        packed = pack(fmt, matrix(generator, fmt, n, k), scale)
        assert packed.scale is not None
        x = torch.randn(m, k, generator=generator)
        q, q_scale, sums = quantize_activation(x)
        bias = torch.randn(n, generator=generator) if i % 2 else torch.empty(0)
        weight = unpack(fmt, packed.weight, packed.scale, n, k)
        reference = terms(q_scale.double().unsqueeze(1) * q[:, :k], weight)
        if bias.numel():
            reference += terms(torch.ones(m, 1), bias.unsqueeze(1))
        branch: tuple[Tensor, ...] = ()
        if rank:
            a = torch.randn(rank, k, generator=generator) * 0.1
            b = torch.randn(n, rank, generator=generator) * 0.1
            inner = terms(x, a.half())
            reference += torch.stack((inner[0] @ b.half().double().T, inner[1] @ b.half().double().abs().T))
            call = launch.dense("float16", x, pack(half, a).weight, torch.empty(0), poisoned(m, rank))
            branch = (pack(half, b).weight, emulator.run(call)[-1])
        arguments = (q, q_scale, sums, packed.weight, packed.scale, bias, poisoned(m, n), *branch)
        assert_near(emulator.run(launch.integer(kind, *arguments))[-1], reference)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_float_activations(emulator: Emulator, kind: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    for i, (m, n, k) in enumerate(SHAPES):
        for fmt in formats(kind, k):
            packed = pack(fmt, matrix(generator, fmt, n, k), torch.rand(n, fmt.groups(k), generator=generator) + 0.1)
            assert packed.scale is not None
            x = torch.randn(m, k, generator=generator).to(dtype)
            bias = torch.empty(0) if i % 2 else torch.randn(n, generator=generator)
            reference = terms(x, unpack(fmt, packed.weight, packed.scale, n, k))
            if bias.numel():
                reference += terms(torch.ones(m, 1), bias.unsqueeze(1))
            call = launch.weight_only(kind, x, packed.weight, packed.scale, bias, poisoned(m, n))
            assert_near(emulator.run(call)[-1], reference)


@pytest.mark.parametrize("kind", DENSE)
def test_float_weights(emulator: Emulator, kind: str) -> None:
    fmt = Format(kind)
    generator = torch.Generator().manual_seed(4)
    for i, (m, n, k) in enumerate(SHAPES):
        x = torch.randn(m, k, generator=generator)
        packed = pack(fmt, torch.randn(n, k, generator=generator))
        bias = torch.empty(0) if i % 2 else torch.randn(n, generator=generator)
        reference = terms(x, unpack(fmt, packed.weight, None, n, k))
        if bias.numel():
            reference += terms(torch.ones(m, 1), bias.unsqueeze(1))
        assert_near(emulator.run(launch.dense(kind, x, packed.weight, bias, poisoned(m, n)))[-1], reference)


@pytest.mark.parametrize("suffix", QUANTIZERS)
def test_quantised_activations(emulator: Emulator, suffix: str) -> None:
    generator = torch.Generator().manual_seed(5)
    for m, k in ((1, 7), (3, 172), (2, 128), (6, 300), (1, 2100)):
        x = torch.randn(m, k, generator=generator)
        if m == 6:
            x[0], x[1], x[2] = 0.0, 1e30, -3.0
            x[3, 1:] *= 1e-6
            x[4] = 0.0
            x[4, ::2] = 1e-42
        step = torch.tensor([0.01])
        if suffix == "_static":
            expected = quantize_activation_static(x, step)
        else:
            # Where 127/max is infinite, a zero stays a zero.
            expected = quantize_activation(torch.where(x.abs() < 1e-38, x * 1e38, x), 4 if suffix else 8)
        q = torch.full((m, activation_k(k)), 99, dtype=torch.int8)
        sums = torch.full((m, activation_k(k) // 32), -1, dtype=torch.int32)
        call = launch.quantize_activation(x, q, torch.full((m,), torch.nan), sums, suffix, step)
        *_, q, scale, sums = emulator.run(call)
        assert torch.equal(q, expected[0]) and torch.equal(sums, expected[2])
        plain = [row for row in range(m) if m != 6 or row != 4]
        assert torch.equal(scale[plain], expected[1][plain])


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_compiles_for_every_architecture(tmp_path: Path) -> None:
    path = build_fatbin(ARCHITECTURES, tmp_path)
    assert path.read_bytes()[:4] == FATBIN_MAGIC, "not a fatbin"
    reports = resources(ARCHITECTURES)
    assert {(report.kernel, report.architecture) for report in reports} == set(product(makers(), ARCHITECTURES))
    # The widest kernel, mixed with 8 rows, reads one 8-byte value again each turn of its first loop.
    assert not [report for report in reports if report.spilled > 16], "registers are kept in memory"


def test_every_kernel_is_in_the_source() -> None:
    assert set(re.findall(r"__launch_bounds__\(256\) (\w+)\([^)]*\) {", cuda_source())) == set(makers())
