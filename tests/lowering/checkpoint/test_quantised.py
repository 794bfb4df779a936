"""Checkpoints of GPTQ and AWQ: every layout against integers packed bit by bit, and what is refused."""

import json
import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hikui.lowering.app.assemble import checkpoint_hashes
from hikui.lowering.checkpoint.folder import Checkpoint, check_finite
from hikui.lowering.checkpoint.quantised_matrix import QuantisedMatrix, unpack_fields
from hikui.lowering.errors import HikuiError
from hikui.lowering.ir.interpreter import Interpreter
from hikui.lowering.ir.program import Program
from hikui.lowering.ir.store import WeightStore
from hikui.lowering.trace import trace

from .quantised_folders import (
    WEIGHTS,
    Grid,
    awq,
    awq_config,
    edit_config,
    gptq,
    gptq_config,
    interleaved,
    random_grid,
    write_matrices,
    write_model,
)


def opened(folder: Path) -> WeightStore:
    return WeightStore(dict(Checkpoint.open(folder).tensors))


def refusal(folder: Path) -> str:
    with pytest.raises(HikuiError) as caught:
        store = opened(folder)
        check_finite(store)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def assert_holds(folder: Path, name: str, grid: Grid) -> None:
    """The source gives the matrix, whole and in parts, and survives a pickle."""
    store, want = opened(folder), grid.matrix()
    key, n = f"{name}.weight", want.shape[0]
    assert store.info(key).dtype == torch.float32
    assert store.info(key).shape == want.shape
    assert torch.equal(store.load(key), want)
    for start, stop in ((0, 1), (5, 14), (n - 3, n)):
        assert torch.equal(store.load_rows(key, start, stop), want[start:stop])
    again = pickle.loads(pickle.dumps(store.source(key)))
    assert torch.equal(again.rows(3, 20).rows(2, 9).load(), want[5:12])


# ── what is read ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq(tmp_path: Path, bits: int, version: str, symmetric: bool, act_order: bool) -> None:
    grid = random_grid(32, 96, bits=bits, symmetric=symmetric, act_order=act_order, seed=bits)
    parts = gptq(grid, stored_less=1 if version == "gptq" else 0)
    config = gptq_config(bits, checkpoint_format=version, sym=symmetric, desc_act=act_order)
    assert_holds(write_matrices(tmp_path, config, {"a.b": parts}), "a.b", grid)


@pytest.mark.parametrize("group", [32, -1])
def test_gptq_without_g_idx(tmp_path: Path, group: int) -> None:
    grid = random_grid(32, 96, group=group)
    folder = write_matrices(tmp_path, gptq_config(4, group), {"a": gptq(grid, with_g_idx=False)})
    assert_holds(folder, "a", grid)


@pytest.mark.parametrize("symmetric", [False, True])
def test_awq(tmp_path: Path, symmetric: bool) -> None:
    grid = random_grid(24, 96, symmetric=symmetric)
    assert_holds(write_matrices(tmp_path, awq_config(), {"a": awq(grid)}), "a", grid)


def test_the_words_of_three_bits_as_the_first_packer_wrote_them() -> None:
    """32 fields in three words: ten and two bits of one, one bit of it, ten and one bit of the next, two bits, ten."""
    fields = [int(value) for value in np.random.default_rng(3).integers(0, 8, 32)]
    words = [0, 0, 0]
    for index in range(10):
        words[0] |= fields[index] << (3 * index)
        words[1] |= fields[11 + index] << (3 * index + 1)
        words[2] |= fields[22 + index] << (3 * index + 2)
    words[0] |= (fields[10] & 3) << 30
    words[1] |= fields[10] >> 2 | (fields[21] & 1) << 31
    words[2] |= fields[21] >> 1
    held = torch.tensor(words, dtype=torch.int64).to(torch.int32)[:, None]
    assert unpack_fields(held, 3)[:, 0].tolist() == fields


def test_zeros_taken_down_a_word_at_a_time(tmp_path: Path) -> None:
    """GPTQModel subtracts 1 from all fields of a word at once, so that a zero of 0 borrows from its neighbour."""
    grid = random_grid(32, 64, symmetric=False)
    grid.zeros[::5] = 0
    parts = gptq(grid, stored_less=0)
    parts["qzeros"] = parts["qzeros"] - 0x11111111
    config = gptq_config(sym=False, meta={"quantizer": ["gptqmodel:1.4.0"]})
    assert_holds(write_matrices(tmp_path, config, {"a": parts}), "a", grid)


def test_modules_that_differ_in_bits_and_groups(tmp_path: Path) -> None:
    first, second = random_grid(32, 64), random_grid(32, 64, bits=8, group=64)
    config = gptq_config(dynamic={"+:b": {"bits": 8, "group_size": 64}})
    folder = write_matrices(tmp_path, config, {"a": gptq(first), "b": gptq(second)})
    assert_holds(folder, "a", first)
    assert_holds(folder, "b", second)
    edit_config(folder, quantization_config=gptq_config())
    assert "do not fit each other and the 4 bits and group_size 32" in refusal(folder)


@pytest.mark.parametrize(
    ("file", "method", "config"),
    [
        ("quantize_config.json", "gptq", {"bits": 4, "group_size": 32, "desc_act": False, "sym": True}),
        ("quant_config.json", "awq", {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}),
    ],
)
def test_older_folders(tmp_path: Path, file: str, method: str, config: dict[str, Any]) -> None:
    grid = random_grid(32, 64)
    folder = write_matrices(tmp_path, {}, {"a": gptq(grid) if method == "gptq" else awq(grid)})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / WEIGHTS).rename(folder / "gptq_model-4bit-32g.safetensors")
    assert "has no weights" in refusal(folder)
    (folder / file).write_text(json.dumps(config))
    assert_holds(folder, "a", grid)


# ── whole models ────────────────────────────────────────────────────────────────────────────────────────────────────


def logits(program: Program) -> Tensor:
    tokens = torch.arange(3, 17)[None]
    return Interpreter(program).run(tokens, 0, Interpreter(program).new_caches())[0]


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_the_program_is_that_of_the_float_model(tmp_path: Path, method: str) -> None:
    quantised, floating = tmp_path / "quantised", tmp_path / "float"
    floats = write_model(quantised, method=method, symmetric=False, act_order=method == "gptq")
    program = trace(quantised)
    for name, tensor in floats.items():
        assert torch.equal(program.store.load(name), tensor), name
    write_model(floating)
    save_file(floats, floating / WEIGHTS, metadata={"format": "pt"})
    edit_config(floating, quantization_config=None)
    assert torch.equal(logits(program), logits(trace(floating)))
    assert sorted(checkpoint_hashes(program)) == ["config.json", WEIGHTS]


def test_matrices_that_the_module_keeps_transposed(tmp_path: Path) -> None:
    floats = write_model(tmp_path, family="gpt2")
    store = trace(tmp_path).store
    square = [name for name in floats if name.endswith("attn.c_proj.weight")]
    assert square
    for name, tensor in floats.items():
        if ".c_" in name:
            assert torch.equal(store.load(name), tensor), name


def test_a_quantised_head_is_untied(tmp_path: Path) -> None:
    floats = write_model(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    grid = random_grid(*tensors.pop("lm_head.weight").shape, seed=9)
    save_file(tensors | {f"lm_head.{part}": t for part, t in gptq(grid).items()}, tmp_path / WEIGHTS)
    edit_config(tmp_path, tie_word_embeddings=True)
    store = trace(tmp_path).store
    assert torch.equal(store.load("lm_head.weight"), grid.matrix())
    assert torch.equal(store.load("model.embed_tokens.weight"), floats["model.embed_tokens.weight"])


# ── what is refused ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method 'bitsandbytes', where gptq or awq is due"),
        ({"quant_method": "compressed-tensors"}, "quant_method 'compressed-tensors'"),
        ({"quant_method": "fp8"}, "quant_method 'fp8'"),
        ({"quant_method": "marlin"}, "quant_method 'marlin'"),
        ({"is_marlin_format": True}, "is_marlin_format 'true'"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format 'marlin', where gptq or gptq_v2 is due"),
        ({"checkpoint_format": "exllama"}, "checkpoint_format 'exllama'"),
        ({"checkpoint_format": "gptq", "format": "gptq_v2"}, "both checkpoint_format 'gptq' and format 'gptq_v2'"),
        ({"quant_method": "awq", "version": "gemv"}, "version 'gemv', where gemm is due"),
        ({"quant_method": "awq", "version": "marlin"}, "version 'marlin'"),
        ({"quant_method": "awq", "bits": 3}, "bits '3', where 4 is due"),
        ({"bits": 5}, "bits '5', where 2, 3, 4, 8 is due"),
        ({"bits": None}, "bits 'None'"),
        ({"group_size": 0}, "group_size '0'"),
        ({"pack_dtype": "int64"}, "pack_dtype 'int64', where int32 is due"),
    ],
)
def test_variants_that_are_not_read_name_file_and_key(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    folder = write_matrices(tmp_path, gptq_config() | changes, {"a": gptq(random_grid(32, 64))})
    message = refusal(folder)
    assert words in message
    assert str(folder / "config.json") in message


def spoilt(folder: Path, **changes: Tensor | None) -> Path:
    """A GPTQ matrix with parts taken away or replaced."""
    parts = gptq(random_grid(32, 64, symmetric=False))
    for part, tensor in changes.items():
        if tensor is None:
            del parts[part]
        else:
            parts[part] = tensor
    return write_matrices(folder, gptq_config(sym=False), {"a": parts})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"qzeros": None}, "has 'a.qweight' but no 'a.qzeros'"),
        ({"scales": None}, "has 'a.qweight' but no 'a.scales'"),
        ({"qweight": torch.zeros(8, 32, dtype=torch.int64)}, "'a.qweight' in .* is int64"),
        ({"scales": torch.zeros(2, 32, dtype=torch.int32)}, "'a.scales' in .* is int32"),
        ({"g_idx": torch.zeros(8, 8, dtype=torch.int32)}, "'a.g_idx' in .* is int32 .8, 8."),
        ({"scales": torch.zeros(3, 32).half()}, "do not fit each other"),
        ({"qzeros": torch.zeros(2, 5, dtype=torch.int32)}, "do not fit each other"),
        ({"g_idx": torch.zeros(32, dtype=torch.int32)}, "do not fit each other"),
        ({"g_idx": torch.full((64,), 2, dtype=torch.int32)}, "names groups from 2 to 2, but its scales have 2"),
        ({"scales": torch.full((2, 32), float("nan")).half()}, "'a.weight' holds 2048 NaN"),
        ({"weight": torch.zeros(32, 64)}, "holds both 'a.weight' and 'a.qweight'"),
    ],
)
def test_damage(tmp_path: Path, changes: dict[str, Tensor | None], words: str) -> None:
    message = refusal(spoilt(tmp_path, **changes))
    assert re.search(words, message), message


def test_a_file_that_goes_or_shrinks_behind_our_back(tmp_path: Path) -> None:
    store = opened(spoilt(tmp_path))
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:-600])
    with pytest.raises(HikuiError, match="ends inside a tensor"):
        store.load("a.weight")
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(HikuiError, match="cannot be read"):
        store.load("a.weight")


def test_a_config_without_quantised_tensors(tmp_path: Path) -> None:
    folder = write_matrices(tmp_path, gptq_config(), {"a": {"weight": torch.zeros(4, 4)}})
    assert "already quantised (gptq), but none of its tensors ends in .qweight" in refusal(folder)


def test_quantised_tensors_without_a_config(tmp_path: Path) -> None:
    folder = spoilt(tmp_path)
    (folder / "config.json").write_text("{}")
    assert "quantize_config.json, quant_config.json says how" in refusal(folder)


def test_scales_of_activations(tmp_path: Path) -> None:
    parts = {"a": awq(random_grid(32, 64)), "act": {"scales": torch.ones(4).half()}}
    assert "'act.scales' belongs to no quantised matrix" in refusal(write_matrices(tmp_path, awq_config(), parts))


def test_zeros_that_programs_read_in_two_ways(tmp_path: Path) -> None:
    grid = random_grid(32, 64, symmetric=False)
    grid.zeros[3, 1] = 16
    folder = write_matrices(tmp_path, gptq_config(sym=False), {"a": gptq(grid)})
    assert "'a.qzeros' in" in refusal(folder)
    assert "whether that means 0 or 16" in refusal(folder)


@pytest.mark.parametrize(("told", "stored_less"), [("gptq", 0), ("gptq_v2", 1)])
def test_a_config_that_names_the_other_format(tmp_path: Path, told: str, stored_less: int) -> None:
    parts = gptq(random_grid(32, 64), stored_less=stored_less)
    message = refusal(write_matrices(tmp_path, gptq_config(checkpoint_format=told), {"a": parts}))
    other = {"gptq": "gptq_v2", "gptq_v2": "gptq"}[told]
    assert f"says checkpoint_format {told}, but" in message
    assert f"look like {other}" in message
    asymmetric = gptq_config(checkpoint_format=told, sym=False)
    opened(write_matrices(tmp_path, asymmetric, {"a": parts})).load("a.weight")


def test_a_matrix_of_another_shape(tmp_path: Path) -> None:
    write_model(tmp_path)
    edit_config(tmp_path, intermediate_size=96)
    with pytest.raises(HikuiError, match=r"must have \[96, 64\]"):
        trace(tmp_path)


def test_groups_are_where_g_idx_says(tmp_path: Path) -> None:
    grid = random_grid(32, 64, act_order=True)
    matrix = opened(write_matrices(tmp_path, gptq_config(), {"a": gptq(grid)})).source("a.weight")
    assert isinstance(matrix, QuantisedMatrix)
    assert matrix.groups().tolist() == grid.groups.tolist()
    codes = replace(matrix, start=2, stop=5).grid().codes(matrix.groups())
    assert codes.tolist() == (grid.fields[2:5] - 8).tolist()


def test_the_packer_of_these_tests_interleaves() -> None:
    word = interleaved(np.arange(8, dtype=np.int64)[None])
    assert f"{int(word[0, 0]) & 0xFFFFFFFF:08x}" == "75316420"
