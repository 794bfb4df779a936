"""Quality and speed of anything that runs: one protocol for the float model, a lowered graph and an artefact.

Two protocols, both named in what is reported. Per document: BOS where the model has one, the document's first tokens
up to the context length. Per window: the documents joined, read in windows that overlap. Bits are summed over the
predicted tokens and divided by the characters that those tokens spell.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hikui.lowering.errors import HikuiError, UsageError
from hikui.lowering.generate import Runner, generate
from hikui.lowering.text import SEPARATOR, TextCodec, split_documents

PIECE = 256
"""Tokens in one call of a runner: bounds the logits that are alive at once."""

Progress = Callable[[str, int, int], None]
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Protocol:
    """How a text is read.

    Attributes:
        context: tokens that are read at a time, BOS among them.
        bos: the token at the start of each document or window; None for a model that has none.
        stride: tokens from one window to the next; None reads each document alone.
    """

    context: int
    bos: int | None
    stride: int | None = None

    @property
    def unit(self) -> str:
        """What the figures of one part are of: `document` or `window`."""
        return "document" if self.stride is None else "window"

    def __str__(self) -> str:
        if self.stride is None:
            start = "no BOS" if self.bos is None else "BOS"
            return (
                f"documents split at {SEPARATOR}, each alone: {start}, first {self.context} tokens; characters of the "
                "tokens read"
            )
        start = "without BOS" if self.bos is None else "with BOS at its start"
        least = self.context - self.stride + 1
        return (
            f"documents joined with {SEPARATOR} as it stands in the text; windows of {self.context} tokens every "
            f"{self.stride}, each alone, {start}; every token predicted once, after at least {least} tokens of its "
            "window but at the start of the text; characters of the text without separators"
        )

    def fields(self) -> dict[str, object]:
        """The same for programs."""
        return {
            "unit": self.unit,
            "context": self.context,
            "stride": self.stride,
            "bos": self.bos,
            "joined_with": None if self.stride is None else SEPARATOR,
        }


@dataclass(frozen=True)
class Excerpt:
    """Tokens that are run from an empty cache.

    Attributes:
        ids: all of them; the last one is predicted and not read.
        first: position of the first predicted one, at least 1; all after it are predicted too.
        characters: that the predicted ones spell.
    """

    ids: Sequence[int]
    first: int
    characters: int


@dataclass(frozen=True)
class Score:
    """What the predicted tokens of one document or window cost, in nats."""

    tokens: int
    characters: int
    nats: float


@dataclass(frozen=True)
class Quality:
    """How well a model predicts a text.

    Attributes:
        each: of every document or window, in their order.
        divergence: mean Kullback-Leibler divergence from the model it was compared with, in nats a token.
        agreement: share of positions where both give the same most likely token.
    """

    each: tuple[Score, ...]
    divergence: float | None = None
    agreement: float | None = None

    @property
    def documents(self) -> int:
        """How many documents or windows."""
        return len(self.each)

    @property
    def tokens(self) -> int:
        return sum(score.tokens for score in self.each)

    @property
    def characters(self) -> int:
        return max(1, sum(score.characters for score in self.each))

    @property
    def nats(self) -> float:
        """Negative log-likelihood of all predicted tokens."""
        return math.fsum(score.nats for score in self.each)

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats / self.tokens)

    @property
    def perplexity_error(self) -> float | None:
        """Standard error over documents or windows; None for a single one."""
        error = ratio_error([score.nats for score in self.each], [score.tokens for score in self.each])
        return None if error is None else self.perplexity * error

    @property
    def bits_per_char(self) -> float:
        return self.nats / math.log(2) / self.characters

    @property
    def bits_per_char_error(self) -> float | None:
        """Standard error over documents or windows; None for a single one."""
        return ratio_error([score.nats / math.log(2) for score in self.each], [score.characters for score in self.each])


@dataclass(frozen=True)
class Difference:
    """Bits per character above another model's on the same tokens, with the standard error of the pairs."""

    bits_per_char: float
    error: float | None


def paired(ours: Sequence[Score], theirs: Sequence[Score]) -> Difference:
    """The difference between two models, document by document: what both find hard or easy cancels.

    Raises:
        HikuiError: the two did not predict the same tokens.
    """
    if [(s.tokens, s.characters) for s in ours] != [(s.tokens, s.characters) for s in theirs]:
        raise HikuiError(
            "The two were not measured on the same tokens, so they cannot be paired; measure both with one tokenizer "
            "and one context."
        )
    bits = [(a.nats - b.nats) / math.log(2) for a, b in zip(ours, theirs, strict=True)]
    characters = [score.characters for score in ours]
    return Difference(math.fsum(bits) / max(1, sum(characters)), ratio_error(bits, characters))


def ratio_error(totals: Sequence[float], sizes: Sequence[float]) -> float | None:
    """Standard error of Σ totals / Σ sizes over independent parts (Cochran, Sampling Techniques, section 6.4).

    None where there are fewer than two parts, or nothing in them.
    """
    y, x = np.asarray(totals, dtype=np.float64), np.asarray(sizes, dtype=np.float64)
    if y.size < 2 or x.sum() <= 0:
        return None
    residuals = y - y.sum() / x.sum() * x
    return math.sqrt(y.size / (y.size - 1) * float(np.square(residuals).sum())) / float(x.sum())


@dataclass(frozen=True)
class Speed:
    """Medians over a few runs of the same prompt."""

    prompt_tokens: int
    new_tokens: int
    first_token_seconds: float
    tokens_per_second: float


# ── what is read ────────────────────────────────────────────────────────────────────────────────────────────────────


def read(
    text: str,
    codec: TextCodec,
    *,
    context: int,
    bos: int | None,
    window: int | None = None,
    stride: int | None = None,
    limit: int | None = None,
) -> tuple[Protocol, list[Excerpt]]:
    """What a text gives to predict: by documents, or by windows where their length is given.

    Args:
        text: as `text.read_text` gives it.
        codec: the model's tokenizer.
        context: the model's.
        bos: its BOS token.
        window: tokens that are read at a time.
        stride: tokens that each window predicts; by default all of its own.
        limit: read only so many documents.

    Raises:
        UsageError: the windows do not fit the context, or each other.
        HikuiError: there is nothing to predict.
    """
    if window is None:
        encoded = encode_documents(split_documents(text), codec, context=context, bos=bos, limit=limit)
        return Protocol(context, bos), document_excerpts(encoded, codec, bos=bos)
    every = window if stride is None else stride
    check_windows(window, every, context)
    excerpts = window_excerpts(text, codec, window=window, stride=every, bos=bos, limit=limit)
    return Protocol(window, bos, every), excerpts


def encode_documents(
    documents: Sequence[str], codec: TextCodec, *, context: int, bos: int | None, limit: int | None = None
) -> list[list[int]]:
    """Token ids of each document as the protocol reads them; documents without a token to predict are left out.

    Raises:
        HikuiError: nothing is left.
    """
    prefix = [] if bos is None else [bos]
    encoded = [(prefix + codec.encode(document))[:context] for document in documents[:limit]]
    kept = [ids for ids in encoded if len(ids) > 1]
    if not kept:
        raise HikuiError("The text has no document with two tokens, so nothing can be predicted; give a longer text.")
    return kept


def document_excerpts(documents: Sequence[Sequence[int]], codec: TextCodec, *, bos: int | None) -> list[Excerpt]:
    """Encoded documents, of which all tokens but the first are predicted."""
    return [Excerpt(ids, 1, len(codec.decode(list(ids if bos is None else ids[1:])))) for ids in documents]


def check_windows(window: int, stride: int, context: int) -> None:
    """Refuses windows that a model cannot read.

    Raises:
        UsageError: the window is longer than the context, or the stride than the window.
    """
    if window > context:
        raise UsageError(
            f"A window of {window} tokens is longer than the context of {context}; give a smaller --window."
        )
    if stride > window:
        raise UsageError(
            f"A stride of {stride} would skip tokens between windows of {window}; give a --stride of at most {window}."
        )


def window_excerpts(
    text: str, codec: TextCodec, *, window: int, stride: int, bos: int | None, limit: int | None = None
) -> list[Excerpt]:
    """Windows over the joined text: of `window` tokens, BOS among them, of which the last `stride` are predicted.

    The first one is predicted from its start, and the last one may predict fewer.

    Args:
        text: as `text.read_text` gives it.
        codec: the model's tokenizer.
        window: tokens that are read at a time.
        stride: tokens that each window predicts.
        bos: put at the start of each window.
        limit: read only so many documents.

    Raises:
        HikuiError: there is nothing to predict.
    """
    if limit is not None:
        text = _first_documents(text, limit)
    ids, ends = codec.encode_with_ends(text)
    counted = _counted_characters(text)
    prefix = [] if bos is None else [bos]
    room = window - len(prefix)
    # Without BOS nothing predicts the text's first token.
    start = 0 if prefix else 1
    excerpts: list[Excerpt] = []
    while start < len(ids):
        end = min(len(ids), start + (stride if excerpts else window))
        # `room` tokens are read besides BOS, and the one after them is predicted from the last.
        before = ids[max(0, end - 1 - room) : end]
        characters = int(counted[ends[end - 1]] - counted[ends[start - 1] if start else 0])
        excerpts.append(Excerpt(prefix + before, len(prefix) + len(before) - (end - start), characters))
        start = end
    if not excerpts:
        raise HikuiError("The text has no two tokens, so nothing can be predicted; give a longer text.")
    return excerpts


def _first_documents(text: str, limit: int) -> str:
    parts = text.split(SEPARATOR)
    full = [index for index, part in enumerate(parts) if part.strip()]
    return text if limit >= len(full) else SEPARATOR.join(parts[: full[limit - 1] + 1])


def _counted_characters(text: str) -> npt.NDArray[np.int64]:
    """How many characters up to each position count: those of separators do not."""
    counts = np.ones(len(text) + 1, dtype=np.int64)
    counts[0] = 0
    at = text.find(SEPARATOR)
    while at >= 0:
        counts[at + 1 : at + 1 + len(SEPARATOR)] = 0
        at = text.find(SEPARATOR, at + len(SEPARATOR))
    return np.cumsum(counts)


# ── what is measured ────────────────────────────────────────────────────────────────────────────────────────────────


def quality(
    runner: Runner,
    documents: Sequence[Sequence[int]],
    codec: TextCodec,
    *,
    bos: int | None,
    against: Runner | None = None,
    progress: Progress | None = None,
) -> tuple[Quality, Quality | None]:
    """`measure` on encoded documents."""
    return measure(runner, document_excerpts(documents, codec, bos=bos), against=against, progress=progress)


def measure(
    runner: Runner,
    excerpts: Sequence[Excerpt],
    *,
    against: Runner | None = None,
    progress: Progress | None = None,
) -> tuple[Quality, Quality | None]:
    """Measures a model, and the one it is held against on the same tokens.

    Raises:
        HikuiError: a model gives logits that are not finite, or the two have other vocabularies.
    """
    scores: list[Score] = []
    others: list[Score] = []
    divergence, same, tokens = 0.0, 0, 0
    for index, excerpt in enumerate(excerpts):
        ours = log_probabilities(runner, excerpt.ids)[excerpt.first - 1 :]
        targets = np.asarray(excerpt.ids[excerpt.first :])
        positions = np.arange(targets.size)
        scores.append(Score(targets.size, excerpt.characters, -float(ours[positions, targets].sum())))
        if against is not None:
            theirs = log_probabilities(against, excerpt.ids)[excerpt.first - 1 :]
            if theirs.shape != ours.shape:
                raise HikuiError(
                    f"The models cannot be compared token by token: their vocabularies have {ours.shape[1]} and "
                    f"{theirs.shape[1]} tokens; evaluate each alone and compare bits per character."
                )
            others.append(Score(targets.size, excerpt.characters, -float(theirs[positions, targets].sum())))
            divergence += float((np.exp(theirs) * (theirs - ours)).sum())
            same += int((ours.argmax(axis=1) == theirs.argmax(axis=1)).sum())
        tokens += targets.size
        if not math.isfinite(scores[-1].nats) or (others and not math.isfinite(others[-1].nats)):
            raise HikuiError("The model gives logits that are not finite on this text; check its weights and recipe.")
        if progress is not None:
            progress("text", index + 1, len(excerpts))
    if against is None:
        return Quality(tuple(scores)), None
    return Quality(tuple(scores), divergence / tokens, same / tokens), Quality(tuple(others))


def log_probabilities(runner: Runner, ids: Sequence[int], past: int = 0) -> Array:
    """Log-probabilities [T − 1 − past, V] of the tokens after position `past`, which is how many are in the cache."""
    if past == 0:
        runner.reset()
    tokens = np.asarray(ids[past:-1], dtype=np.int64)
    rows = [runner.forward(tokens[at : at + PIECE], past + at) for at in range(0, tokens.size, PIECE)]
    logits = np.concatenate(rows).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    return np.asarray(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)), dtype=np.float64)


def speed(runner: Runner, prompt: Sequence[int], *, new_tokens: int = 32, runs: int = 3) -> Speed:
    """Times generation after a prompt: a warm-up, then medians."""
    room = runner.context_length - len(prompt)
    new_tokens = min(new_tokens, room)
    if new_tokens < 2:
        raise HikuiError(
            f"A prompt of {len(prompt)} tokens leaves no room to time generation in a cache of {runner.context_length}."
        )
    results = [generate(runner, prompt, max_new_tokens=new_tokens) for _ in range(runs + 1)][1:]
    rates = sorted(result.tokens_per_second or 0.0 for result in results)
    first = sorted(result.first_token_seconds for result in results)
    return Speed(len(prompt), new_tokens, first[runs // 2], rates[runs // 2])


class PeakMemory:
    """The largest resident set of this process while it is entered; `nbytes` is None where Linux does not tell."""

    nbytes: int | None = None

    def __enter__(self) -> "PeakMemory":
        self._resettable = True
        try:
            # Linux: forget the peak so far, so that what came before does not count.
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self._resettable = False
        return self

    def __exit__(self, *_: object) -> None:
        if not self._resettable:
            return
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                self.nbytes = int(line.split()[1]) * 1024
