"""The table of formats on a real model."""

import math

import pytest
import torch
from benchmarks.formats import Bench, formats, table

from hikui.lowering.formats import Format, quantize_activation
from hikui.passes.quantise.rounding import dequantise, round_matrix
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("Once upon a time there was a dog.<|endoftext|>Lily went to the park with her mum.", "utf-8")
    return Bench(ROOT / "models" / "reference", [path], 2, 12)


def test_a_row_says_what_rounding_costs(bench: Bench) -> None:
    before = [linear.weight.detach().clone() for linear in bench.linears]
    assert "lm_head" not in {name.rpartition(".")[2] for name in bench.names}
    plain, same = bench.figures()
    assert same == pytest.approx(0, abs=1e-6) and plain > 0.1
    fmt = Format("int3", 32)
    row = bench.measure(fmt)
    assert all(torch.equal(linear.weight, held) for linear, held in zip(bench.linears, before, strict=True))
    rounded = [dequantise(round_matrix(weight, fmt), fmt) for weight in before]
    lost = sum(float((new - old).double().square().sum()) for new, old in zip(rounded, before, strict=True))
    whole = sum(float(weight.double().square().sum()) for weight in before)
    assert row.weight_error == pytest.approx(math.sqrt(lost / whole))
    assert row.true_bits == pytest.approx(3.5, abs=0.2)
    # The same by hand: the rounded matrices in the model, and the float model's figures to compare with.
    with torch.no_grad():
        for linear, new in zip(bench.linears, rounded, strict=True):
            linear.weight.copy_(new)
    assert bench.figures() == pytest.approx((row.bits_per_char, row.divergence))
    with torch.no_grad():
        for linear, old in zip(bench.linears, before, strict=True):
            linear.weight.copy_(old)
    assert row.divergence > 0 and row.divergence_a8 > 0
    assert row.bits_per_char != row.bits_per_char_a8


def test_int8_activations_reach_every_matrix_in_a_block(bench: Bench) -> None:
    seen = []
    hook = bench.linears[0].register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    bench.figures()
    bench.figures(int8=True)
    hook.remove()
    plain, quantised = seen[0], seen[len(seen) // 2]
    q, scale, _ = quantize_activation(plain)
    assert torch.equal(quantised, q[..., : plain.shape[-1]] * scale.unsqueeze(-1))
    assert not torch.equal(plain, quantised)


def test_the_rows_and_their_order() -> None:
    assert [str(fmt) for fmt in formats("int4,sign", "64,channel")] == [
        "int4-g64", "sign-g64", "int4-channel", "sign-channel",
    ]  # fmt: skip
    numbers = dict.fromkeys(("true_bits", "weight_error", "bits_per_char", "bits_per_char_a8", "divergence"), 1.0)
    head: dict[str, object] = {"model": "m", "tokens": 5, "pieces": 1, "float": 1.0, "float_a8": 1.5}
    rows: list[dict[str, object]] = [{"format": name, **numbers} for name in ("int4-channel", "int4-g64", "sign-g32")]
    lines = table(head, rows).splitlines()
    assert lines[0] == "m: 5 tokens of 1 documents; float 1.0000 bits per character, with int8 activations 1.5000."
    assert [line.split()[1] for line in lines[4:]] == ["sign-g32", "int4-g64", "int4-channel"]
