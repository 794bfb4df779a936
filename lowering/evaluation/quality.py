"""Quality and speed of anything that runs: one protocol for the float model, a lowered graph and an artefact.

How a text is read is `protocols.py`'s. Bits are summed over the predicted tokens and divided by the characters of the
text that those tokens stand for.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hikui.lowering.artefact.generate import Runner, generate
from hikui.lowering.errors import HikuiError
from hikui.lowering.evaluation.protocols import Excerpt

PIECE = 256
"""Tokens in one call of a runner: bounds the logits that are alive at once."""

Progress = Callable[[str, int, int], None]
Array = npt.NDArray[np.float64]


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
