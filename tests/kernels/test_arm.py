"""What only the ARM kernels have: tables and tiles made of activations, and the estimates of their benchmark."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from benchmarks.arm import cycles

from hikui.backends.kernels.replay import Machine, Recorded
from hikui.lowering.formats import Format, activation_k, pack

from .conftest import ARM_CPUS, assert_done


def exact_call(generator: torch.Generator, fmt: Format, m: int, n: int, k: int) -> tuple[Recorded, torch.Tensor]:
    """A product whose every partial sum is exact in float32, and its result."""
    parts = [
        torch.tensor(segment.format.levels, dtype=torch.int8)[
            torch.randint(0, len(segment.format.levels), (n, segment.stop - segment.start), generator=generator)
        ]
        for segment in fmt.segments(k)
    ]
    codes = torch.cat(parts, 1)
    codes[0, :] = torch.cat([part.max().expand(part.shape[1]) for part in parts])
    q = torch.zeros(m, activation_k(k), dtype=torch.int8)
    q[:, :k] = torch.randint(-127, 128, (m, k), generator=generator, dtype=torch.int8)
    q[0, :k], q[-1, :k] = 127, -127
    packed = pack(fmt, codes, torch.full((n, fmt.groups(k)), 0.5))
    assert packed.scale is not None
    sums = q.view(m, -1, 32).sum(-1, dtype=torch.int32)
    poisoned = torch.full((m, n), torch.nan)
    arguments = (q, torch.full((m,), 2.0), sums, packed.weight, packed.scale, torch.empty(0), poisoned)
    return Recorded(f"hikui_linear_a8_{fmt.kind}", arguments), q[:, :k].long() @ codes.long().T


@pytest.mark.parametrize("isa", ARM_CPUS)
@pytest.mark.parametrize("name", ["sign-g128", "sign-channel", "int4-g32", "int8-g64", "mixed-g64-c64", "nf4-g128"])
def test_any_number_of_rows_fills_tiles(arm: Callable[[str], Machine], isa: str, name: str) -> None:
    """Around every multiple of a tile's rows; the activations beyond the last row are whatever memory held."""
    fmt = Format.parse(name)
    generator = torch.Generator().manual_seed(1)
    cases = [exact_call(generator, fmt, m, 37, 200) for m in (2, 3, 4, 5, 9, 15, 16, 17, 23, 24, 25, 33)]
    for result, (_, reference) in zip(arm(ARM_CPUS[isa]).run([call for call, _ in cases], isa), cases, strict=True):
        assert_done(result)
        assert torch.equal(result.tensors[-1].double(), reference.double())


@pytest.mark.parametrize("isa", ARM_CPUS)
@pytest.mark.parametrize("kind", ["sign", "int2", "int3", "int4", "int8"])
def test_a_channel_may_be_longer_than_small_sums_hold(arm: Callable[[str], Machine], isa: str, kind: str) -> None:
    """128 steps of 32 columns are what 16 bits hold the looked-up sums of; all activations are at an end of int8."""
    fmt = Format(kind)
    generator = torch.Generator().manual_seed(2)
    k = 4096 * 2 + 32 if kind == "int8" else 4096 * 4 + 96
    q = torch.full((1, activation_k(k)), 127, dtype=torch.int8)
    q[:, k:] = 0
    levels = torch.tensor(fmt.levels, dtype=torch.int8)
    codes = levels[torch.randint(0, len(levels), (16, k), generator=generator)]
    codes[0, :], codes[1, :] = levels[-1], levels[0]
    packed = pack(fmt, codes, torch.full((16, 1), 1.0))
    assert packed.scale is not None
    sums = q.view(1, -1, 32).sum(-1, dtype=torch.int32)
    poisoned = torch.full((1, 16), torch.nan)
    arguments = (q, torch.ones(1), sums, packed.weight, packed.scale, torch.empty(0), poisoned)
    (result,) = arm(ARM_CPUS[isa]).run([Recorded(f"hikui_linear_a8_{kind}", arguments)], isa)
    assert_done(result)
    reference = (q[:, :k].long() @ codes.long().T).double()
    if kind == "int8":
        # Beyond 24 bits the sum is exact in int32, and is rounded once when it becomes a float.
        reference = reference.float().double()
    assert torch.equal(result.tensors[-1].double(), reference)


def test_the_inner_loop_is_the_one_that_computes_most(monkeypatch: pytest.MonkeyPatch) -> None:
    listing = [
        (0x00, "movi v0.2d, #0x0"),
        (0x04, "ldr q1, [x0], #16"),
        (0x08, "sdot v0.4s, v1.16b, v2.4b[0]"),
        (0x0C, "sdot v3.4s, v1.16b, v2.4b[1]"),
        (0x10, "b.ne 4 <kernel+0x4>"),
        (0x14, "sdot v0.4s, v1.16b, v2.4b[0]"),
        (0x18, "b.ne 14 <kernel+0x14>"),
        (0x1C, "cbnz x3, 0 <kernel>"),
    ]
    monkeypatch.setattr(cycles, "_instructions", lambda path, symbol: listing)
    loop = cycles.inner_loop(Path("kernel.o"), "kernel")
    assert loop.macs == 32
    assert loop.instructions == [text for _, text in listing[1:5]]


def test_a_loop_has_an_estimate() -> None:
    if shutil.which("llvm-mca") is None:
        pytest.skip("llvm-mca is not installed")
    loop = cycles.Loop(
        ["ldr q1, [x0], #16", "smlal v0.8h, v1.8b, v2.8b", "subs x1, x1, #0x1", "b.ne 4 <kernel+0x4>"], 8
    )
    for model in cycles.MODELS:
        assert 0.05 < cycles.cycles_per_mac(loop, model) < 2


def test_without_products_there_is_no_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        cycles, "_instructions", lambda path, symbol: [(0, "subs x1, x1, #0x1"), (4, "b.ne 0 <kernel>")]
    )
    with pytest.raises(cycles.UnestimatedError, match="no loop with products"):
        cycles.inner_loop(Path("kernel.o"), "kernel")
