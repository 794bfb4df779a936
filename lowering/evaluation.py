"""Quality and speed of anything that runs: one protocol for the float model, a lowered graph and an artefact.

Per document: BOS where the model has one, the document's first tokens up to the context length, one forward pass in
pieces. Bits are summed over all tokens but the first, and divided by the characters that those tokens spell.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hikui.lowering.errors import HikuiError
from hikui.lowering.generate import Runner, generate
from hikui.lowering.text import SEPARATOR, TextCodec

PIECE = 256
"""Tokens in one call of a runner: bounds the logits that are alive at once."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Quality:
    """How well a model predicts a text.

    Attributes:
        nats: negative log-likelihood of all predicted tokens.
        divergence: mean Kullback-Leibler divergence from the model it was compared with, in nats a token.
        agreement: share of positions where both give the same most likely token.
    """

    documents: int
    tokens: int
    characters: int
    nats: float
    divergence: float | None = None
    agreement: float | None = None

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats / self.tokens)

    @property
    def bits_per_char(self) -> float:
        return self.nats / math.log(2) / self.characters


@dataclass(frozen=True)
class Speed:
    """Medians over a few runs of the same prompt."""

    prompt_tokens: int
    new_tokens: int
    first_token_seconds: float
    tokens_per_second: float


def protocol(context: int, bos: int | None) -> str:
    """The protocol in words, for whoever reads the figures."""
    start = "no BOS" if bos is None else "BOS"
    return f"documents split at {SEPARATOR}, each alone: {start}, first {context} tokens; characters of the tokens read"


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


def quality(
    runner: Runner,
    documents: Sequence[Sequence[int]],
    codec: TextCodec,
    *,
    bos: int | None,
    against: Runner | None = None,
    progress: Progress | None = None,
) -> tuple[Quality, Quality | None]:
    """Measures a model on encoded documents, and the one it is held against on the same tokens.

    Raises:
        HikuiError: a model gives logits that are not finite, or the two have other vocabularies.
    """
    totals = np.zeros(2)
    divergence, same, tokens, characters = 0.0, 0, 0, 0
    for index, ids in enumerate(documents):
        ours = _log_probabilities(runner, ids)
        targets = np.asarray(ids[1:])
        positions = np.arange(targets.size)
        totals[0] -= ours[positions, targets].sum()
        if against is not None:
            theirs = _log_probabilities(against, ids)
            if theirs.shape != ours.shape:
                raise HikuiError(
                    f"The models cannot be compared token by token: their vocabularies have {ours.shape[1]} and "
                    f"{theirs.shape[1]} tokens; evaluate each alone and compare bits per character."
                )
            totals[1] -= theirs[positions, targets].sum()
            divergence += float((np.exp(theirs) * (theirs - ours)).sum())
            same += int((ours.argmax(axis=1) == theirs.argmax(axis=1)).sum())
        tokens += targets.size
        characters += len(codec.decode(list(ids if bos is None else ids[1:])))
        if progress is not None:
            progress("document", index + 1, len(documents))
    if not math.isfinite(totals.sum()):
        raise HikuiError("The model gives logits that are not finite on this text; check its weights and recipe.")
    base = (len(documents), tokens, max(characters, 1))
    if against is None:
        return Quality(*base, float(totals[0])), None
    compared = Quality(*base, float(totals[0]), divergence / tokens, same / tokens)
    return compared, Quality(*base, float(totals[1]))


def _log_probabilities(runner: Runner, ids: Sequence[int]) -> npt.NDArray[np.float64]:
    """Log-probabilities [T-1, V] of every next token."""
    runner.reset()
    tokens = np.asarray(ids[:-1], dtype=np.int64)
    rows = [runner.forward(tokens[at : at + PIECE], at) for at in range(0, tokens.size, PIECE)]
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
