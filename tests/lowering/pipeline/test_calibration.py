from pathlib import Path

import pytest
import torch

from hikui.lowering.artefact.text import TextCodec, copy_tokenizer, read_documents
from hikui.lowering.errors import HikuiError
from hikui.lowering.huggingface.tokenizer import ModelTokenizer
from hikui.lowering.ir.program import ModelConfig
from hikui.lowering.pipeline import calibration
from hikui.lowering.pipeline.contract import Calibration

CONFIG = ModelConfig(64, 131, (), "test", 0, (1,))


def draw(stories: Path, tiny: Path, **options: int) -> Calibration:
    settings = {"samples": 4, "tokens": 20, "seed": 0, **options}
    return calibration.draw(
        read_documents(stories), TextCodec(tiny).encode_prompt, CONFIG, source="stories", **settings
    )


def test_windows_have_bos_and_length_and_their_seed_repeats(stories: Path, tiny: Path) -> None:
    data = draw(stories, tiny)
    assert [tuple(chunk.shape) for chunk in data.chunks] == [(1, 20)] * 4
    assert all(chunk.dtype == torch.int64 and chunk[0, 0] == 0 for chunk in data.chunks)
    assert all(torch.equal(a, b) for a, b in zip(data.chunks, draw(stories, tiny).chunks, strict=True))
    other = draw(stories, tiny, seed=1)
    assert any(not torch.equal(a, b) for a, b in zip(data.chunks, other.chunks, strict=True))


def test_short_documents_fill_up_what_full_windows_leave(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "mixed.txt"
    path.write_text("<|endoftext|>".join(["short"] * 3 + ["a long document " * 8]))
    lengths = [chunk.shape[1] for chunk in draw(path, tiny, samples=3).chunks]
    assert lengths == [20, 6, 6]


def test_one_long_document_gives_many_windows_of_its_text(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text(" ".join(f"word{number}" for number in range(500)))
    data = draw(path, tiny, samples=5)
    texts = [TextCodec(tiny).decode(chunk[0, 1:].tolist()) for chunk in data.chunks]
    assert len(set(texts)) == 5
    assert all(text in path.read_text() for text in texts)


def test_a_window_is_never_longer_than_the_context(stories: Path, tiny: Path) -> None:
    assert max(chunk.shape[1] for chunk in draw(stories, tiny, tokens=500).chunks) == 64


def test_text_without_two_tokens_is_refused(tiny: Path) -> None:
    with pytest.raises(HikuiError, match="no window of two tokens"):
        calibration.draw([" "], lambda text: [], CONFIG, samples=1, tokens=8, seed=0, source="x")


def test_a_tokenizer_round_trips_and_is_copied(tiny: Path, tmp_path: Path) -> None:
    copy_tokenizer(ModelTokenizer(tiny), tmp_path / "copy")
    codec = TextCodec(tmp_path / "copy")
    assert codec.decode(codec.encode("Hello, bear!")) == "Hello, bear!"
    with pytest.raises(HikuiError, match=r"has no tokenizer\.json"):
        TextCodec(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(HikuiError, match="is not a tokenizer"):
        TextCodec(tmp_path)
