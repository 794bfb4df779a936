"""GGUF files: the logits of the model that they hold, tensors row by row, tokenizers, and what is refused."""

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFValueType as Type
from transformers import AutoTokenizer

from hikui.lowering.app.assemble import checkpoint_folders, checkpoint_hashes, stored_kinds
from hikui.lowering.checkpoint.folder import Checkpoint
from hikui.lowering.checkpoint.gguf_tensor import GgufTensor
from hikui.lowering.engine.resume import run_key
from hikui.lowering.errors import HikuiError
from hikui.lowering.huggingface.gguf_file import read_gguf
from hikui.lowering.huggingface.tokenizer import ModelTokenizer
from hikui.lowering.ir.program import Program
from hikui.lowering.trace import trace, trace_and_compare
from tests.lowering.checkpoint.gguf_files import CONTEXT, FAMILIES, byte_level, sentence_pieces, write_gguf
from tests.lowering.trace.conftest import float_logits, random_tokens, run_in_steps

TEXT = "Once upon a time, Zoë paid 12.50 € for 3 apples – café!\n\tif x: return [y] <s> on"


def refusal(path: Path) -> str:
    with pytest.raises(HikuiError) as caught:
        trace(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ── the model ───────────────────────────────────────────────────────────────────────────────────────────────────────


EVERY_TYPE = [Kind.F32, Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0]


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [*(("llama", kind) for kind in EVERY_TYPE), *((name, Kind.Q4_1) for name in FAMILIES if name != "llama")],
)
def test_logits_are_those_of_the_model_with_dequantised_weights(architecture: str, kind: Kind, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    model = write_gguf(path, architecture, kind)
    program, _ = trace_and_compare(path)
    tokens = random_tokens(260, CONTEXT)
    want = float_logits(model, tokens)
    got = run_in_steps(program, tokens, [30, 1, CONTEXT - 31])
    assert (got - want).abs().max() <= 1e-4 * (want.max() - want.min())
    assert program.config.context_length == CONTEXT
    assert program.config.bos_token_id == 0
    assert program.config.eos_token_ids == (1,)
    assert program.config.architecture == type(model).__name__


@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_parameter_is_the_models_bit_for_bit(architecture: str, tmp_path: Path) -> None:
    model = write_gguf(tmp_path / "m.gguf", architecture, Kind.Q4_1)
    store = trace(tmp_path / "m.gguf").store
    for name, parameter in model.named_parameters():
        assert torch.equal(store.load(name), parameter), name
        for start, stop in ((0, 1), (3, 21), (len(parameter) - 5, len(parameter))):
            assert torch.equal(store.load_rows(name, start, stop), parameter[start:stop]), name


UNREAD = ("Q8_1", "Q8_K", "Q1_0", "F64", "I8", "I16", "I32", "I64")
BLOCKS = [kind for kind in Kind if kind.name not in UNREAD]


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_rows_of_every_type_are_ggufs_own(kind: Kind, tmp_path: Path) -> None:
    block, width = gguf.GGML_QUANT_SIZES[kind]
    rows, columns = 24, 2 * block * (32 if block == 1 else 1)
    data = np.random.default_rng(kind).integers(0, 256, (rows, columns // block * width), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("a.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with np.errstate(all="ignore"):
        want = torch.from_numpy(np.array(gguf.dequantize(data, kind)))
    file = read_gguf(tmp_path / "m.gguf")
    tensor = GgufTensor.of(file.path, "a.weight", file.tensors["a.weight"])
    assert torch.equal(tensor.load().view(torch.int32), want.view(torch.int32))
    assert torch.equal(tensor.rows(5, 19).rows(2, 9).load().view(torch.int32), want[7:14].view(torch.int32))


def test_a_part_is_read_without_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "m.gguf", kind=Kind.Q8_0)
    store = trace(tmp_path / "m.gguf").store
    read = []
    from hikui.lowering.ir.store import FileTensor

    whole = FileTensor._read
    monkeypatch.setattr(FileTensor, "_read", lambda self: read.append(self.nbytes) or whole(self))  # type: ignore[func-returns-value]
    store.load_rows("model.embed_tokens.weight", 10, 14)
    store.load_rows("model.layers.1.self_attn.q_proj.weight", 17, 20)
    bytes_of_a_row = 64 // 32 * 34
    assert read == [4 * bytes_of_a_row, 5 * bytes_of_a_row]  # of a head, rows 1, 3 and 5 lie alternately


def test_a_model_without_grouped_heads_need_not_say_so(tmp_path: Path) -> None:
    assert "head_count_kv 4 of size 16, which makes 64, but 'blk.0.attn_k.weight' has the shape [32, 64]" in refusal(
        write_and_name(tmp_path, without=("attention.head_count_kv",))
    )


def test_the_end_of_a_turn_ends_a_text(tmp_path: Path) -> None:
    path = write_and_name(tmp_path, change=lambda writer: writer.add_eot_token_id(7))
    assert trace(path).config.eos_token_ids == (1, 7)


def test_biases_of_attention_are_the_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES["llama"][1], "attention_bias", True)
    model = write_gguf(tmp_path / "m.gguf", kind=Kind.F16)
    tokens = random_tokens(260, 12)
    want = float_logits(model, tokens)
    assert torch.allclose(run_in_steps(trace(tmp_path / "m.gguf"), tokens, [12]), want, atol=1e-5)


# ── the folder around it ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_folder_with_a_gguf_alone(tmp_path: Path) -> None:
    path = write_and_name(tmp_path)
    program = trace(tmp_path)
    assert program.store.keys() == trace(path).store.keys()
    assert program.tokenizer == ModelTokenizer(path)


def test_the_folders_config_and_tokenizer_come_first_and_the_file_alone_has_its_own(tmp_path: Path) -> None:
    model = write_gguf(tmp_path / "m.gguf")
    model.config.eos_token_id = [1, 9]
    model.config.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"bos_token_id": 5}))
    ours = ModelTokenizer(tmp_path / "m.gguf").content()
    (tmp_path / "tokenizer.json").write_text(ours)
    program, alone = trace(tmp_path), trace(tmp_path / "m.gguf")
    assert (program.config.bos_token_id, program.config.eos_token_ids) == (5, (1, 9))
    assert (alone.config.bos_token_id, alone.config.eos_token_ids) == (0, (1,))
    assert program.tokenizer == ModelTokenizer(tmp_path)
    assert alone.tokenizer == ModelTokenizer(tmp_path / "m.gguf")
    assert checkpoint_folders(program) == [tmp_path]
    assert checkpoint_folders(alone) == []
    assert sorted(checkpoint_hashes(program)) == ["config.json", "m.gguf"]
    assert sorted(checkpoint_hashes(alone)) == ["m.gguf"]


def test_several_files_in_a_folder(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    assert "has 2 GGUF files (a.gguf, b.gguf, …); name the one that is meant." in refusal(tmp_path)


def test_other_weights_come_before_a_gguf(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf").save_pretrained(tmp_path)
    assert stored_kinds(trace(tmp_path)) is None


def test_what_the_weights_were_stored_as_is_said(tmp_path: Path) -> None:
    program = trace(write_and_name(tmp_path, kind=Kind.Q4_1, kinds={"output.weight": Kind.Q8_0}))
    assert stored_kinds(program) == {"F32": 5, "Q4_1": 15, "Q8_0": 1}
    assert "stored as F32 5 tensors, Q4_1 15 tensors, Q8_0 1 tensor:" in program.cautions[0]
    assert trace(write_and_name(tmp_path, kind=Kind.F16)).cautions == ()


def test_the_key_of_a_run_covers_codes_and_their_reading(tmp_path: Path) -> None:
    def key(program: Program) -> str:
        return run_key(program, "", ())

    path = write_and_name(tmp_path, kind=Kind.Q4_0)
    first = key(trace(path))
    assert key(trace(path)) == first
    data = bytearray(path.read_bytes())
    data[read_gguf(path).tensors["blk.1.ffn_down.weight"].offset + 5] ^= 16
    path.write_bytes(data)
    assert key(trace(path)) != first
    program = trace(path)
    name = "model.layers.0.self_attn.q_proj.weight"
    other, source = program.clone(), program.store.source(name)
    other.store.alias(name, source.rows(0, 64) if isinstance(source, GgufTensor) else source)
    assert key(other) == key(program)
    other.store.alias(name, GgufTensor.of(path, "x", read_gguf(path).tensors["blk.0.attn_q.weight"]))
    assert key(other) != key(program)


# ── the tokenizer ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("pieces", [False, True], ids=["bytes", "pieces"])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_tokens_are_those_of_transformers(architecture: str, pieces: bool, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, architecture, tokenizer=sentence_pieces if pieces else byte_level)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    ours = ModelTokenizer(path)
    from tokenizers import Tokenizer

    for text in (TEXT, "", " ", "a  b", "onc once"):
        assert Tokenizer.from_str(ours.content()).encode(text).ids == theirs(text)["input_ids"]


@pytest.mark.parametrize("bos", [False, True])
def test_bos_stands_where_the_metadata_says_so(bos: bool, tmp_path: Path) -> None:
    from hikui.lowering.artefact.text import TextCodec

    path = write_and_name(tmp_path, tokenizer=lambda writer: byte_level(writer, bos=bos))
    assert TextCodec(ModelTokenizer(path)).prefix == ((0,) if bos else ())


def test_the_chat_template_goes_with_the_tokenizer(tmp_path: Path) -> None:
    from hikui.lowering.artefact.text import copy_tokenizer

    path = write_and_name(tmp_path)
    copy_tokenizer(ModelTokenizer(path), tmp_path / "out")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded.apply_chat_template([{"role": "user", "content": "once"}], tokenize=False) == "<s>once"
    assert loaded(TEXT)["input_ids"] == AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")(TEXT)["input_ids"]
    assert str(tmp_path) not in (tmp_path / "out" / "tokenizer_config.json").read_text()


def test_a_file_without_a_tokenizer(tmp_path: Path) -> None:
    path = write_and_name(tmp_path, tokenizer=lambda writer: None)
    assert trace(path).tokenizer is None
    with pytest.raises(HikuiError, match="has no tokenizer in its metadata; give a folder"):
        ModelTokenizer(path).content()


def test_a_tokenizer_of_another_make(tmp_path: Path) -> None:
    def write(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("rwkv")
        writer.add_token_list(["a"])

    with pytest.raises(HikuiError, match="transformers cannot make a tokenizer from the metadata of .*'rwkv'"):
        ModelTokenizer(write_and_name(tmp_path, tokenizer=write)).content()


# ── what is refused ─────────────────────────────────────────────────────────────────────────────────────────────────


def write_and_name(folder: Path, **options: Any) -> Path:
    write_gguf(folder / "m.gguf", **options)
    return folder / "m.gguf"


def key_of(name: str, value: Any) -> dict[str, Any]:
    """Options of a file with one more key of the metadata."""

    def change(writer: gguf.GGUFWriter) -> None:
        if isinstance(value, list):
            writer.add_array(f"llama.{name}", value)
        else:
            kind = {str: Type.STRING, float: Type.FLOAT32, int: Type.UINT32, bool: Type.BOOL}[type(value)]
            writer.add_key_value(f"llama.{name}", value, kind)

    return {"change": change}


def tensor_of(name: str, values: Any, dtype: Any = np.float32) -> dict[str, Any]:
    """Options of a file with one more tensor."""
    return {"change": lambda writer: writer.add_tensor(name, np.array(values, dtype))}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (key_of("rope.scaling.type", "yarn"), "sets llama.rope.scaling.type to 'yarn', which hikui does not read"),
        (key_of("rope.scaling.factor", 8.0), "sets llama.rope.scaling.factor to 8.0, which"),
        (key_of("attention.sliding_window", 8), "sets llama.attention.sliding_window to 8, which hikui does not"),
        (key_of("expert_count", 8), "sets llama.expert_count to 8, which"),
        (key_of("attention.key_length", 8), "dimension_count to 16, where keys have a size of 8"),
        (key_of("x", [1, 2]), "sets llama.x to a list of 2, which hikui does not read"),
        ({"without": ("block_count",)}, "has no llama.block_count in its metadata"),
        ({"without": ("attention.layer_norm_rms_epsilon",)}, "has no llama.attention.layer_norm_rms_epsilon"),
        ({"architecture": "gemma3", "without": ("rope.freq_base",)}, "has no gemma3.rope.freq_base"),
        (tensor_of("blk.0.extra.weight", [1] * 4), "holds the tensor 'blk.0.extra.weight', which LlamaForCausalLM as"),
        (tensor_of("blk.2.x.weight", [1] * 4), "sets llama.block_count to 2, but its tensors belong to 3 blocks"),
        (tensor_of("rope_freqs.weight", [2] * 8), "changes the rotary angles by factors ('rope_freqs.weight')"),
        (tensor_of("x", [1] * 4, np.float64), "'x' in {path} is of ggml's type F64, which hikui does not read"),
    ],
)
def test_what_would_be_another_model(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    path = write_and_name(tmp_path, **options)
    assert words.format(path=path) in refusal(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rope.scaling.type", "none"),
        ("expert_count", 0),
        ("attention.sliding_window", CONTEXT),
        ("tensor_data_layout", "x"),
    ],
)
def test_keys_that_change_nothing(tmp_path: Path, name: str, value: Any) -> None:
    assert Checkpoint.open(write_and_name(tmp_path, **key_of(name, value))).tensors


def test_factors_of_one_change_no_angle(tmp_path: Path) -> None:
    path = write_and_name(tmp_path, change=lambda w: w.add_tensor("rope_freqs.weight", np.ones(8, np.float32)))
    assert "rope_freqs.weight" not in trace(path).store.keys()


def test_factors_that_the_config_beside_accounts_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Llama 3.1: the file has the factors, the config how they are made."""
    scaling = {
        "rope_type": "llama3", "rope_theta": 5e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }  # fmt: skip
    monkeypatch.setitem(FAMILIES["llama"][1], "rope_parameters", scaling)
    from tests.lowering.checkpoint.gguf_files import model_of

    found = model_of("llama").model.rotary_emb.inv_freq.double()
    plain = 1.0 / 5e4 ** (torch.arange(0, 16, 2).double() / 16)
    factors = (plain / found).float().numpy()
    assert factors.max() > 1.5
    model = write_gguf(tmp_path / "m.gguf", change=lambda w: w.add_tensor("rope_freqs.weight", factors))
    assert "changes the rotary angles" in refusal(tmp_path / "m.gguf")
    model.config.save_pretrained(tmp_path)
    tokens = random_tokens(260, 48)
    want = float_logits(model, tokens)
    assert torch.allclose(run_in_steps(trace(tmp_path), tokens, [48]), want, atol=1e-4)


def test_architectures_that_are_not_read_are_named(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(raw([("general.architecture", 8, text("mamba"))]))
    assert "is of the architecture 'mamba'; of a GGUF hikui reads gemma3, llama, qwen2, qwen3" in refusal(path)


def test_a_tokenizer_larger_than_the_embedding(tmp_path: Path) -> None:
    def write(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list([f"t{index}" for index in range(261)])

    path = write_and_name(tmp_path, tokenizer=write)
    assert "has a tokenizer of 261 tokens, and its embedding ('token_embd.weight') has 260 rows" in refusal(path)


@pytest.mark.parametrize("kind", [Kind.F16, Kind.Q8_0])
def test_a_scale_that_is_no_number(kind: Kind, tmp_path: Path) -> None:
    path = write_and_name(tmp_path, kind=kind)
    file = read_gguf(path)
    data = bytearray(path.read_bytes())
    at = file.tensors["blk.1.ffn_up.weight"].offset
    data[at : at + 2] = struct.pack("<e", float("nan"))
    path.write_bytes(data)
    count = 1 if kind == Kind.F16 else 32
    assert f"'model.layers.1.mlp.up_proj.weight' holds {count} NaN and 0 infinite values" in refusal(path)


# ── damaged files, byte by byte ─────────────────────────────────────────────────────────────────────────────────────


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def raw(
    keys: Sequence[tuple[str, int, bytes]] = (),
    tensors: Sequence[tuple[str, list[int], int, int]] = (),
    *,
    head: bytes = b"GGUF\x03\0\0\0",
    counts: tuple[int, int] | None = None,
    data: int = 256,
) -> bytes:
    """A file from its parts; a tensor is name, dimensions, type and offset."""
    tensor_count, key_count = counts or (len(tensors), len(keys))
    out = head + struct.pack("<QQ", tensor_count, key_count)
    out += b"".join(text(key) + struct.pack("<I", kind) + value for key, kind, value in keys)
    for name, dimensions, kind, offset in tensors:
        out += text(name) + struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, kind, offset)
    return out + bytes(-len(out) % 32) + bytes(data)


U32 = struct.pack("<I", 1)
HUGE = 2**62
ARCHITECTURE = "general.architecture"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"GG", "is truncated: its header goes on for 4 bytes from byte 0, and the file has 2; fetch it again."),
        (b"nope", "is no GGUF file: it does not begin with the bytes GGUF."),
        (raw(head=b"GGUF\x01\0\0\0"), "is a GGUF file of version 1; hikui reads versions 2 and 3"),
        (raw(head=b"GGUF\0\0\0\x03"), "is a GGUF file of version 3 in big-endian; hikui reads"),
        (raw(counts=(0, HUGE)), f"its header counts {HUGE} keys, for which"),
        (raw(counts=(HUGE, 0)), f"its header counts {HUGE} tensors, for which"),
        (raw([("a", 4, U32), ("a", 4, U32)]), "it has the key 'a' twice"),
        (raw([("a", 13, U32)]), "the value of 'a' has type 13, which the format does not know"),
        (raw([("a", 7, b"\x02")]), "the value of 'a' is 2, and true or false is due"),
        (raw([("a", 8, struct.pack("<Q", HUGE))]), f"the value of 'a' goes on for {HUGE} bytes"),
        (raw([("a", 8, text(b"\xff"))]), "the value of 'a' is not UTF-8 at byte 0"),
        (raw([("a", 9, struct.pack("<IQ", 8, HUGE))]), f"the value of 'a' counts {HUGE} texts, for which"),
        (raw([("a", 9, struct.pack("<IQ", 4, HUGE))]), "the value of 'a' goes on for"),
        (raw([("a", 9, struct.pack("<IQ", 9, 1))]), "the value of 'a' is a list of type 9"),
        (raw([("x" * 70000, 4, U32)]), "the name at key 1 of 1 has 70000 bytes"),
        (raw([("general.alignment", 4, struct.pack("<I", 0))]), "general.alignment is 0, and a power of two"),
        (raw([("general.alignment", 4, struct.pack("<I", 24))]), "general.alignment is 24, and a power of two"),
        (raw([("general.alignment", 8, text("32"))]), "general.alignment is '32', and a power of two"),
        (raw([("split.count", 2, b"\x03\0"), ("split.no", 2, b"\x01\0")]), "is part 2 of the 3 parts of a split GGUF"),
        (raw(tensors=[("a", [8], 0, 0), ("a", [8], 0, 64)]), "it has the tensor 'a' twice"),
        (raw(tensors=[("a", [8], 0, 0), ("b", [8], 0, 0)]), "the tensor 'b' lies where 'a' does"),
        (raw(tensors=[("a", [16], 0, 0), ("b", [8], 0, 32)]), "the tensor 'b' lies where 'a' does"),
        (raw(tensors=[("a", [8], 0, 8)]), "the tensor 'a' lies at 8, no multiple of the alignment of 32"),
        (raw(tensors=[("a", [65], 0, 0)]), "is truncated: the tensor 'a' ends at byte"),
        (raw(tensors=[("a", [8], 0, HUGE)]), "is truncated: the tensor 'a' ends at byte"),
        (raw(tensors=[("a", [HUGE, HUGE], 0, 0)]), "is truncated: the tensor 'a' ends at byte"),
        (raw(tensors=[("a", [8, 0], 0, 0)]), "the tensor 'a' has the shape [0, 8], which holds nothing"),
        (raw(tensors=[("a", [33], 2, 0)]), "the rows of 'a' have 33 values, no multiple of the 32 of Q4_0"),
        (raw(tensors=[("a", [1] * 5, 0, 0)]), "the tensor 'a' has 5 dimensions, and 1 to 4 are due"),
        (raw(tensors=[("a", [], 0, 0)]), "the tensor 'a' has 0 dimensions, and 1 to 4 are due"),
        (raw(tensors=[("a", [8], 99, 0)]), "'a' in {path} is of ggml's type number 99, which hikui does not read"),
        (raw(tensors=[("a", [32], 9, 0)]), "'a' in {path} is of ggml's type Q8_1, which hikui does not read"),
        (raw(), "has no general.architecture in its metadata, so it does not say what it holds."),
        (raw([(ARCHITECTURE, 4, U32)]), "sets general.architecture to 1, where a text is due."),
        (raw([(ARCHITECTURE, 8, text("llama")), ("llama.context_length", 6, U32)]), "has no llama.block_count"),
    ],
)  # fmt: skip
def test_damaged_files(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    assert words.format(path=path) in refusal(path)


def test_files_cut_anywhere(tmp_path: Path) -> None:
    whole = write_and_name(tmp_path).read_bytes()
    path = tmp_path / "cut.gguf"
    for length in (*range(4, 400, 7), len(whole) // 2, len(whole) - 32):
        path.write_bytes(whole[:length])
        with pytest.raises(HikuiError, match="is truncated|for which"):
            Checkpoint.open(path)


@pytest.mark.parametrize(
    ("key", "kind", "value", "words"),
    [
        ("context_length", Type.UINT32, 0, "sets llama.context_length to 0, where a number from 1 on is due"),
        ("context_length", Type.INT32, -1, "sets llama.context_length to -1, where a whole number from 0 on is due"),
        ("block_count", Type.FLOAT32, 2.0, "sets llama.block_count to 2.0, where a whole number from 0 on is due"),
        ("block_count", Type.UINT64, HUGE, f"sets llama.block_count to {HUGE}, but its tensors belong to 2 blocks"),
        ("attention.head_count", Type.ARRAY, [4, 4], "head_count to a list of 2, where a whole number from 0 on"),
        ("attention.head_count", Type.UINT32, 8, "head_count 8 of size 16, which makes 128, but 'blk.0.attn_q.weight'"),
        ("embedding_length", Type.UINT64, HUGE, f"embedding_length {HUGE}, which makes {HUGE}, but"),
        ("feed_forward_length", Type.UINT32, 95, "feed_forward_length 95, which makes 95, but 'blk.0.ffn_up.weight'"),
        ("rope.dimension_count", Type.UINT32, 15, "has heads of size 15, and rotary angles need an even one"),
        ("rope.freq_base", Type.FLOAT32, float("nan"), "rope.freq_base to nan, where a finite number is due"),
        ("rope.freq_base", Type.FLOAT32, -1.0, "rope.freq_base to -1.0, where a number above 0 is due"),
    ],
)
def test_metadata_that_cannot_be(tmp_path: Path, key: str, kind: Type, value: Any, words: str) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        if kind == Type.ARRAY:
            writer.add_array(f"llama.{key}", value)
        else:
            writer.add_key_value(f"llama.{key}", value, kind)

    assert words in refusal(write_and_name(tmp_path, without=(key,), change=change))
