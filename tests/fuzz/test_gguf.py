"""Mutated GGUF files end in a sentence, at once and in little memory."""

import struct
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import gguf
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from hikui.lowering.checkpoint.folder import Checkpoint
from hikui.lowering.errors import HikuiError
from hikui.lowering.huggingface.gguf_file import read_gguf
from hikui.lowering.trace.source import open_model

from .factor import FACTOR
from .test_checkpoints_and_recipes import HURRIED, within
from .test_runner_files import EDITS, mutated

LARGE = [0, 1, 31, 32, 33, 2**31, 2**32 - 1, 2**32, 2**40, 2**62, 2**63, 2**64 - 1]
"""Sizes, counts and lengths that readers stumble over."""

_METADATA = {
    "context_length": 64, "block_count": 1, "embedding_length": 32, "feed_forward_length": 64,
    "attention.head_count": 2, "attention.head_count_kv": 1,
}  # fmt: skip
_SHAPES = {
    "token_embd.weight": (12, 32), "output_norm.weight": (32,), "blk.0.attn_norm.weight": (32,),
    "blk.0.attn_q.weight": (32, 32), "blk.0.attn_k.weight": (16, 32), "blk.0.attn_v.weight": (16, 32),
    "blk.0.attn_output.weight": (32, 32), "blk.0.ffn_norm.weight": (32,), "blk.0.ffn_gate.weight": (64, 32),
    "blk.0.ffn_up.weight": (64, 32), "blk.0.ffn_down.weight": (32, 64),
}  # fmt: skip


@cache
def whole() -> tuple[bytes, int]:
    """A small Llama, and where its data begins."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "m.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        for key, value in _METADATA.items():
            writer.add_uint32(f"llama.{key}", value)
        writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list([f"t{index}" for index in range(12)])
        writer.add_token_types([1] * 12)
        for name, shape in _SHAPES.items():
            kind = gguf.GGMLQuantizationType.Q4_0 if len(shape) > 1 else gguf.GGMLQuantizationType.F32
            writer.add_tensor(name, gguf.quantize(np.ones(shape, np.float32), kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        read_all(path)  # what it imports on the way is no part of the memory that is measured
        return path.read_bytes(), min(entry.offset for entry in read_gguf(path).tensors.values())


def read_all(path: Path) -> None:
    """As far as a model is opened before it is built, and every tensor's values."""
    checkpoint = Checkpoint.open(path)
    checkpoint.tokenizer_folder()
    for tensor in checkpoint.tensors.values():
        assert tensor.load().shape == tensor.info.shape


def refused(content: bytes) -> bool:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "m.gguf"
        path.write_bytes(content)
        return not within(path, read_all)


def test_the_whole_file_is_read() -> None:
    assert not refused(whole()[0])


@HURRIED
@given(EDITS)
def test_mutated_headers(edits: list[tuple[int, int, bytes]]) -> None:
    content, start = whole()
    refused(mutated(content[:start], edits) + content[start:])


@HURRIED
@given(st.integers(4, 4000), st.sampled_from(LARGE), st.sampled_from("IQ"))
def test_numbers_changed_in_place(place: int, number: int, form: str) -> None:
    """What a length, a count, a type or an offset is, wherever it lies."""
    content, start = whole()
    data = struct.pack(f"<{form}", number & (2**32 - 1) if form == "I" else number)
    at = 4 + (place - 4) % (start - 4)
    refused(content[:at] + data + content[at + len(data) :])


@settings(HURRIED, max_examples=60 * FACTOR, deadline=5000)
@given(st.integers(4, 4000), st.sampled_from(LARGE))
def test_models_are_opened_or_refused(place: int, number: int) -> None:
    """What the checks let through is built by transformers, whose own complaints end in a sentence too."""
    content, start = whole()
    data = struct.pack("<I", number & (2**32 - 1))
    at = 4 + (place - 4) % (start - 4)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "m.gguf"
        path.write_bytes(content[:at] + data + content[at + len(data) :])
        with suppress(HikuiError):
            open_model(path, FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True))


@HURRIED
@given(st.integers(0, 2**16))
def test_files_cut_anywhere(place: int) -> None:
    content, _ = whole()
    last = len(content) - 32
    assert refused(content[: place % last])


@HURRIED
@given(st.binary(max_size=64), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_files_of_any_bytes(content: bytes, tensors: int, keys: int) -> None:
    assert refused(b"GGUF\3\0\0\0" + struct.pack("<QQ", tensors, keys) + content)
