"""What the demonstration calls the same story."""

import runpy
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from hikui.lowering.artefact.generate import Runner
from hikui.lowering.artefact.manifest import Reference

EXAMPLE = Path(__file__).parents[3] / "examples" / "demo.py"
TOLD = Reference(
    np.array([5, 6, 1, 2, 3]),
    2,
    np.array([[0, 9, 1, 0], [0, 1, 9, 0], [0, 8.9, 1, 9], [7, 0, 1, 0]], np.float32),
)
"""Two tokens of a prompt, three that follow; at the third, tokens 1 and 3 are close."""


class Fixed(Runner):
    """Gives the logits of the story, each moved."""

    context_length = 8

    def __init__(self, moved: float) -> None:
        self.moved = moved

    def forward(self, tokens: Sequence[int] | np.ndarray, position: int) -> np.ndarray:
        end = position + len(tokens)
        return TOLD.logits[end - TOLD.prompt : end - TOLD.prompt + 1] + np.float32(self.moved)

    def reset(self) -> None: ...

    def close(self) -> None: ...


@pytest.fixture(scope="module")
def compare() -> Callable[[Reference, list[int], Runner, float], tuple[bool, str]]:
    found: Callable[[Reference, list[int], Runner, float], tuple[bool, str]] = runpy.run_path(str(EXAMPLE))["compare"]
    return found


def test_an_equal_continuation_is_the_same_text(compare: Callable[..., tuple[bool, str]]) -> None:
    assert compare(TOLD, [1, 2, 3], Fixed(8.0), 0.05) == (True, "same text")


@pytest.mark.parametrize(("moved", "right"), [(0.2, True), (0.44, True), (0.5, False), (np.nan, False)])
def test_another_story_is_right_only_where_its_logits_are(
    compare: Callable[..., tuple[bool, str]], moved: float, right: bool
) -> None:
    found, verdict = compare(TOLD, [1, 2, 1], Fixed(moved), 0.05)
    assert found is right
    assert verdict.startswith("same text to token 2" if right else "DIFFERENT: same text to token 2")


def test_right_logits_do_not_excuse_another_token_or_length(compare: Callable[..., tuple[bool, str]]) -> None:
    assert compare(TOLD, [1, 2, 0], Fixed(0.2), 0.05)[0] is False
    assert compare(TOLD, [1, 2], Fixed(0.0), 0.05) == (False, "DIFFERENT LENGTH: 2 tokens")
