"""Products of the kernel library against references in integers and in float64."""

import random

import pytest
import torch
from torch import Tensor

from hikui.backends.kernels.replay import Recorded, Result
from hikui.lowering.formats import KINDS, Format, activation_k, pack, quantize_activation, unpack, unpack_codes

from .conftest import Runner, assert_done

choose = random.Random(7)
FORMATS = [f"{kind}-{group}" for kind in KINDS for group in ("g32", "g64", "g128", "channel")]
MIXED = [f"mixed-g{group}-c{columns}" for group, columns in ((32, 32), (64, 128), (128, 128), (128, 384))]

# M, N, K: remainders of the row tiles, of 16 output rows, of the streams, of 32 and 128 input columns.
SHAPES = [(1, 1, 7), (1, 16, 32), (1, 33, 172), (1, 129, 300), (1, 200, 512), (2, 17, 172), (3, 48, 128)]
SHAPES += [(4, 31, 40), (5, 100, 172), (8, 16, 160), (16, 20, 96), (17, 65, 257)]
MORE_SHAPES = [(m, 33, 172) for m in range(1, 18)]
MORE_SHAPES += [(choose.randint(1, 17), choose.randint(1, 150), choose.randint(1, 520)) for _ in range(20)]


def poisoned(m: int, n: int) -> Tensor:
    return torch.full((m, n), torch.nan)


def matrix(generator: torch.Generator, fmt: Format, n: int, k: int) -> tuple[Tensor, Tensor]:
    """Codes over the whole range of the format, its ends among them, and scales."""
    codes = torch.empty(n, k, dtype=torch.int8)
    for segment in fmt.segments(fmt.padded_k(k)):
        levels = torch.tensor(segment.format.levels, dtype=torch.int8)
        width = min(segment.stop, k) - segment.start
        if width <= 0:
            continue
        part = levels[torch.randint(0, len(levels), (n, width), generator=generator)]
        part[0, :] = levels[-1]
        part[-1, : width // 2] = levels[0]
        codes[:, segment.start : segment.start + width] = part
    return codes, torch.rand(n, fmt.groups(k), generator=generator) * 0.01 + 0.001


def assert_clean(result: Result, y: Tensor) -> None:
    assert_done(result)
    assert not y.isnan().any(), "the kernel left elements unwritten"


def terms(left: Tensor, right: Tensor) -> Tensor:
    """left · rightᵀ in float64, and the same with every term's magnitude: what rounding errors are measured against."""
    left, right = left.double(), right.double()
    return torch.stack((left @ right.T, left.abs() @ right.abs().T))


def assert_near(y: Tensor, reference: Tensor) -> None:
    value, magnitude = reference
    assert ((y - value).abs() <= 4e-7 * magnitude).all()


def fits(fmt: Format, k: int) -> bool:
    return not fmt.is_mixed or (fmt.columns is not None and fmt.columns <= fmt.padded_k(k))


def activations(generator: torch.Generator, m: int, k: int) -> Tensor:
    """Codes with the ends of their range, rows all alike, and rows of zeros with one outlier."""
    q = torch.zeros(m, activation_k(k), dtype=torch.int8)
    q[:, :k] = torch.randint(-127, 128, (m, k), generator=generator, dtype=torch.int8)
    q[0, :k] = 127
    q[-1, : k // 2] = -127
    if m > 2:
        q[1, :k] = -127
        q[2, :k] = 0
        q[2, k // 3] = 127
    return q


@pytest.mark.parametrize("name", FORMATS + MIXED)
def test_integer_products_are_exact(runner: Runner, name: str) -> None:
    """With scales that are powers of two every partial sum is exact in float32, so nothing may differ."""
    fmt = Format.parse(name)
    generator = torch.Generator().manual_seed(1)
    calls, references = [], []
    for m, n, k in SHAPES + MORE_SHAPES:
        if not fits(fmt, k):
            continue
        codes, _ = matrix(generator, fmt, n, k)
        q = activations(generator, m, k)
        sums = q.view(m, -1, 32).sum(-1, dtype=torch.int32)
        packed = pack(fmt, codes, torch.full((n, fmt.groups(k)), 0.5))
        assert packed.scale is not None
        q_scale = torch.full((m,), 2.0)
        arguments = (q, q_scale, sums, packed.weight, packed.scale, torch.empty(0), poisoned(m, n))
        calls.append(Recorded(f"hikui_linear_a8_{fmt.kind}", arguments))
        references.append(q[:, :k].long() @ codes.long().T)
    for result, reference in zip(runner.run(calls), references, strict=True):
        y = result.tensors[-1]
        assert_clean(result, y)
        assert torch.equal(y.double(), reference.double())


@pytest.mark.parametrize("name", FORMATS + MIXED)
def test_float_activations(runner: Runner, name: str) -> None:
    fmt = Format.parse(name)
    generator = torch.Generator().manual_seed(5)
    calls, references = [], []
    for i, (m, n, k) in enumerate(SHAPES):
        if not fits(fmt, k):
            continue
        codes, scale = matrix(generator, fmt, n, k)
        packed = pack(fmt, codes, scale)
        assert packed.scale is not None
        x = torch.randn(m, k, generator=generator)
        bias = torch.empty(0) if i % 2 else torch.randn(n, generator=generator)
        reference = terms(x, unpack(fmt, packed.weight, packed.scale, n, k))
        references.append(reference + terms(torch.ones(m, 1), bias.unsqueeze(1)) if bias.numel() else reference)
        arguments = (x, packed.weight, packed.scale, bias, poisoned(m, n))
        calls.append(Recorded(f"hikui_linear_{fmt.kind}", arguments))
    for result, reference in zip(runner.run(calls), references, strict=True):
        assert_clean(result, result.tensors[-1])
        assert_near(result.tensors[-1], reference)


@pytest.mark.parametrize("name", [f"{kind}-g{group}" for kind in KINDS for group in (96, 192)])
def test_groups_of_any_multiple_of_32(runner: Runner, name: str) -> None:
    """K of real models that 128 does not divide, and groups of 3, 5 and 6 steps; odd N, all sizes of rows."""
    fmt = Format.parse(name)
    generator = torch.Generator().manual_seed(9)
    calls, references = [], []
    for m, n, k in ((1, 33, 576), (1, 17, 1536), (3, 49, 576), (17, 19, 1536), (1, 5, 160), (18, 3, 570)):
        codes, _ = matrix(generator, fmt, n, k)
        # Float32 counts to 2²⁴: the widest codes take smaller activations.
        high = min(127, 2**24 // (k * max(map(abs, fmt.levels))))
        q = torch.zeros(m, activation_k(k), dtype=torch.int8)
        q[:, :k] = torch.randint(-high, high + 1, (m, k), generator=generator, dtype=torch.int8)
        q[0, :k], q[-1, : k // 2] = high, -high
        sums = q.view(m, -1, 32).sum(-1, dtype=torch.int32)
        scale = torch.exp2(torch.randint(-3, 1, (n, fmt.groups(k)), generator=generator).float())
        packed = pack(fmt, codes, scale)
        assert packed.scale is not None and packed.scale.shape[1] * fmt.group_size(k) >= k
        dense = unpack(fmt, packed.weight, packed.scale, n, k).double()
        quantised = (q, torch.ones(m), sums, packed.weight, packed.scale, torch.empty(0), poisoned(m, n))
        calls.append(Recorded(f"hikui_linear_a8_{fmt.kind}", quantised))
        x = torch.randn(m, k, generator=generator)
        calls.append(
            Recorded(f"hikui_linear_{fmt.kind}", (x, packed.weight, packed.scale, torch.empty(0), poisoned(m, n)))
        )
        references += [terms(q[:, :k], dense), terms(x, dense)]
    for result, reference in zip(runner.run(calls), references, strict=True):
        assert_clean(result, result.tensors[-1])
        assert_near(result.tensors[-1], reference)


@pytest.mark.parametrize("name", [f"{kind}-g64" for kind in KINDS] + ["int4-channel", "int8-g32", "mixed-g64-c128"])
@pytest.mark.parametrize("rank", [0, 1, 16, 21])
def test_scales_bias_and_branch(runner: Runner, name: str, rank: int) -> None:
    fmt, half = Format.parse(name), Format("float16")
    generator = torch.Generator().manual_seed(2)
    calls, references = [], []
    for i, (m, n, k) in enumerate(SHAPES):
        if not fits(fmt, k):
            continue
        codes, scale = matrix(generator, fmt, n, k)
        packed = pack(fmt, codes, scale)
        assert packed.scale is not None
        x = torch.randn(m, k, generator=generator)
        q, q_scale, sums = quantize_activation(x)
        bias = torch.randn(n, generator=generator) if i % 2 else torch.empty(0)
        weight = unpack(fmt, packed.weight, packed.scale, n, k)
        reference = terms(q_scale.double().unsqueeze(1) * q[:, :k], weight)
        if bias.numel():
            reference += terms(torch.ones(m, 1), bias.unsqueeze(1))
        common: tuple[Tensor, ...] = (q, q_scale, sums, packed.weight, packed.scale, bias)
        if rank:
            a = torch.randn(rank, k, generator=generator) * 0.1
            b = torch.randn(n, rank, generator=generator) * 0.1
            inner = terms(x, a.half())
            reference += torch.stack((inner[0] @ b.half().double().T, inner[1] @ b.half().double().abs().T))
            common += (x, pack(half, a).weight, pack(half, b).weight)
        symbol = f"hikui_linear_a8_branch_{fmt.kind}" if rank else f"hikui_linear_a8_{fmt.kind}"
        calls.append(Recorded(symbol, (*common, poisoned(m, n))))
        references.append(reference)
    for result, reference in zip(runner.run(calls), references, strict=True):
        assert_clean(result, result.tensors[-1])
        assert_near(result.tensors[-1], reference)


def test_ternary_sums_are_exact_up_to_the_widest_row_and_refused_beyond(runner: Runner) -> None:
    """The largest sum of all: where 256 times it is just below 2³¹."""
    fmt, calls = Format("ternary"), []
    for k, lines in ((32768, 1639), (32800, 1640)):
        weight = torch.full((1, lines, 16, 4), 127, dtype=torch.uint8)  # five ones a byte
        q = torch.zeros(1, activation_k(k), dtype=torch.int8)
        q[:, :k] = 127
        sums = q.view(1, -1, 32).sum(-1, dtype=torch.int32)
        scale, ones = torch.full((1, 1, 16), 2.0**-10).half(), torch.ones(1)
        calls.append(
            Recorded("hikui_linear_a8_ternary", (q, ones, sums, weight, scale, torch.empty(0), poisoned(1, 16)))
        )
        if k <= 32768:
            assert tuple(weight.shape) == fmt.weight_shape(16, k) and bool(
                (unpack_codes(fmt, weight, 16, k) == 1).all()
            )
    within, beyond = runner.run(calls)
    assert_clean(within, within.tensors[-1])
    assert torch.equal(within.tensors[-1].double(), torch.full((1, 16), 127 * 32768 / 1024, dtype=torch.float64))
    assert beyond.error == (
        "hikui_linear_a8_ternary: 32800 ternary columns under one scale are more than the 32768 that can be added up."
    )


@pytest.mark.parametrize("kind", ["float16", "float32"])
def test_float_weights(runner: Runner, kind: str) -> None:
    fmt = Format(kind)
    generator = torch.Generator().manual_seed(3)
    calls, references = [], []
    for i, (m, n, k) in enumerate(SHAPES):
        x = torch.randn(m, k, generator=generator)
        packed = pack(fmt, torch.randn(n, k, generator=generator))
        bias = torch.empty(0) if i % 2 else torch.randn(n, generator=generator)
        reference = terms(x, unpack(fmt, packed.weight, None, n, k))
        references.append(reference + terms(torch.ones(m, 1), bias.unsqueeze(1)) if bias.numel() else reference)
        calls.append(Recorded(f"hikui_linear_{kind}", (x, packed.weight, bias, poisoned(m, n))))
    for result, reference in zip(runner.run(calls), references, strict=True):
        assert_clean(result, result.tensors[-1])
        assert_near(result.tensors[-1], reference)


@pytest.mark.parametrize("m", [1, 6, 19])
def test_threads_and_alignment_change_no_bit(runner: Runner, m: int) -> None:
    """Large enough to be cut into tasks; leading dimensions are rows; misaligned tensors are read all the same."""
    generator = torch.Generator().manual_seed(4)
    n, k, rank = 600, 768, 16
    half = Format("float16")
    branch = [pack(half, torch.randn(*shape, generator=generator)).weight for shape in ((rank, k), (n, rank))]
    poison = torch.full((1, m, n), torch.nan)
    calls = []
    for fmt in (*(Format(kind, 64) for kind in KINDS), Format("mixed", 64, 192)):
        kind = fmt.kind
        codes, scale = matrix(generator, fmt, n, k)
        packed = pack(fmt, codes, scale)
        assert packed.scale is not None
        x = torch.randn(1, m, k, generator=generator)
        common = (*quantize_activation(x), packed.weight, packed.scale, torch.randn(n, generator=generator))
        calls.append(Recorded(f"hikui_linear_a8_{kind}", (*common, poison)))
        calls.append(Recorded(f"hikui_linear_a8_branch_{kind}", (*common, x, *branch, poison)))
        calls.append(Recorded(f"hikui_linear_{kind}", (x, *common[3:], poison)))
        weight = pack(Format("float32"), torch.randn(n, k, generator=generator)).weight
        calls.append(Recorded("hikui_linear_float32", (x, weight, torch.empty(0), poison)))
    expected = runner.run(calls)
    for result in expected:
        assert_clean(result, result.tensors[-1])
    shifted = [Recorded(call.symbol, call.arguments, misalignment=4) for call in calls]
    for other in (*(runner.run(calls, threads=threads) for threads in (2, 3, 4)), runner.run(shifted)):
        for result, reference in zip(other, expected, strict=True):
            assert_clean(result, result.tensors[-1])
            assert torch.equal(result.tensors[-1], reference.tensors[-1])
