"""Weight files that somebody made to break a reader, or that another tool has written wrongly."""

import json
import struct
import time
from pathlib import Path

import pytest
import torch

from hikui.lowering.checkpoint.container import read_pickle, read_safetensors
from hikui.lowering.checkpoint.folder import Checkpoint
from hikui.lowering.errors import HikuiError


def written(path: Path, header: str, data: bytes = b"\0" * 8) -> Path:
    path.write_bytes(struct.pack("<Q", len(header.encode())) + header.encode() + data)
    return path


def entry(begin: object, end: object, shape: object = (1,)) -> dict[str, object]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (json.dumps({"a": entry(0, float("inf"))}), "the header entry of 'a' is malformed"),
        (json.dumps({"a": entry(0, 4.5)}), "the header entry of 'a' is malformed"),
        (json.dumps({"a": entry("0", "4")}), "the header entry of 'a' is malformed"),
        (json.dumps({"a": entry(0, 4, [True])}), "the header entry of 'a' is malformed"),
        (json.dumps({"a": entry(0, 4, {"1": 1})}), "the header entry of 'a' is malformed"),
        (json.dumps({"a": entry(0, 8, [2**62, 4])}), "takes 73786976294838206464 bytes"),
        (json.dumps({"a": entry(-4, 0)}), "its header says 4"),
        (json.dumps({"a": entry(0, 4), "b": entry(0, 4), "c": entry(4, 8)}), "'b' lies where 'a' does"),
        (json.dumps({"a": entry(0, 8, [2]), "b": entry(4, 8)}), "'b' lies where 'a' does"),
        (json.dumps({"b": entry(4, 8)}), "4 bytes before 'b' are unused"),
        (f'{{"a": {json.dumps(entry(0, 4))}, "a": {json.dumps(entry(4, 8))}}}', "holds the key 'a' twice"),
        ("[" * 100000, "is not a JSON object"),
        ('{"a": ' + "9" * 5000 + "}", "is not a JSON object"),
    ],
    ids=range(13),
)
def test_headers_that_lie(tmp_path: Path, header: str, words: str) -> None:
    start = time.monotonic()
    with pytest.raises(HikuiError, match="is corrupt") as caught:
        read_safetensors(written(tmp_path / "model.safetensors", header))
    assert words in str(caught.value)
    assert time.monotonic() - start < 1


def test_an_empty_tensor_takes_no_place(tmp_path: Path) -> None:
    header = json.dumps({"a": entry(0, 0, [0]), "b": entry(0, 8, [2]), "c": entry(8, 8, [0, 3])})
    assert set(read_safetensors(written(tmp_path / "model.safetensors", header))) == {"a", "b", "c"}


def test_pickles_with_other_keys_and_other_layouts(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(2), 7: torch.ones(2)}, path)
    with pytest.raises(HikuiError, match="names a tensor 7, which is no text"):
        read_pickle(path)
    torch.save({"a": torch.ones(2), "b": torch.eye(3).to_sparse()}, path)
    with pytest.raises(HikuiError, match=r"'b' in .* is sparse|cannot be read"):
        read_pickle(path)


@pytest.mark.parametrize("shard", ["x" * 5000, "a\0b", "../model.safetensors", "/etc/passwd", ""])
def test_shards_of_any_name(checkpoint: Path, shard: str) -> None:
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(HikuiError, match="names the shard") as caught:
        Checkpoint.open(checkpoint)
    assert len(str(caught.value)) < 500
