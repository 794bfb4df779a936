"""Checkpoint files: every way to store one, and every way to spoil one."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from hikui.lowering.checkpoint.container import read_safetensors
from hikui.lowering.checkpoint.folder import Checkpoint, Float32Tensor, check_finite
from hikui.lowering.errors import HikuiError
from hikui.lowering.ir.store import MemoryTensor, TensorSource, WeightStore
from hikui.lowering.trace import trace
from hikui.models.synthetic import TINY_VOCABULARY, tiny_checkpoint, tiny_model

from .conftest import float_logits, random_tokens, run_in_steps

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
QUERY = "model.layers.1.self_attn.q_proj.weight"


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def refusal(folder: Path) -> str:
    with pytest.raises(HikuiError) as caught:
        trace(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ── what can be read ────────────────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=30, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=5),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8]),
)
def test_safetensors_are_read_as_the_library_reads_them(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[list[int]], dtype: torch.dtype
) -> None:
    path = tmp_path_factory.mktemp("safetensors") / "t.safetensors"
    generator = torch.Generator().manual_seed(len(shapes))
    tensors = {f"t{i}": torch.randn(shape, generator=generator).mul(9).to(dtype) for i, shape in enumerate(shapes)}
    save_file(tensors, path)
    for key, source in read_safetensors(path).items():
        loaded = source.load()
        assert loaded.dtype == dtype
        assert torch.equal(loaded, tensors.pop(key))
    assert not tensors


def test_shards(tmp_path: Path) -> None:
    model: Any = tiny_model("llama")
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert (tmp_path / INDEX).is_file()
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    store = trace(tmp_path).store
    for name, parameter in model.named_parameters():
        assert torch.equal(store.load(name), parameter)


def test_pickles(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / WEIGHTS)
    torch.save({key: value.bfloat16() for key, value in tensors.items()}, checkpoint / "pytorch_model.bin")
    (checkpoint / WEIGHTS).unlink()
    store = trace(checkpoint).store
    assert torch.equal(store.load(QUERY), tensors[QUERY].bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floats_are_widened_or_narrowed_to_float32(checkpoint: Path, dtype: torch.dtype) -> None:
    wanted = load_file(checkpoint / WEIGHTS)[QUERY].to(dtype)
    rewrite(checkpoint, lambda tensors: tensors.update({QUERY: wanted}))
    source = Checkpoint.open(checkpoint).source(QUERY, QUERY, tuple(wanted.shape))
    assert source.info.dtype == torch.float32
    assert torch.equal(source.load(), wanted.float())


def test_a_checkpoint_of_the_base_model(tmp_path: Path) -> None:
    model: Any = tiny_model("gpt2")
    model.transformer.save_pretrained(tmp_path)
    assert "wte.weight" in read_safetensors(tmp_path / WEIGHTS)
    tokens = random_tokens(TINY_VOCABULARY, 20)
    got = run_in_steps(trace(tmp_path), tokens, [20])
    assert (got - float_logits(model, tokens)).abs().max() <= 1e-5


def test_a_tied_head_stored_twice_stays_tied(tmp_path: Path) -> None:
    folder = tiny_checkpoint("qwen2", tmp_path)
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert "lm_head.weight" not in trace(folder).store


def test_a_tied_head_stored_with_other_values_is_untied(tmp_path: Path) -> None:
    folder = tiny_checkpoint("qwen2", tmp_path)
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] * 2}))
    program = trace(folder)
    tokens = random_tokens(TINY_VOCABULARY, 10)
    got = run_in_steps(program, tokens, [10])
    assert "lm_head.weight" in program.store
    assert (got - 2 * float_logits(tiny_model("qwen2"), tokens)).abs().max() <= 1e-5


# ── what is damaged ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_no_folder(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "absent")


def test_hub_id_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(HikuiError, match="There is no folder nobody/nothing, and the hub did not give it: "):
        trace("nobody/nothing")


def test_no_config(checkpoint: Path) -> None:
    (checkpoint / "config.json").unlink()
    assert "has no config.json" in refusal(checkpoint)


def test_an_adapter_without_its_model(checkpoint: Path) -> None:
    (checkpoint / "config.json").rename(checkpoint / "adapter_config.json")
    assert "holds an adapter (adapter_config.json)" in refusal(checkpoint)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("model.gguf", b"GGUF\x03", "is truncated: its header goes on for 4 bytes from byte 4"),
        ("renamed.bin", b"GGUF\x03", "is truncated: its header goes on for 4 bytes from byte 4"),
        ("other.gguf", b"PK\x03\x04", "is no GGUF file: it does not begin with the bytes GGUF."),
        (WEIGHTS, None, "is a file of weights alone; give the Hugging Face folder with config.json"),
        ("notes.txt", b"", "is a file; give the Hugging Face folder"),
    ],
)
def test_a_file_instead_of_a_folder(checkpoint: Path, name: str, content: bytes | None, words: str) -> None:
    if content is not None:
        (checkpoint / name).write_bytes(content)
    assert f"{name} {words}" in refusal(checkpoint / name)


def test_config_that_is_not_json(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text("{")
    assert "config.json is not valid JSON" in refusal(checkpoint)


def test_config_of_an_unknown_type(checkpoint: Path) -> None:
    edit_json(checkpoint / "config.json", model_type="never-heard-of", architectures=None)
    assert "transformers rejects" in refusal(checkpoint)


def test_config_of_an_encoder_decoder(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text(json.dumps({"model_type": "t5"}))
    assert "'t5' is an encoder-decoder" in refusal(checkpoint)


def test_quantised_checkpoint(checkpoint: Path) -> None:
    edit_json(checkpoint / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    assert "already quantised (gptq)" in refusal(checkpoint)


def test_no_weights(checkpoint: Path) -> None:
    (checkpoint / WEIGHTS).unlink()
    assert "has no weights" in refusal(checkpoint)


def test_truncated_data(checkpoint: Path) -> None:
    data = (checkpoint / WEIGHTS).read_bytes()
    (checkpoint / WEIGHTS).write_bytes(data[:-1000])
    assert f"truncated: {len(data)} bytes are expected, {len(data) - 1000} found" in refusal(checkpoint)


@pytest.mark.parametrize(("size", "words"), [(0, "0 bytes do not hold"), (5, "5 bytes do not hold"), (100, "has 100")])
def test_truncated_header(checkpoint: Path, size: int, words: str) -> None:
    (checkpoint / WEIGHTS).write_bytes((checkpoint / WEIGHTS).read_bytes()[:size])
    message = refusal(checkpoint)
    assert "truncated" in message
    assert words in message


def test_trailing_bytes(checkpoint: Path) -> None:
    with (checkpoint / WEIGHTS).open("ab") as file:
        file.write(b"x")
    assert "corrupt" in refusal(checkpoint)


@pytest.mark.parametrize("length", [7, 1 << 40])
def test_wrong_header_length(checkpoint: Path, length: int) -> None:
    data = (checkpoint / WEIGHTS).read_bytes()
    (checkpoint / WEIGHTS).write_bytes(struct.pack("<Q", length) + data[8:])
    assert WEIGHTS in refusal(checkpoint)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 15]}, "'t' (F32 [2, 2]) takes 16 bytes"),
        ({"dtype": "F32", "shape": [2, -2], "data_offsets": [0, 16]}, "corrupt"),
        ({"dtype": "F32", "shape": [2, 2], "data_offsets": [16, 32]}, "truncated: 32"),
        ({"dtype": "F8_E4M3", "shape": [16], "data_offsets": [0, 16]}, "dtype F8_E4M3"),
        ({"shape": [2, 2]}, "entry of 't' is malformed"),
        (3, "entry of 't' is malformed"),
    ],
)
def test_malformed_header_entries(tmp_path: Path, entry: object, words: str) -> None:
    header = json.dumps({"t": entry}).encode()
    path = tmp_path / "t.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    with pytest.raises(HikuiError) as caught:
        read_safetensors(path)
    # Offsets count from the end of the header.
    assert words.replace("truncated: 32", f"truncated: {8 + len(header) + 32}") in str(caught.value)


def test_missing_tensor(checkpoint: Path) -> None:
    rewrite(checkpoint, lambda tensors: tensors.__delitem__(QUERY))
    assert f"has no tensor for '{QUERY}'" in refusal(checkpoint)


def saved(family: str, folder: Path) -> Any:
    config = AutoConfig.for_model(
        family, vocab_size=TINY_VOCABULARY, hidden_size=48, intermediate_size=92, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder)
    return model


def test_experts_that_transformers_fuses_on_load(tmp_path: Path) -> None:
    saved("mixtral", tmp_path)
    message = refusal(tmp_path)
    assert "fuses a mixture's experts when it loads them, and hikui does not support mixtures yet" in message
    assert "fetch" not in message


def test_a_head_that_transformers_renames_on_load(tmp_path: Path) -> None:
    model = saved("gpt_neox", tmp_path)
    assert "embed_out.weight" in read_safetensors(tmp_path / WEIGHTS)
    tokens = random_tokens(TINY_VOCABULARY, 20)
    got = run_in_steps(trace(tmp_path), tokens, [20])
    assert (got - float_logits(model, tokens)).abs().max() <= 1e-5


def test_several_missing_tensors(checkpoint: Path) -> None:
    edit_json(checkpoint / "config.json", num_hidden_layers=4)
    assert "and 8 more" in refusal(checkpoint)


def test_tensor_of_the_wrong_shape(checkpoint: Path) -> None:
    rewrite(checkpoint, lambda tensors: tensors.update({QUERY: torch.zeros(48, 40)}))
    message = refusal(checkpoint)
    assert QUERY in message
    assert "[48, 40]" in message
    assert "[48, 48]" in message


def test_index_that_names_an_absent_shard(tmp_path: Path) -> None:
    model: Any = tiny_model("llama")
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    assert f"names the shard {shard.name}, which is not in" in refusal(tmp_path)


def test_index_that_leads_out_of_the_folder(checkpoint: Path) -> None:
    (checkpoint / INDEX).write_text(json.dumps({"weight_map": {QUERY: "../other/model.safetensors"}}))
    assert "names the shard ../other/model.safetensors" in refusal(checkpoint)


def test_index_that_misplaces_a_tensor(checkpoint: Path) -> None:
    (checkpoint / INDEX).write_text(json.dumps({"weight_map": {"nobody.weight": WEIGHTS}}))
    assert "'nobody.weight'" in refusal(checkpoint)


def test_index_without_a_map(checkpoint: Path) -> None:
    (checkpoint / INDEX).write_text("{}")
    assert "no usable 'weight_map'" in refusal(checkpoint)


@pytest.mark.parametrize("keep", [0, 400, -3000])
def test_damaged_pickle(checkpoint: Path, keep: int) -> None:
    torch.save(load_file(checkpoint / WEIGHTS), checkpoint / "pytorch_model.bin")
    (checkpoint / WEIGHTS).unlink()
    data = (checkpoint / "pytorch_model.bin").read_bytes()
    (checkpoint / "pytorch_model.bin").write_bytes(data[:keep])
    assert "pytorch_model.bin cannot be read" in refusal(checkpoint)


def test_pickle_that_runs_code(checkpoint: Path, tmp_path: Path) -> None:
    victim = tmp_path / "touched"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (victim,)

    torch.save({"x": Evil()}, checkpoint / "pytorch_model.bin")
    (checkpoint / WEIGHTS).unlink()
    assert "pytorch_model.bin cannot be read" in refusal(checkpoint)
    assert not victim.exists()


@pytest.mark.parametrize(("value", "words"), [(float("nan"), "2 NaN and 0 infinite"), (float("-inf"), "0 NaN and 2")])
def test_weights_that_are_not_finite(checkpoint: Path, value: float, words: str) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[QUERY][3, 5] = tensors[QUERY][-1, -1] = value

    rewrite(checkpoint, spoil)
    message = refusal(checkpoint)
    assert words in message
    assert QUERY in message
    assert trace(checkpoint, finite=False).store.load(QUERY).isfinite().logical_not().sum() == 2


def test_finite_check_looks_at_every_piece() -> None:
    values = torch.zeros((1 << 22) + 3)
    store = WeightStore({"fine": MemoryTensor(values.long()), "late": Float32Tensor(MemoryTensor(values.double()))})
    check_finite(store)
    values[-1] = float("inf")
    store.alias("late", MemoryTensor(values.bfloat16()))
    with pytest.raises(HikuiError, match="'late' holds 0 NaN and 1 infinite"):
        check_finite(store)


def test_finite_check_of_a_large_file(tmp_path: Path) -> None:
    values = torch.zeros((1 << 23) + 5, dtype=torch.bfloat16)
    values[-1] = float("nan")
    save_file({"wide": values}, tmp_path / "t.safetensors")
    sources: dict[str, TensorSource] = {**read_safetensors(tmp_path / "t.safetensors")}
    with pytest.raises(HikuiError, match="'wide' holds 1 NaN"):
        check_finite(WeightStore(sources))
