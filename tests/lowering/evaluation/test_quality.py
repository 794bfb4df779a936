import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from hikui.lowering.app.assemble import Prepared
from hikui.lowering.app.request import REFERENCE_MODEL, Request
from hikui.lowering.app.runnable_model import open_runnable_model
from hikui.lowering.artefact.text import SEPARATOR, TextCodec, read_documents, read_text
from hikui.lowering.errors import HikuiError, UsageError
from hikui.lowering.evaluation import protocols
from hikui.lowering.evaluation import quality as evaluation
from hikui.lowering.ir.interpreter import ReferenceRunner
from tests.lowering import made_tokenizers


class Uniform:
    """Gives every token of 32 the same probability."""

    context_length = 8

    def reset(self) -> None: ...

    def forward(self, tokens: npt.NDArray[np.int64], past: int) -> npt.NDArray[np.float32]:
        return np.full((tokens.size, 32), 1.5, np.float32)

    def close(self) -> None: ...


def test_a_uniform_model_needs_five_bits_a_token(tiny: Path) -> None:
    codec = TextCodec(tiny)
    documents = [codec.encode_prompt("abc"), codec.encode_prompt("hello")]
    excerpts = [protocols.Excerpt([token % 32 for token in d], 1, len(d) - 1) for d in documents]
    own, other = evaluation.measure(Uniform(), excerpts)
    assert other is None
    assert own.tokens == sum(len(document) - 1 for document in documents)
    assert own.perplexity == pytest.approx(32)
    assert own.nats / math.log(2) == pytest.approx(5 * own.tokens)


def test_the_loss_is_that_of_the_float_model(tiny: Path, stories: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    runnable = open_runnable_model(Request(tiny, None))
    documents = read_documents(stories)
    excerpts = protocols.document_excerpts(documents, runnable.codec, context=40, limit=4)
    encoded = [list(excerpt.ids) for excerpt in excerpts]
    assert all(ids[0] == 0 and len(ids) == 40 for ids in encoded)
    own, _ = evaluation.measure(runnable.runner, excerpts)
    nats = 0.0
    characters = 0
    for ids in encoded:
        tokens = torch.tensor([ids])
        with torch.no_grad():
            logits = model(tokens).logits[0, :-1].double()
        nats += float(torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum"))
        characters += len(runnable.codec.decode(ids[1:]))
    assert own.documents == 4
    assert own.nats == pytest.approx(nats, rel=1e-6)
    assert own.bits_per_char == pytest.approx(nats / math.log(2) / characters, rel=1e-6)


def test_a_document_longer_than_a_piece_is_the_same_in_pieces(
    tiny: Path, stories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runnable = open_runnable_model(Request(tiny, None))
    excerpts = protocols.document_excerpts(read_documents(stories), runnable.codec, context=50, limit=2)
    whole, _ = evaluation.measure(runnable.runner, excerpts)
    monkeypatch.setattr(evaluation, "PIECE", 7)
    pieces, _ = evaluation.measure(runnable.runner, excerpts)
    assert pieces.nats == pytest.approx(whole.nats, rel=1e-6)


def test_comparison_with_itself_and_with_a_lowered_form(tiny: Path, stories: Path, prepared: Prepared) -> None:
    runnable = open_runnable_model(Request(tiny, None))
    excerpts = protocols.document_excerpts(read_documents(stories), runnable.codec, context=32)
    same, also = evaluation.measure(runnable.runner, excerpts, against=runnable.runner)
    assert also is not None
    assert same.nats == also.nats
    assert same.divergence == pytest.approx(0, abs=1e-9)
    assert same.agreement == 1
    lowered = ReferenceRunner(prepared.program)
    other, _ = evaluation.measure(lowered, excerpts, against=runnable.runner)
    assert other.divergence is not None
    assert other.divergence > 1e-7
    assert other.agreement is not None
    assert 0 < other.agreement <= 1


def test_models_of_other_vocabularies_are_not_compared_token_by_token(tiny: Path) -> None:
    runnable = open_runnable_model(Request(tiny, None))
    with pytest.raises(HikuiError, match="vocabularies have 32 and 131 tokens"):
        evaluation.measure(Uniform(), [protocols.Excerpt([0, 1, 2], 1, 2)], against=runnable.runner)


def test_logits_that_are_not_finite_are_refused(tiny: Path) -> None:
    class Broken(Uniform):
        def forward(self, tokens: npt.NDArray[np.int64], past: int) -> npt.NDArray[np.float32]:
            return np.full((tokens.size, 32), np.nan, np.float32)

    with pytest.raises(HikuiError, match="not finite"):
        evaluation.measure(Broken(), [protocols.Excerpt([0, 1, 2], 1, 2)])


def test_a_text_without_tokens_to_predict_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(HikuiError, match="no document with two tokens"):
        protocols.document_excerpts(["a"], without_bos(tmp_path / "bare"), context=8)
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n<|endoftext|>\n ")
    with pytest.raises(UsageError, match=r"empty\.txt is empty"):
        read_documents(empty)
    empty.write_bytes(b"abc\xff")
    with pytest.raises(UsageError, match="not UTF-8: byte 3"):
        read_documents(empty)
    with pytest.raises(UsageError, match="No such file"):
        read_documents(tmp_path / "missing.txt")


def without_bos(folder: Path) -> TextCodec:
    """A tokenizer of the same tokens that puts none before a text."""
    return TextCodec(made_tokenizers.save(made_tokenizers.byte_level(""), folder))


def naive_windows(ids: list[int], window: int, stride: int, bos: int | None) -> list[tuple[list[int], list[int]]]:
    """What each window reads, and what it predicts."""
    prefix = [] if bos is None else [bos]
    out: list[tuple[list[int], list[int]]] = []
    done = 0 if prefix else 1
    while done < len(ids):
        end = min(done + (stride if out else window), len(ids))
        room = window - len(prefix)
        out.append((prefix + ids[: end - 1][-room:], ids[done:end]))
        done = end
    return out


@pytest.mark.parametrize("bos", [0, None])
@pytest.mark.parametrize(("window", "stride"), [(16, 4), (16, 16), (33, 1), (2, 1), (64, 30), (5, 4)])
def test_windows_predict_every_token_once_with_their_context(
    tiny: Path, stories: Path, window: int, stride: int, bos: int | None, tmp_path: Path
) -> None:
    codec, text = TextCodec(tiny) if bos == 0 else without_bos(tmp_path), read_text(stories)[:400]
    ids = codec.encode(text)
    excerpts = protocols.window_excerpts(text, codec, window=window, stride=stride)
    found = [(list(excerpt.ids[:-1]), list(excerpt.ids[excerpt.first :])) for excerpt in excerpts]
    assert found == naive_windows(ids, window, stride, bos)
    assert [token for _, targets in found for token in targets] == (ids if bos is not None else ids[1:])
    assert all(len(read) <= window for read, _ in found)
    assert all(excerpt.first >= window - stride + 1 for excerpt in excerpts[1:])
    counted = len(text) - text.count(SEPARATOR) * len(SEPARATOR) - (0 if bos is not None else 1)
    assert text.count(SEPARATOR) > 0
    assert sum(excerpt.characters for excerpt in excerpts) == counted


def test_the_loss_over_windows_is_that_of_transformers(tiny: Path, stories: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    runnable, text = open_runnable_model(Request(tiny, None)), read_text(stories)
    protocol, excerpts = protocols.read(text, runnable.codec, context=64, window=40, stride=25, limit=2)
    own, _ = evaluation.measure(runnable.runner, excerpts)
    ids = runnable.codec.encode(SEPARATOR.join(text.split(SEPARATOR)[:2]))
    nats = []
    for read, targets in naive_windows(ids, 40, 25, 0):
        with torch.no_grad():
            rows = model(torch.tensor([read])).logits[0].double().log_softmax(-1)[-len(targets) :]
        nats.append(-float(rows.gather(1, torch.tensor(targets)[:, None]).sum()))
    assert [score.nats for score in own.each] == pytest.approx(nats, rel=1e-5)
    assert own.tokens == len(ids)
    assert protocol.fields() == {"unit": "window", "context": 40, "stride": 25, "prefix": [0], "joined_with": SEPARATOR}
    assert "windows of 40 tokens every 25" in str(protocol)
    assert "at least 16 tokens" in str(protocol)


def test_windows_that_do_not_fit_are_refused(tiny: Path, tmp_path: Path) -> None:
    codec = TextCodec(tiny)
    with pytest.raises(UsageError, match="window of 65 tokens is longer than the context of 64"):
        protocols.read("a b", codec, context=64, window=65)
    with pytest.raises(UsageError, match="stride of 9 would skip tokens between windows of 8"):
        protocols.read("a b", codec, context=64, window=8, stride=9)
    with pytest.raises(HikuiError, match="no two tokens"):
        protocols.read("a", without_bos(tmp_path), context=64, window=8)


def test_a_ratio_has_the_standard_error_that_resampling_gives() -> None:
    generator = np.random.default_rng(3)
    sizes = generator.uniform(20, 400, 60)
    totals = sizes * generator.normal(1.0, 0.2, 60)
    draws = generator.integers(0, 60, (20000, 60))
    resampled = totals[draws].sum(axis=1) / sizes[draws].sum(axis=1)
    assert evaluation.ratio_error(totals.tolist(), sizes.tolist()) == pytest.approx(resampled.std(), rel=0.05)
    # Where all parts are of one size it is the standard error of a mean.
    plain = evaluation.ratio_error(totals.tolist(), [1.0] * 60)
    assert plain == pytest.approx(totals.std(ddof=1) / math.sqrt(60))
    assert evaluation.ratio_error([1.0], [2.0]) is None


def test_a_paired_difference_is_that_of_the_two_figures_and_surer_than_either() -> None:
    generator = np.random.default_rng(4)
    base = [evaluation.Score(100, int(c), float(c) * float(h)) for c, h in zip(
        generator.integers(50, 500, 40), generator.uniform(0.5, 1.5, 40), strict=True
    )]  # fmt: skip
    worse = [evaluation.Score(s.tokens, s.characters, s.nats + 0.01 * s.characters) for s in base]
    ours, theirs = evaluation.Quality(tuple(worse)), evaluation.Quality(tuple(base))
    found = evaluation.paired(ours.each, theirs.each)
    assert found.bits_per_char == pytest.approx(ours.bits_per_char - theirs.bits_per_char)
    assert found.bits_per_char == pytest.approx(0.01 / math.log(2))
    assert found.error == pytest.approx(0, abs=1e-9)
    assert theirs.bits_per_char_error is not None
    assert theirs.bits_per_char_error > 0.01
    assert theirs.perplexity_error is not None
    with pytest.raises(HikuiError, match="not measured on the same tokens"):
        evaluation.paired(worse[1:], base)


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
    runnable = open_runnable_model(Request(REFERENCE_MODEL, None))
    excerpts = protocols.document_excerpts(read_documents(text), runnable.codec, context=512, limit=150)
    own, _ = evaluation.measure(runnable.runner, excerpts)
    assert own.bits_per_char == pytest.approx(0.929, abs=0.0005)
