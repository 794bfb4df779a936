"""Texts of a model's own: what counts as repeated and as a loop, against the definitions written out."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hikui.lowering.artefact.text import TextCodec
from hikui.lowering.errors import UsageError
from hikui.lowering.evaluation.samples import Sample, continuations, loop_start, read_prompts, repetition

TOKENS = st.lists(st.integers(0, 2), max_size=24)


@given(TOKENS, st.integers(1, 5))
def test_what_stood_there_before_is_repeated(tokens: list[int], length: int) -> None:
    again = total = 0
    for at in range(len(tokens) - length + 1):
        total += 1
        again += any(tokens[at : at + length] == tokens[before : before + length] for before in range(at))
    assert repetition(tokens, length) == pytest.approx(again / total if total else 0.0)


@given(TOKENS)
def test_a_loop_is_a_phrase_said_three_times_to_the_end(tokens: list[int]) -> None:
    starts = []
    for start in range(len(tokens)):
        end = tokens[start:]
        for period in range(2, len(end) // 3 + 1):
            if all(end[at] == end[at - period] for at in range(period, len(end))):
                starts.append(start)
    assert loop_start(tokens) == (min(starts) if starts else None)


def test_examples() -> None:
    assert loop_start([7, 8, 9, 1, 2, 1, 2, 1, 2]) == 3
    assert loop_start([1, 2, 1, 2, 1, 2, 9]) is None
    assert loop_start([]) is None
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(0.2)
    assert repetition([1, 2, 3]) == 0.0


class Counting:
    """A runner whose likeliest next token is the last one plus one."""

    context_length = 12

    def reset(self) -> None:
        self.seen = 0

    def forward(self, tokens: npt.NDArray[np.int64], past: int) -> npt.NDArray[np.float32]:
        assert past == self.seen
        self.seen += tokens.size
        return np.eye(50, dtype=np.float32)[tokens + 1]

    def close(self) -> None:
        """Holds nothing."""


class Letters(TextCodec):
    """a is 0, b is 1, …"""

    def __init__(self) -> None:
        """Needs no file."""

    def encode_prompt(self, text: str) -> list[int]:
        return [ord(letter) - ord("a") for letter in text]

    def decode(self, tokens: object, *, special: bool = False) -> str:
        assert isinstance(tokens, list)
        return "".join(chr(token + ord("a")) for token in tokens)


def test_texts_go_on_from_the_prompts_to_a_token_that_ends_them() -> None:
    found = continuations(Counting(), Letters(), ["ab", "f"], 4, stop=[8])
    assert found == [Sample("ab", "cdef", 4, 0.0, None), Sample("f", "gh", 2, 0.0, None)]
    # Or to the end of the cache.
    assert continuations(Counting(), Letters(), ["a"], 40)[0].tokens == 12


def test_prompts(tmp_path: Path) -> None:
    assert len(read_prompts(None)) == 8
    path = tmp_path / "prompts.txt"
    path.write_text("one two \n\n  three\n", "utf-8")
    assert read_prompts(path) == ["one two", "three"]
    path.write_text("\n", "utf-8")
    with pytest.raises(UsageError, match=r"prompts.txt has no prompts; give one a line"):
        read_prompts(path)
    with pytest.raises(UsageError, match=r"absent cannot be read as a text of prompts"):
        read_prompts(tmp_path / "absent")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="cannot be read as a text of prompts"):
        read_prompts(path)
