"""What the table of the quantisers says of its runs."""

from benchmarks.quantisers import report, surprises


def row(method: str, qep: bool, bits: float, *, model: str = "small", group: int = 64) -> dict[str, object]:
    named = {"model": model, "documents": 20, "method": method, "qep": qep, "bits": 3, "group": group}
    return {**named, "bits_per_char": bits, "float_bits_per_char": 1.0}


def test_models_are_kept_apart_and_seeds_are_put_together() -> None:
    rows = [row("gptq", False, bits) for bits in (1.1, 1.2)] + [row("gptq", False, 3.0, model="other", group=0)]
    text = report(rows)
    assert "| gptq | +0.1500 ± 0.0707 |" in text and "| gptq | +2.0000 |" in text
    assert text.index("## other") < text.index("## small") and "3 bits, channel" in text


def test_only_differences_beyond_the_spread_are_surprises() -> None:
    rows = [row("rtn, minmax", False, 1.10), *(row("gptq", False, bits) for bits in (1.115, 1.135))]
    assert surprises(rows) == []
    assert surprises([*rows, row("gptq, mse, act order", False, 1.5)]) == [
        "3 bits, g64: gptq, mse, act order +0.5000 is worse than gptq +0.1250"
    ]
    assert surprises([*rows, row("rtn, minmax", True, 1.2)]) == [
        "3 bits, g64: rtn, minmax, QEP +0.2000 is worse than rtn, minmax +0.1000"
    ]
