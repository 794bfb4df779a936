from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from benchmarks.kernels.__main__ import THREADS, contestants, parse_filters, rounds_of, workloads
from benchmarks.kernels.contestant import COLD_BYTES, Prepared, UnavailableError, Workload, random_bytes, width
from benchmarks.kernels.harness import Turn, measure, quartiles, rows_of
from benchmarks.kernels.limits import Limits
from benchmarks.kernels.ours import Product


@dataclass
class Fake:
    """A contestant that writes down whose step was taken."""

    name: str
    log: list[str] = field(default_factory=list)
    steps: int = 3
    ours: bool = False
    refusal: str = ""
    value: float = 1.0

    def prepare(self, workload: Workload) -> Prepared:
        if self.refusal:
            raise UnavailableError(self.refusal)
        steps = [lambda i=i: self.log.append(f"{self.name}{i}") for i in range(self.steps)]
        return Prepared(steps, 1, 1000, 4.1, result=lambda: np.full((1, 1), self.value, np.float32))


def turn(name: str, seconds: Sequence[float], *, ours: bool = False, bits: float = 4.1, **prepared: float) -> Turn:
    made = Prepared([lambda: None], 1, int(prepared.get("nbytes", 1000)), bits, prepared.get("macs", 0))
    return Turn(Fake(name, ours=ours), made, seconds=list(seconds))


COLD = Workload(1, 100, 100, 1, True)
CACHED = Workload(1, 100, 100, 1, False)


def test_steps_are_taken_in_a_ring_across_turns() -> None:
    log: list[str] = []
    under_way = Turn(Fake("a"), Fake("a", log).prepare(COLD), steps=2)
    for _ in range(3):
        under_way.take(lambda: 0.0)
    assert log == ["a0", "a1", "a2", "a0", "a1", "a2"]


def test_a_turn_gives_the_time_of_one_product() -> None:
    ticks = iter((10.0, 18.0))
    prepared = Prepared([lambda: None], 4, 1000, 4.0)
    assert Turn(Fake("a"), prepared, steps=2).take(lambda: next(ticks)) == 1.0


@pytest.fixture(scope="module")
def limits() -> Limits:
    return Limits()


def test_contestants_alternate_and_the_unavailable_are_told_of(limits: Limits) -> None:
    log: list[str] = []
    told: list[str] = []
    entrants = [
        Fake("a", log), Fake("b", log), Fake("c", refusal="it is not there"), Fake("d", value=0.0),
        Fake("e", value=np.nan),
    ]  # fmt: skip
    rows, left_out = measure(entrants, limits, Workload(1, 64, 64, 1, False), 3, told.append)
    assert [row.name for row in rows] == ["a", "b"]
    order = [name for name, before in zip(log, ["", *log], strict=False) if name[0] != before[:1]]
    assert [name[0] for name in order] == ["a", "b"] * 4, "one warm-up and three rounds, in turns"
    assert left_out == told[:3]
    assert left_out[0] == "M=1 N=64 K=64, in cache, 1 thread: c is left out: it is not there"
    assert sum("not finite or all zero" in sentence for sentence in left_out) == 2


def test_shares_and_ratios_are_paired_by_round() -> None:
    read = turn("read", [1.0, 2.0, 4.0], nbytes=8000)
    peak = turn("peak", [1.0, 1.0, 1.0], macs=1e6)
    quantise = turn("quantise", [0.1, 0.2, 0.4])
    ours = turn("int4", [1.1, 2.2, 4.4], ours=True)
    same, slower, narrow = (
        turn("same", [2.2, 4.4, 8.8]), turn("slower", [20.0] * 3), turn("narrow", [0.1] * 3, bits=2.1),
    )  # fmt: skip
    cold, *_ = rows_of([ours, same, slower, narrow], read, peak, quantise, COLD)
    assert cold.limit == "read"
    assert cold.share_of_limit == pytest.approx(1000 / 8000 / 1.1, abs=1e-3)
    assert cold.quantise_share == pytest.approx(0.1)
    assert (cold.peer, cold.times_peer) == ("same", 2.0)
    assert cold.peer_gmacs == 0.0
    cached, theirs, *_ = rows_of([ours, same, slower, narrow], read, peak, quantise, CACHED)
    assert cached.limit == "peak"
    assert cached.share_of_limit == pytest.approx(1e4 / 1e6 / 2.2, abs=1e-3)
    assert theirs.peer is None and theirs.quantise_share is None


def test_a_branch_is_held_against_the_same_product_without_one() -> None:
    turns = [turn("int4", [1.0, 2.0, 3.0], ours=True), turn("int4_branch64_fused", [1.1, 2.4, 3.3], ours=True)]
    turns += [turn("int3_branch64_fused", [1.0] * 3, ours=True), turn("same", [2.0] * 3)]
    plain, fused, alone, _ = rows_of(
        turns, turn("r", [1.0] * 3), turn("p", [1.0] * 3, macs=1.0), turn("q", [0.1] * 3), COLD
    )
    assert (plain.over_plain, plain.peer) == (None, "same")
    assert (fused.over_plain, fused.peer) == (1.1, None)
    assert (alone.over_plain, alone.peer) == (None, None)


def test_without_another_library_there_is_no_peer() -> None:
    (row,) = rows_of(
        [turn("int4", [2.0], ours=True)], turn("r", [1.0]), turn("p", [1.0], macs=1.0), turn("q", [1.0]), COLD
    )
    assert (row.peer, row.peer_gmacs, row.times_peer) == (None, None, None)


def test_quartiles() -> None:
    assert quartiles([3.0]) == (3.0, 3.0, 3.0)
    assert quartiles([1.0, 2.0, 3.0]) == (1.0, 2.0, 3.0)


@pytest.mark.parametrize(
    ("bits", "expected"),
    [(1.125, 1), (1.6953, 1), (2.0625, 2), (2.625, 2), (3.125, 3), (3.44, 3), (4.125, 4), (4.5, 4), (8.5, 8)],
)
def test_width(bits: float, expected: int) -> None:
    assert width(bits) == expected


def test_a_cold_walk_is_longer_than_any_cache() -> None:
    assert COLD.copies(7_000_000) * 7_000_000 >= COLD_BYTES
    assert CACHED.copies(7_000_000) == 1


def test_copies_differ() -> None:
    copies = random_bytes((16, 4), 5)
    assert len({copy.tobytes() for copy in copies}) == 5
    assert (copies.reshape(5, -1)[:, 1:] == copies.reshape(5, -1)[0, 1:]).all()


def test_filters() -> None:
    filters = parse_filters(["m=1,64", "shape=4096x11008", "threads=1", "cold=no"])
    assert workloads(filters) == [Workload(m, 4096, 11008, 1, False) for m in (1, 64)]
    assert len(workloads({})) == 36 and {w.threads for w in workloads({})} == set(THREADS)
    chosen, _ = contestants(parse_filters(["kind=int4*", "peer=nobody"]))
    assert [contestant.name for contestant in chosen] == ["int4", "int4_branch64_fused", "int4_branch64_separate"]
    for wrong in ("m", "kinds=int4"):
        with pytest.raises(ValueError, match="is no filter; write kind="):
            parse_filters([wrong])


def test_long_products_get_half_of_the_rounds() -> None:
    assert [rounds_of(Workload(m, 1, 1, 1, True), 11) for m in (1, 64, 512)] == [11, 11, 5]
    assert rounds_of(Workload(512, 1, 1, 1, True), 1) == 1


def test_a_kind_without_a_kernel_is_left_out_with_the_symbol() -> None:
    with pytest.raises(UnavailableError, match="no hikui_linear_a8_int5"):
        Product("int5").prepare(COLD)
