"""Look-ups in packed matrices: bit for bit what the reference dequantises, and refused where an id is no row."""

import random
import re

import pytest
import torch
from torch import Tensor

from hikui.backends.kernels.replay import Recorded
from hikui.lowering.formats import KINDS, Format, pack, unpack
from hikui.lowering.formats.packing import Packed

from .conftest import Runner
from .test_linear import assert_clean, matrix

choose = random.Random(3)
FORMATS = [f"{kind}-{group}" for kind in KINDS for group in ("g32", "g64", "g128", "channel")] + ["float16", "float32"]
# Rows and columns: remainders of blocks, of steps of 32 columns and of groups.
SHAPES = [(1, 1), (15, 7), (16, 32), (17, 33), (40, 100), (33, 172), (100, 257)]
SHAPES += [(choose.randint(1, 90), choose.randint(1, 400)) for _ in range(8)]


def table(generator: torch.Generator, fmt: Format, rows: int, columns: int) -> Packed:
    if fmt.is_integer:
        return pack(fmt, *matrix(generator, fmt, rows, columns))
    values = torch.randn(rows, columns, generator=generator)
    values[0, :: max(1, columns // 3)] = 3e-8  # below what float16 holds as a normal number
    values[-1, 0] = -0.0
    return pack(fmt, values)


def call(fmt: Format, packed: Packed, ids: Tensor, rows: int, columns: int) -> Recorded:
    scales = () if packed.scale is None else (packed.scale,)
    y = torch.full((*ids.shape, columns), torch.nan)
    return Recorded(f"hikui_embedding_{fmt.kind}", (ids, packed.weight, *scales, rows, y))


@pytest.mark.parametrize("name", FORMATS)
def test_rows_are_those_of_the_reference(runner: Runner, name: str) -> None:
    fmt = Format.parse(name)
    generator = torch.Generator().manual_seed(4)
    calls, due = [], []
    for rows, columns in SHAPES:
        packed = table(generator, fmt, rows, columns)
        dense = unpack(fmt, packed.weight, packed.scale, rows, columns)
        for ids in (torch.arange(rows), torch.randint(0, rows, (1, 5), generator=generator), torch.tensor([rows - 1])):
            calls.append(call(fmt, packed, ids, rows, columns))
            due.append(dense[ids])
    for threads in (1, 3):
        for result, want in zip(runner.run(calls, threads), due, strict=True):
            assert_clean(result, result.tensors[-1])
            assert torch.equal(result.tensors[-1].view(torch.int32), want.view(torch.int32)), "down to the sign of zero"


@pytest.mark.parametrize("name", ["sign-g32", "int4-g64", "int8-channel", "float16"])
def test_an_id_that_is_no_row_is_refused(runner: Runner, name: str) -> None:
    fmt = Format.parse(name)
    packed = table(torch.Generator().manual_seed(5), fmt, 37, 64)
    # Rows 37 … 47 are in the last block, as padding.
    for wrong in (-1, 37, 47, 48, 2**62, -(2**63)):
        (result,) = runner.run([call(fmt, packed, torch.tensor([[3, wrong]]), 37, 64)])
        assert result.error == f"hikui_embedding_{fmt.kind}: id {wrong} is none of the 37 rows."
        assert result.whole and bool(result.tensors[-1].isnan().all()), "nothing was written"


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        (0, "rows must be a positive whole number"),
        (2.5, "rows must be a positive whole number"),
        (float("nan"), "rows must be a positive whole number"),
        (49, r"weight must be packed as \[4, \*, 16, 4\]"),
    ],
)
def test_other_numbers_of_rows_are_refused(runner: Runner, rows: float, error: str) -> None:
    fmt = Format.parse("int4-g32")
    packed = table(torch.Generator().manual_seed(6), fmt, 48, 64)
    arguments = (torch.tensor([1]), packed.weight, packed.scale, rows, torch.full((1, 64), torch.nan))
    (result,) = runner.run([Recorded("hikui_embedding_int4", arguments)])  # type: ignore[arg-type]
    assert re.search(error, result.error)
    assert bool(result.tensors[-1].isnan().all())
