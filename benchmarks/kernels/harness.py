"""Lets contestants take turns in one setting, and makes rows of what was measured."""

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from benchmarks.kernels.contestant import Contestant, Prepared, UnavailableError, Workload, width
from benchmarks.kernels.limits import Limits, PeakLimit, ReadLimit, clock_of
from benchmarks.kernels.ours import Quantisation

_TURN_SECONDS = 0.02
"""A contestant's turn lasts at least this long, and at least one step."""

Report = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """One contestant in one setting.

    Attributes:
        bits: true bits a weight, scales, padding, permutation and branch counted.
        microseconds: of one product, the median over the rounds; `low` and `high` are the quartiles.
        gmacs: 10⁹ multiply-accumulates a second.
        gbs: 10⁹ bytes of weights and scales a second.
        limit: what `share_of_limit` is a share of: the read of one row from memory, else the integer unit.
        share_of_limit: the median of the rounds' shares.
        quantise_share: time to quantise the activations over the rest of the product's; ours only.
        over_plain: time over the same product's without a branch, the median of the rounds' ratios; branches only.
        peer: the quickest other library of this width of weights; ours only.
        peer_gmacs: its speed.
        times_peer: how many times as fast as that one, the median of the rounds' ratios.
    """

    name: str
    ours: bool
    bits: float
    m: int
    n: int
    k: int
    threads: int
    cold: bool
    microseconds: float
    low: float
    high: float
    gmacs: float
    gbs: float
    limit: str
    share_of_limit: float
    quantise_share: float | None = None
    over_plain: float | None = None
    peer: str | None = None
    peer_gmacs: float | None = None
    times_peer: float | None = None


class Measured(NamedTuple):
    """Rows of one setting, and a sentence on each contestant that is not among them."""

    rows: list[Row]
    left_out: list[str]


@dataclass
class Turn:
    """A contestant under way: its place in the walk over its steps, and the seconds a product took in each round."""

    contestant: Contestant
    prepared: Prepared
    steps: int = 1
    position: int = 0
    seconds: list[float] = field(default_factory=list)

    def take(self, clock: Callable[[], float]) -> float:
        """Takes the next steps; returns the seconds of one product."""
        walk = self.prepared.steps
        chosen = [walk[(self.position + i) % len(walk)] for i in range(self.steps)]
        start = clock()
        for step in chosen:
            step()
        seconds = clock() - start
        self.position = (self.position + self.steps) % len(walk)
        return seconds / (self.steps * self.prepared.products)

    def warm_up(self, clock: Callable[[], float]) -> None:
        """Finds how many steps make a turn.

        Raises:
            UnavailableError: the product is not one.
        """
        self.take(clock)
        seconds = self.take(clock) * self.prepared.products
        self.steps = max(1, math.ceil(_TURN_SECONDS / max(seconds, 1e-7)))
        if self.prepared.result is not None:
            values = self.prepared.result()
            if not np.isfinite(values).all() or not values.any():
                raise UnavailableError("its result is not finite or all zero")


def measure(
    contestants: Iterable[Contestant], limits: Limits, workload: Workload, rounds: int, report: Report = print
) -> Measured:
    """Times contestants in turns.

    Args:
        contestants: the contestants; one that cannot do this is left out, and `report` told.
        limits: the machine's, which take their turns too.
        workload: the setting.
        rounds: how many turns each gets.
        report: hears of progress.

    Returns:
        A row for each contestant that could, in their order, and why the others could not.
    """
    clock = clock_of(workload.threads)
    read, peak = ReadLimit(limits), PeakLimit(limits)
    entrants: list[Contestant] = [read, peak, Quantisation(), *contestants]
    turns: list[Turn] = []
    left_out: list[str] = []
    for contestant in entrants:
        try:
            turn = Turn(contestant, contestant.prepare(workload))
            turn.warm_up(clock)
        except UnavailableError as error:
            left_out.append(f"{workload}: {contestant.name} is left out: {error}")
            report(left_out[-1])
            continue
        turns.append(turn)
    for _ in range(rounds):
        for turn in turns:
            if workload.threads > 1:
                # The others' threads spin a while after their work: let them fall asleep.
                time.sleep(0.05)
            turn.seconds.append(turn.take(clock))
    rows = rows_of(turns[3:], turns[0], turns[1], turns[2], workload)
    # Sessions and graphs sit in cycles with what they bind; the next setting needs the memory.
    del turns
    gc.collect()
    report(f"{workload}: {len(rows)} contestants, {rounds} rounds")
    return Measured(rows, left_out)


def rows_of(turns: Sequence[Turn], read: Turn, peak: Turn, quantise: Turn, workload: Workload) -> list[Row]:
    """Medians, shares and ratios of what took turns."""
    peers = [turn for turn in turns if not turn.contestant.ours]
    rows = []
    for turn in turns:
        prepared, own = turn.prepared, turn.seconds
        if workload.m == 1 and workload.cold:
            work = prepared.nbytes / read.prepared.nbytes
            limit, shares = read.contestant.name, [work * b / a for a, b in zip(own, read.seconds, strict=True)]
        else:
            work = workload.products / peak.prepared.macs
            limit, shares = peak.contestant.name, [work * b / a for a, b in zip(own, peak.seconds, strict=True)]
        low, middle, high = (1e6 * value for value in quartiles(own))
        row = Row(
            turn.contestant.name, turn.contestant.ours, round(prepared.bits, 3), workload.m, workload.n, workload.k,
            workload.threads, workload.cold, round(middle, 1), round(low, 1), round(high, 1),
            round(workload.products / middle / 1e3, 2), round(prepared.nbytes / middle / 1e3, 2), limit,
            round(statistics.median(shares), 3),
        )  # fmt: skip
        if turn.contestant.ours:
            share = statistics.median(q / (a - q) for a, q in zip(own, quantise.seconds, strict=True))
            row = replace(row, quantise_share=round(share, 4))
            same = [peer for peer in peers if width(peer.prepared.bits) == width(prepared.bits)]
            kind, _, branch = turn.contestant.name.partition("_branch")
            plain = next((other for other in turns if other.contestant.ours and other.contestant.name == kind), None)
            # A branch belongs to ours alone: beside a peer without one, its bits and time would mislead.
            if branch and plain is not None:
                ratios = (a / b for a, b in zip(own, plain.seconds, strict=True))
                row = replace(row, over_plain=round(statistics.median(ratios), 3))
            elif same and not branch:
                row = _beside(row, own, min(same, key=lambda peer: statistics.median(peer.seconds)), workload)
        rows.append(row)
    return rows


def _beside(row: Row, own: Sequence[float], rival: Turn, workload: Workload) -> Row:
    times = statistics.median(b / a for a, b in zip(own, rival.seconds, strict=True))
    speed = workload.products / statistics.median(rival.seconds) / 1e9
    return replace(row, peer=rival.contestant.name, peer_gmacs=round(speed, 2), times_peer=round(times, 3))


def quartiles(seconds: Sequence[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper one; one value stands for all three."""
    if len(seconds) == 1:
        return seconds[0], seconds[0], seconds[0]
    low, middle, high = statistics.quantiles(seconds, n=4)
    return low, middle, high
