"""Our contestants, the operands they are timed with, and `hikui bench`."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.kernels.contestant import Workload
from benchmarks.kernels.ours import BRANCH_KINDS, KINDS, RANK, Product, Quantisation, library

from hikui.backends import measurement
from hikui.backends.kernels import SYMBOLS
from hikui.backends.kernels.standalone import Library, link
from hikui.backends.measurement import Operands, format_of
from hikui.lowering.app.cli import run
from hikui.lowering.artefact.target import resolve
from hikui.lowering.formats import quantize_activation, unpack, unpack_codes


def present(kind: str) -> str:
    if f"hikui_linear_a8_{kind}" not in SYMBOLS:
        pytest.skip(f"there is no kernel for {kind}")
    return kind


@pytest.mark.parametrize("kind", KINDS)
def test_random_operands_are_valid_and_use_every_level(kind: str) -> None:
    fmt = format_of(kind, 1024)
    operands = Operands.random(fmt, 2, 48, 1024, 3)
    assert len(operands.weights) == 3
    assert len({weight.weight.data_ptr() for weight in operands.weights}) == 3
    for weight in operands.weights:
        assert tuple(weight.weight.shape) == fmt.weight_shape(48, 1024)
        codes = unpack_codes(fmt, weight.weight, 48, 1024)
        assert torch.equal(codes[:16], codes[32:])
        for part in fmt.segments(1024):
            found = set(codes[:, part.start : part.stop].flatten().tolist())
            assert found <= set(part.format.levels) and (len(found) > 200 or found == set(part.format.levels))


def test_a_mixed_matrix_has_about_1_6_bits() -> None:
    for k in (4096, 11008):
        assert format_of("mixed", k).true_bits(4096, k) - 16 / 128 == pytest.approx(1.57, abs=0.03)


@pytest.mark.parametrize("m", [1, 3, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_our_products_are_right(kind: str, m: int) -> None:
    workload = Workload(m, 96, 1024, 1, False)
    prepared = Product(present(kind)).prepare(workload)
    (step,) = prepared.steps
    step()
    assert prepared.result is not None
    operands = Operands.random(format_of(kind, 1024), m, 96, 1024, 1)
    weight = unpack(operands.fmt, *operands.weights[0], 96, 1024).double()
    q, scale, _ = quantize_activation(operands.x)
    expected = q[:, :1024].double() * scale[:, None].double() @ weight.T
    np.testing.assert_allclose(prepared.result(), expected.numpy(), rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", BRANCH_KINDS)
def test_the_branch_gives_the_same_fused_and_separate(kind: str) -> None:
    workload = Workload(1, 96, 1024, 1, False)
    results = []
    for way in ("fused", "separate", ""):
        prepared = Product(present(kind), way).prepare(workload)
        prepared.steps[0]()
        assert prepared.result is not None
        results.append(prepared.result().copy())
        assert prepared.bits == pytest.approx(
            format_of(kind, 1024).true_bits(96, 1024) + (16 * RANK * (96 + 1024) / (96 * 1024) if way else 0)
        )
    np.testing.assert_allclose(results[0], results[1], rtol=1e-4, atol=1e-4)
    assert np.abs(results[0] - results[2]).max() > 1e-3


def test_quantisation_alone() -> None:
    (step,) = Quantisation().prepare(Workload(1, 96, 1024, 1, False)).steps
    step()
    assert library().isa()


def test_two_threads_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for threads in (1, 2):
        prepared = Product("int4").prepare(Workload(1, 4096, 1024, threads, False))
        prepared.steps[0]()
        assert prepared.result is not None
        results.append(prepared.result().copy())
    assert np.array_equal(results[0], results[1])


def test_the_library_says_which_kernels_it_uses(tmp_path: Path) -> None:
    target = resolve("host")
    found = Library(link(target.triple, target.isas, tmp_path / "kernels.so"))
    uses = measurement.describe(found)
    assert {use.size for use in uses} == set(measurement.ROWS_OF_SIZE)
    assert {f"hikui_linear_a8_{use.kind}" for use in uses} <= set(SYMBOLS)
    timing = measurement.measure(found, uses[0], 64, 256)
    assert timing.gmacs > 0 and timing.gbs > 0 and timing.kernel == uses[0].kernel


def test_hikui_bench(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurement, "_SECONDS", 0.0)
    monkeypatch.setattr(measurement, "_WALK_BYTES", 1)
    assert run(["bench", "--rows", "64", "--columns", "256", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {product["m"] for product in found["products"]} == {1, 8, 64}
    assert any(product["format"] == "int4-g128" for product in found["products"])
    assert run(["bench", "--rows", "64", "--columns", "256"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(found["isa"]) and "int4-g128" in text
    assert run(["bench", "--rows", "50"]) == 2
