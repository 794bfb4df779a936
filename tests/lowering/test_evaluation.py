import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from hikui.lowering import driver, evaluation
from hikui.lowering.errors import HikuiError, UsageError
from hikui.lowering.interpreter import ReferenceRunner
from hikui.lowering.subject import open_subject
from hikui.lowering.text import TextCodec, read_documents


class Uniform:
    """Gives every token of 32 the same probability."""

    context_length = 8

    def reset(self) -> None: ...

    def forward(self, tokens: npt.NDArray[np.int64], past: int) -> npt.NDArray[np.float32]:
        return np.full((tokens.size, 32), 1.5, np.float32)

    def close(self) -> None: ...


def test_a_uniform_model_needs_five_bits_a_token(tiny: Path) -> None:
    codec = TextCodec(tiny)
    documents = [[0, *codec.encode("abc")], [0, *codec.encode("hello")]]
    own, other = evaluation.quality(Uniform(), [[token % 32 for token in d] for d in documents], codec, bos=0)
    assert other is None
    assert own.tokens == sum(len(document) - 1 for document in documents)
    assert own.perplexity == pytest.approx(32)
    assert own.nats / math.log(2) == pytest.approx(5 * own.tokens)


def test_the_loss_is_that_of_the_float_model(tiny: Path, stories: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    subject = open_subject(tiny)
    documents = read_documents(stories)
    encoded = evaluation.encode_documents(documents, subject.codec, context=40, bos=subject.bos, limit=4)
    assert all(ids[0] == subject.bos and len(ids) == 40 for ids in encoded)
    own, _ = evaluation.quality(subject.runner, encoded, subject.codec, bos=subject.bos)
    nats = 0.0
    characters = 0
    for ids in encoded:
        tokens = torch.tensor([ids])
        with torch.no_grad():
            logits = model(tokens).logits[0, :-1].double()
        nats += float(torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum"))
        characters += len(subject.codec.decode(ids[1:]))
    assert own.documents == 4
    assert own.nats == pytest.approx(nats, rel=1e-6)
    assert own.bits_per_char == pytest.approx(nats / math.log(2) / characters, rel=1e-6)


def test_a_document_longer_than_a_piece_is_the_same_in_pieces(
    tiny: Path, stories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = open_subject(tiny)
    encoded = evaluation.encode_documents(read_documents(stories), subject.codec, context=50, bos=subject.bos, limit=2)
    whole, _ = evaluation.quality(subject.runner, encoded, subject.codec, bos=subject.bos)
    monkeypatch.setattr(evaluation, "PIECE", 7)
    pieces, _ = evaluation.quality(subject.runner, encoded, subject.codec, bos=subject.bos)
    assert pieces.nats == pytest.approx(whole.nats, rel=1e-6)


def test_comparison_with_itself_and_with_a_lowered_form(tiny: Path, stories: Path, prepared: driver.Prepared) -> None:
    subject = open_subject(tiny)
    encoded = evaluation.encode_documents(read_documents(stories), subject.codec, context=32, bos=subject.bos)
    same, also = evaluation.quality(subject.runner, encoded, subject.codec, bos=subject.bos, against=subject.runner)
    assert also is not None
    assert same.nats == also.nats
    assert same.divergence == pytest.approx(0, abs=1e-9)
    assert same.agreement == 1
    lowered = ReferenceRunner(prepared.program)
    other, _ = evaluation.quality(lowered, encoded, subject.codec, bos=subject.bos, against=subject.runner)
    assert other.divergence is not None
    assert other.divergence > 1e-7
    assert other.agreement is not None
    assert 0 < other.agreement <= 1


def test_models_of_other_vocabularies_are_not_compared_token_by_token(tiny: Path) -> None:
    subject = open_subject(tiny)
    with pytest.raises(HikuiError, match="vocabularies have 32 and 131 tokens"):
        evaluation.quality(Uniform(), [[0, 1, 2]], subject.codec, bos=0, against=subject.runner)


def test_logits_that_are_not_finite_are_refused(tiny: Path) -> None:
    class Broken(Uniform):
        def forward(self, tokens: npt.NDArray[np.int64], past: int) -> npt.NDArray[np.float32]:
            return np.full((tokens.size, 32), np.nan, np.float32)

    with pytest.raises(HikuiError, match="not finite"):
        evaluation.quality(Broken(), [[0, 1, 2]], TextCodec(tiny), bos=0)


def test_a_text_without_tokens_to_predict_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(HikuiError, match="no document with two tokens"):
        evaluation.encode_documents(["a"], TextCodec(tiny), context=8, bos=None)
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n<|endoftext|>\n ")
    with pytest.raises(UsageError, match=r"empty\.txt is empty"):
        read_documents(empty)
    empty.write_bytes(b"abc\xff")
    with pytest.raises(UsageError, match="not UTF-8: byte 3"):
        read_documents(empty)
    with pytest.raises(UsageError, match="No such file"):
        read_documents(tmp_path / "missing.txt")


def test_peak_memory_sees_what_is_allocated_inside_and_not_before() -> None:
    before = np.ones(150_000_000, np.uint8)
    del before
    with evaluation.PeakMemory() as small:
        small_use = np.ones(1000, np.uint8)
    with evaluation.PeakMemory() as large:
        large_use = np.ones(100_000_000, np.uint8)
    if small.nbytes is None or large.nbytes is None:
        pytest.skip("this system does not tell the peak of a part of a run")
    assert large.nbytes - small.nbytes > 50_000_000
    assert small_use.size < large_use.size


def test_the_reference_model_has_the_quality_of_its_card(shared: Path) -> None:
    text = shared / "assets" / "text" / "tinystories" / "valid.txt"
    subject = open_subject(driver.REFERENCE_MODEL)
    encoded = evaluation.encode_documents(read_documents(text), subject.codec, context=512, bos=subject.bos, limit=150)
    own, _ = evaluation.quality(subject.runner, encoded, subject.codec, bos=subject.bos)
    assert own.bits_per_char == pytest.approx(0.929, abs=0.0005)
