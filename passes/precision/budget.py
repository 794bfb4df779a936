"""Choosing one format for each group of sites so that what they take fits a budget and the costs are least."""

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from hikui.lowering.errors import HikuiError


@dataclass(frozen=True)
class Candidates:
    """A group of sites that get one format together.

    Attributes:
        sites: their names.
        formats, spent, costs: the candidates, what the group takes in each of the budget, and what it loses.
        weights: how many weights the group has.
    """

    sites: tuple[str, ...]
    formats: tuple[str, ...]
    spent: tuple[int, ...]
    costs: tuple[float, ...]
    weights: int


def cheapest(choices: Sequence[Candidates]) -> list[int]:
    """The pick that takes the least for each choice; of equal ones the one with the least cost, then the first."""
    return [_cheapest(choice) for choice in choices]


def _cheapest(choice: Candidates) -> int:
    return min(range(len(choice.formats)), key=lambda pick: (choice.spent[pick], choice.costs[pick], pick))


def solve(choices: Sequence[Candidates], budget: int) -> list[int]:
    """The picks with the least sum of costs that do not pass the budget.

    Groups that are alike in every number are interchangeable; the earlier one then gets the larger format, so that the
    answer does not depend on how the solver breaks ties.

    Args:
        choices: at least one.
        budget: in the unit of `Candidates.spent`; `cheapest` must fit it.

    Raises:
        HikuiError: the solver gives up.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    counts = [len(choice.formats) for choice in choices]
    first = np.cumsum([0, *counts])
    costs = np.array([cost for choice in choices for cost in choice.costs])
    spent = np.array([size for choice in choices for size in choice.spent], dtype=np.float64)
    # Costs enter as losses over the best format, in units of the largest: the solver's tolerances are absolute.
    losses = np.concatenate([costs[a:b] - costs[a:b].min() for a, b in pairwise(first)])
    losses /= losses.max() or 1.0
    rows = np.repeat(np.arange(len(choices)), counts)
    one_each = csr_array(
        (np.ones(first[-1]), (rows, np.arange(first[-1]))),
        shape=(len(choices), first[-1]),
    )
    constraints = [LinearConstraint(one_each, 1, 1), LinearConstraint(spent[None] / max(budget, 1), -np.inf, 1.0)]
    while True:
        with _silent_stdout():
            answer = milp(
                losses,
                integrality=np.ones(first[-1]),
                bounds=Bounds(0, 1),
                constraints=constraints,
                options={"mip_rel_gap": 0.0},
            )
        if answer.x is None:
            raise HikuiError(f"The solver found no assignment within the budget: {answer.message}")
        picks = [int(np.argmax(answer.x[a:b])) for a, b in pairwise(first)]
        if sum(choice.spent[pick] for choice, pick in zip(choices, picks, strict=True)) <= budget:
            return _ordered(choices, picks)
        # The solver's tolerance let a little too much through: these picks are forbidden together.
        row = np.zeros(first[-1])
        row[first[:-1] + np.array(picks)] = 1.0
        constraints.append(LinearConstraint(row[None], -np.inf, len(choices) - 1))


@contextmanager
def _silent_stdout() -> Iterator[None]:
    """Keeps what HiGHS prints past Python out of standard output, which belongs to the program's own results."""
    flush = ctypes.CDLL(None).fflush
    sys.stdout.flush()
    flush(None)
    kept = os.dup(1)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        flush(None)
        os.dup2(kept, 1)
        os.close(kept)


def _ordered(choices: Sequence[Candidates], picks: Sequence[int]) -> list[int]:
    alike: dict[tuple[object, ...], list[int]] = {}
    for index, choice in enumerate(choices):
        alike.setdefault((choice.formats, choice.spent, choice.costs), []).append(index)
    out = list(picks)
    for indices in alike.values():
        sizes = choices[indices[0]].spent
        given = sorted((picks[i] for i in indices), key=lambda pick: (-sizes[pick], pick))
        for index, pick in zip(indices, given, strict=True):
            out[index] = pick
    return out


def spend_at_random(choices: Sequence[Candidates], budget: int, generator: np.random.Generator) -> list[int]:
    """Starts with the least and raises groups in random order to random larger formats while they fit."""
    picks = cheapest(choices)
    left = budget - sum(choice.spent[pick] for choice, pick in zip(choices, picks, strict=True))
    for index in generator.permutation(len(choices)):
        choice, now = choices[index], picks[index]
        larger = [f for f, size in enumerate(choice.spent) if 0 < size - choice.spent[now] <= left]
        if larger:
            picks[index] = larger[int(generator.integers(len(larger)))]
            left -= choice.spent[picks[index]] - choice.spent[now]
    return picks
