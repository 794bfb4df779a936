"""Generation: drives any runner, the reference interpreter among them, and measures it."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from hikui.lowering.errors import HikuiError, UsageError

Logits = npt.NDArray[np.float32]


class Runner(Protocol):
    """A model that is ready to run; its cache stays inside."""

    context_length: int

    def reset(self) -> None:
        """Forgets every token."""

    def forward(self, tokens: npt.NDArray[np.int64], past: int) -> Logits:
        """Logits [T, V] of tokens [T], with `past` tokens in the cache already."""

    def close(self) -> None:
        """Gives back what the runner holds."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the most likely one at temperature 0, else drawn with `seed`."""

    temperature: float = 0.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"A temperature of {self.temperature} makes no sense; give 0 (greedy) or more.")
        if self.top_k < 0:
            raise UsageError(f"A top-k of {self.top_k} makes no sense; give 0 (all tokens) or more.")
        if self.seed < 0:
            raise UsageError(f"A seed of {self.seed} makes no sense; give 0 or more.")

    def chooser(self) -> Callable[[npt.NDArray[np.float32]], int]:
        """A function from the logits [V] of one position to the next token."""
        generator = np.random.default_rng(self.seed)

        def choose(logits: npt.NDArray[np.float32]) -> int:
            if self.temperature == 0:
                return int(logits.argmax())
            scaled = logits.astype(np.float64) / self.temperature
            if 0 < self.top_k < scaled.size:
                # The stable order settles ties, so that a seed gives the same text on every machine.
                scaled[np.argsort(-scaled, kind="stable")[self.top_k :]] = -np.inf
            weights = np.exp(scaled - scaled.max())
            return int(np.searchsorted(np.cumsum(weights), generator.random() * weights.sum(), side="right"))

        return choose


@dataclass(frozen=True)
class Generation:
    """What came out.

    Attributes:
        tokens: the new tokens, without the one that ended the text.
        first_token_seconds: from the call to the first new token, the prompt's processing included.
        tokens_per_second: of the tokens after the first; None where there were none.
        full: whether the text ends because the cache is full.
    """

    tokens: list[int]
    first_token_seconds: float
    tokens_per_second: float | None
    full: bool = False


def stream(
    runner: Runner, prompt: Sequence[int], *, max_new_tokens: int, stop: Sequence[int], sampling: Sampling
) -> Iterator[int]:
    """The new tokens one by one, up to `max_new_tokens`, a token of `stop`, or a full cache.

    Raises:
        HikuiError: the prompt is empty or longer than the cache, or logits are not finite.
    """
    if not prompt:
        raise HikuiError("The prompt has no tokens, and the tokenizer puts none before a text; give a longer prompt.")
    if len(prompt) > runner.context_length:
        raise HikuiError(
            f"The prompt has {len(prompt)} tokens, but the cache holds {runner.context_length}; shorten the prompt or "
            "lower the model with a larger --context."
        )
    choose = sampling.chooser()
    runner.reset()
    step, past = np.asarray(prompt, dtype=np.int64), 0
    for _ in range(max_new_tokens):
        if past + step.size > runner.context_length:
            return
        logits = runner.forward(step, past)
        past += step.size
        if not np.isfinite(logits[-1]).all():
            raise HikuiError(
                f"After {past} tokens the model gives logits that are not finite, so there is no next token."
            )
        token = choose(logits[-1])
        if token in stop:
            return
        yield token
        step = np.array([token], dtype=np.int64)


def generate(
    runner: Runner,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    stop: Sequence[int] = (),
    sampling: Sampling = Sampling(),
    on_token: Callable[[int], None] | None = None,
) -> Generation:
    """Generates and times; see `stream`."""
    start = time.perf_counter()
    tokens: list[int] = []
    first = last = start
    for token in stream(runner, prompt, max_new_tokens=max_new_tokens, stop=stop, sampling=sampling):
        last = time.perf_counter()
        if not tokens:
            first = last
        tokens.append(token)
        if on_token is not None:
            on_token(token)
    if not tokens:
        first = last = time.perf_counter()
    later = len(tokens) - 1
    rate = later / (last - first) if later > 0 and last > first else None
    # A full cache takes one token less than there are: the last one was never read.
    full = len(prompt) + len(tokens) - 1 == runner.context_length and len(tokens) < max_new_tokens
    return Generation(tokens, first - start, rate, full)
