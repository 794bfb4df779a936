"""Whole models in turns: what is counted, and the ratios."""

import numpy as np
import numpy.typing as npt
import pytest
from benchmarks.decode import Row, decode, quartiles, table


class Patient:
    """A runner that notes what it is given."""

    context_length = 64

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def reset(self) -> None:
        self.seen.clear()

    def forward(self, tokens: npt.NDArray[np.int64], past: int) -> npt.NDArray[np.float32]:
        self.seen.append((tokens.size, past))
        return np.zeros((1, 8), np.float32)

    def close(self) -> None:
        """Holds nothing."""


def test_one_token_at_a_time_behind_the_last() -> None:
    runner = Patient()
    assert decode(runner, 3) >= 0
    assert runner.seen == [(1, 0), (1, 1), (1, 2), (1, 3)]


def test_ratios_are_of_each_round() -> None:
    first, second = Row("a", 4, 5, 10, [8.0, 10.0, 12.0]), Row("b", 1.6, 2, 5, [4.0, 4.0, 3.0])
    assert second.ratios(first) == [2.0, 2.5, 4.0]
    assert quartiles([1.0, 2.0, 3.0]) == pytest.approx((2.0, 1.5, 2.5))
    assert table([first, second])[-1] == "| b | 1.60 | 2.00 | 5.0 | 4.0 (3.5–4.0) | 2.50 (2.25–3.25) |"
