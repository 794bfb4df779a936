"""Synthetic checkpoints, and the memory that tracing one takes."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hikui.lowering.checkpoint.folder import Checkpoint
from hikui.lowering.errors import HikuiError, UsageError
from hikui.lowering.trace import trace
from hikui.models.synthetic import (
    FAMILIES,
    PRESETS,
    TINY_VOCABULARY,
    LlamaShape,
    main,
    tiny_checkpoint,
    tiny_model,
    write_llama,
)

from .conftest import float_logits, random_tokens, run_in_steps

SHAPE = LlamaShape(64, 172, 2, 4, 2, 300, 128, tie_word_embeddings=True)

TRACED_PEAK = """
import resource, sys
from hikui.lowering.trace import trace
peaks = []
for folder in sys.argv[1:]:
    trace(folder)
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(peaks[1] - peaks[0])
"""


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_models_are_deterministic_and_leave_the_global_generator(family: str) -> None:
    before = torch.random.get_rng_state()
    first, again, other = (dict(tiny_model(family, seed).named_parameters()) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_unknown_family() -> None:
    with pytest.raises(UsageError, match="choose one of bloom, gpt2"):
        tiny_model("gpt5")


def test_tokenizer_round_trip(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint("llama", tmp_path))
    text = "Once upon a time,\n  there was 1 cat."
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == 0
    assert max(ids) < TINY_VOCABULARY
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_written_checkpoint_loads_in_transformers_and_traces_alike(tmp_path: Path) -> None:
    total = write_llama(SHAPE, tmp_path, shard_bytes=40_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == total
    tokens = random_tokens(SHAPE.vocab_size, 32)
    got = run_in_steps(trace(tmp_path), tokens, [24] + [1] * 8)
    assert (got - float_logits(model, tokens)).abs().max() <= 1e-5


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_llama(SHAPE, tmp_path / name, seed)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)
    weights = next(name for name in files if name.endswith(".safetensors"))
    assert (tmp_path / "a" / weights).read_bytes() != (tmp_path / "c" / weights).read_bytes()


@pytest.mark.parametrize(("preset", "low", "high"), [("llama-1b", 1.0e9, 1.3e9), ("llama-7b", 6.6e9, 6.9e9)])
def test_presets_have_their_size(preset: str, low: float, high: float) -> None:
    assert low < sum(torch.Size(shape).numel() for _, shape in PRESETS[preset].tensors()) < high


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(PRESETS, "llama-1b", replace(SHAPE, num_hidden_layers=9))
    assert main(["llama-1b", str(tmp_path), "--layers", "1"]) == 0
    assert "parameters" in capsys.readouterr().out
    assert json.loads((tmp_path / "config.json").read_text())["num_hidden_layers"] == 1
    assert "model.layers.1.mlp.up_proj.weight" not in Checkpoint.open(tmp_path).tensors


def test_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HikuiError, match="cannot be written"):
        write_llama(SHAPE, tmp_path / "file" / "inside")


def test_tracing_holds_no_weights(tmp_path: Path) -> None:
    shape = LlamaShape(1024, 2816, 4, 16, 4, 32000, 256, tie_word_embeddings=False)
    total = write_llama(shape, tmp_path / "large")
    write_llama(SHAPE, tmp_path / "small")
    arguments = [sys.executable, "-c", TRACED_PEAK, str(tmp_path / "small"), str(tmp_path / "large")]
    result = subprocess.run(arguments, capture_output=True, text=True, check=True)
    kibibytes = int(result.stdout)
    assert kibibytes * 1024 < total  # the float32 weights would take four times that
