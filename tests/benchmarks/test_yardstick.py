"""The texts and the table of `benchmarks.yardstick`; what it runs is tested where it is made."""

import json
import lzma
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from benchmarks import yardstick

from hikui.lowering.artefact.text import SEPARATOR


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Two domains of many short paragraphs, in documents of ten."""
    for domain in ("one", "two"):
        paragraphs = [f"{domain} {number} " + "word " * 60 for number in range(400)]
        documents = ["\n".join(paragraphs[at : at + 10]) for at in range(0, 400, 10)]
        text = f"\n{SEPARATOR}\n".join(documents)
        (tmp_path / f"valid.{domain}.txt").write_text(text)
        (tmp_path / f"train.{domain}.txt.xz").write_bytes(lzma.compress(text.upper().encode()))
    return tmp_path


def test_pieces_are_as_many_of_each_domain_begin_at_paragraphs_and_hold_no_separator(corpus: Path) -> None:
    found = yardstick.pieces(corpus, 6)
    assert [piece.split()[0] for piece in found] == ["one"] * 3 + ["two"] * 3
    assert all(piece.split()[1].isdigit() and SEPARATOR not in piece for piece in found)
    assert {len(piece) for piece in found} == {yardstick.CHARACTERS}
    assert len(set(found)) == 6


def test_results_of_another_text_are_not_mixed_in(corpus: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    for _ in range(2):
        yardstick.settle(text, "one")
    with pytest.raises(SystemExit, match="give another --work"):
        yardstick.settle(text, "two")
    assert text.read_text() == "one"


def test_the_mixture_takes_domains_in_turn_and_is_the_same_every_time(corpus: Path) -> None:
    found = yardstick.mixture(corpus, each=3)
    assert [document.split()[0] for document in found] == ["ONE", "TWO"] * 3
    assert found == yardstick.mixture(corpus, each=3)


def test_a_subset_is_spread_over_its_file(tmp_path: Path) -> None:
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    whole.write_text("".join(f"{number}\n" for number in range(100)))
    yardstick.subset(whole, 4, part)
    assert part.read_text().split() == ["0", "25", "50", "75"]
    yardstick.subset(whole, 1000, part)
    assert part.read_text() == whole.read_text()


def test_the_table_relates_each_recipe_to_the_float_model() -> None:
    quality = {"bits_per_char": 1.0, "tokens_per_second": 9.4}
    against = {"difference": 0.02, "difference_error": 0.001, "divergence": 0.05, "agreement": 0.9}
    found: dict[str, dict[str, Any]] = {
        "float": {"quality": quality, "artefact_bytes": 4e6, "tasks": {"piqa": {"acc": 0.7, "acc_error": 0.02}}},
        "int4": {
            "quality": {**quality, "bits_per_char": 1.02, "block_bpw": 4.25, "all_bpw": 5.1, "against": against},
            "artefact_bytes": 1e6,
            "lower_seconds": 12.3,
            "lower_peak_bytes": 1.5e9,
            "tasks": {"piqa": {"acc": 0.6, "acc_error": 0.02}},
        },
    }
    head, rule, plain, row = yardstick.table(found)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == [
        "int4", "4.250", "5.100", "1.0", "1.0200", "+2.00 ± 0.10 %", "0.0500", "90.0 %", "0.600 ± 0.020 (0.50)", "9",
        "12", "1.50",
    ]  # fmt: skip
    assert head.count("|") == rule.count("|") == plain.count("|") == row.count("|")


def test_bits_of_a_file_count_what_its_tensors_take(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float16))
    writer.add_tensor("blk.0.attn_norm.weight", np.zeros(32, np.float32))
    codes = gguf.quantize(np.zeros((2, 32), np.float32), gguf.GGMLQuantizationType.Q4_0)
    writer.add_tensor("blk.0.attn_q.weight", codes, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = yardstick.file_bits(path)
    assert found == {"block_bpw": 4.5, "all_bpw": (128 * 16 + 32 * 32 + 64 * 4.5) / (128 + 32 + 64)}


def test_a_file_is_measured_once_with_the_size_that_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, ...]] = []

    def command(*arguments: str, out: Path | None = None) -> tuple[float, int]:
        calls.append(arguments)
        assert out is not None
        out.write_text(json.dumps({"bits_per_char": 1.0, "block_bpw": 32.0}))
        return 1.5, 100

    monkeypatch.setattr(yardstick, "command", command)
    monkeypatch.setattr(yardstick, "file_bits", lambda path: {"block_bpw": 4.5, "all_bpw": 5.0})
    path = tmp_path / "model.gguf"
    path.write_bytes(b"12345")
    found = yardstick.measure_file(path, tmp_path)
    assert found == {"quality": {"bits_per_char": 1.0, "block_bpw": 4.5, "all_bpw": 5.0}, "artefact_bytes": 5}
    assert yardstick.measure_file(path, tmp_path) == found and len(calls) == 1


def test_what_was_measured_before_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, ...]] = []

    def command(*arguments: str, out: Path | None = None) -> tuple[float, int]:
        calls.append(arguments)
        if arguments[0] == "lower":
            (Path(arguments[-1])).mkdir()
        else:
            assert out is not None
            out.write_text(json.dumps({"bits_per_char": 1.0}))
        return 1.5, 100

    monkeypatch.setattr(yardstick, "command", command)
    first = yardstick.measure("model", "gptq-4bit", tmp_path, [])
    assert [arguments[0] for arguments in calls] == ["lower", "eval"]
    assert "--calibration" in calls[0] and "--against" in calls[1]
    assert first["lower_seconds"] == 1.5
    assert yardstick.measure("model", "gptq-4bit", tmp_path, []) == first
    assert len(calls) == 2
    yardstick.measure("model", "int4", tmp_path, [])
    assert "--calibration" not in calls[2]


@pytest.mark.parametrize(
    ("recipe", "name"),
    [("int4", "int4"), ("edge-1.6bit", "edge-1.6bit"), ("variants/edge-1.6bit.yaml", "edge-1.6bit"), ("a.b", "a.b")],
)
def test_a_recipe_is_called_by_its_whole_name(recipe: str, name: str) -> None:
    assert yardstick.label(recipe) == name
