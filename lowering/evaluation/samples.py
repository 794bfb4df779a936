"""Texts that a model goes on with by itself, and how much they repeat: what figures on a given text do not show.

A model that predicts a text well may still loop when it goes on from its own words.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from hikui.lowering.artefact.generate import Runner, generate
from hikui.lowering.artefact.text import TextCodec
from hikui.lowering.errors import UsageError
from hikui.lowering.progress import Progress, no_progress

GRAM = 4
"""Tokens of the runs whose repetition is counted, as most papers count them."""

_TIMES = 3
"""A phrase said so often at the end of a text is a loop (Holtzman et al., ICLR 2020, arXiv 1904.09751, section 5.4)."""

_PHRASE = 2
"""Tokens that a phrase has at least."""


@dataclass(frozen=True)
class Sample:
    """A greedy continuation.

    Attributes:
        prompt: what it goes on from.
        text: what came.
        tokens: how many that are.
        repeated: the share of its runs of four tokens that stand in it before (1 − unique / all: seq-rep-4 of Welleck
            et al., ICLR 2020, arXiv 1908.04319); 0 where there are none.
        loop_from: the token at which it begins to say one phrase to its end, three times or more; None if it does not.
    """

    prompt: str
    text: str
    tokens: int
    repeated: float
    loop_from: int | None


def read_prompts(path: Path | None) -> list[str]:
    """Prompts, one a line; those that come with hikui where no file is given.

    Raises:
        UsageError: the file cannot be read, or has no prompt.
    """
    if path is None:
        content = (files(__package__) / "prompts.txt").read_text("utf-8")
    else:
        try:
            content = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{path} cannot be read as a text of prompts: {error}.") from error
    prompts = [line.strip() for line in content.splitlines() if line.strip()]
    if not prompts:
        raise UsageError(f"{path} has no prompts; give one a line.")
    return prompts


def continuations(
    runner: Runner,
    codec: TextCodec,
    prompts: Sequence[str],
    tokens: int,
    *,
    stop: Sequence[int] = (),
    progress: Progress = no_progress,
) -> list[Sample]:
    """Goes on from each prompt greedily, up to so many tokens or a token of `stop`."""
    found = []
    for number, prompt in enumerate(prompts):
        progress("samples", number, len(prompts))
        made = generate(runner, codec.encode_prompt(prompt), max_new_tokens=tokens, stop=stop).tokens
        found.append(Sample(prompt, codec.decode(made), len(made), repetition(made), loop_start(made)))
    progress("samples", len(prompts), len(prompts))
    return found


def repetition(tokens: Sequence[int], length: int = GRAM) -> float:
    """The share of runs of so many tokens that have been there before."""
    runs = [tuple(tokens[at : at + length]) for at in range(len(tokens) - length + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def loop_start(tokens: Sequence[int]) -> int | None:
    """Where the loop begins that a text ends in: the longest such end; None for none."""
    start = None
    for period in range(_PHRASE, len(tokens) // _TIMES + 1):
        at = len(tokens) - period
        while at > 0 and tokens[at - 1] == tokens[at - 1 + period]:
            at -= 1
        if len(tokens) - at >= _TIMES * period and (start is None or at < start):
            start = at
    return start
