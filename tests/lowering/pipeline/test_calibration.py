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


def test_short_documents_come_last(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "mixed.txt"
    path.write_text("<|endoftext|>".join(["short"] * 3 + ["a long document " * 8]))
    lengths = [chunk.shape[1] for chunk in draw(path, tiny, samples=3).chunks]
    assert lengths == [20, 20, 6]


def test_one_long_document_gives_many_windows_of_its_text(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text(" ".join(f"word{number}" for number in range(500)))
    data = draw(path, tiny, samples=5)
    texts = [TextCodec(tiny).decode(chunk[0, 1:].tolist()) for chunk in data.chunks]
    assert len(set(texts)) == 5
    assert all(text in path.read_text() for text in texts)


def test_the_rest_of_the_text_gives_windows_where_there_are_too_few(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    # Two pieces of eight characters a token, of which twenty tokens take less than half.
    path.write_text((" ".join(f"word{number}" for number in range(80)))[:320])
    first, all_of_it = draw(path, tiny, samples=2), draw(path, tiny, samples=9)
    windows = [chunk[0].tolist() for chunk in all_of_it.chunks]
    assert [len(window) for window in windows[:4]] == [20] * 4
    assert all(window[0] == 0 and 0 not in window[1:] for window in windows)
    assert all(torch.equal(a, b) for a, b in zip(first.chunks, all_of_it.chunks, strict=False))
    codec = TextCodec(tiny)
    for before, after in zip(windows[:2], windows[2:4], strict=True):
        assert codec.decode(before[1:] + after[1:]) in path.read_text()


def test_long_windows_are_of_text_that_others_do_not_read(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("<|endoftext|>".join([" ".join(f"w{number}" for number in range(800)), "a short document"]))
    config, codec = ModelConfig(256, 131, (), "test", 0, (1,)), TextCodec(tiny)

    def words(long: int, samples: int = 40) -> tuple[list[str], list[str]]:
        settings = {"samples": samples, "tokens": 20, "seed": 3, "source": "book", "long": long}
        data = calibration.draw(read_documents(path), codec.encode_prompt, config, **settings)  # type: ignore[arg-type]
        assert [tuple(chunk.shape) for chunk in data.long] == [(1, 80)] * min(long, 6)
        assert all(chunk[0, 0] == 0 for chunk in data.long)
        return tuple(
            " ".join(codec.decode(c[0, 1:].tolist()) for c in each).split() for each in (data.chunks, data.long)
        )  # type: ignore[return-value]

    alone, none = words(0)
    usual, far = words(3)
    assert len(alone) > len(usual) and none == []
    # A word that a window cuts may begin like another.
    whole = {word for word in far if len(word) == 4}
    assert len(whole) > 30 and not whole & set(usual)
    assert words(3) == (usual, far)
    assert words(99, samples=2)[0], "what is not long enough for them is left to the others"


def test_windows_of_random_tokens_may_be_long() -> None:
    data = calibration.random_tokens(CONFIG, samples=2, tokens=10, seed=1, long=1)
    assert [chunk.shape[1] for chunk in (*data.chunks, *data.long)] == [10, 10, 40]
    assert torch.equal(data.chunks[1], calibration.random_tokens(CONFIG, samples=2, tokens=10, seed=1).chunks[1])


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
