"""`python -m benchmarks.kernels`: every shape, number of rows and threads, cold and in cache."""

import argparse
import itertools
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path

from benchmarks.kernels import ours, peers, plot, report
from benchmarks.kernels.contestant import Contestant, UnavailableError, Workload
from benchmarks.kernels.harness import Row, measure
from benchmarks.kernels.limits import Limits

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
ROWS = (1, 64, 512)
THREADS = (1, 2)
_FILTERS = ("kind", "peer", "shape", "m", "threads", "cold")


def parse_filters(texts: Iterable[str]) -> dict[str, list[str]]:
    """Reads `m=1`, `kind=int4,sign`, …

    Raises:
        ValueError: no such filter; the message is for the user.
    """
    filters = {}
    for text in texts:
        key, equals, values = text.partition("=")
        if not equals or key not in _FILTERS:
            raise ValueError(f"'{text}' is no filter; write {', '.join(f'{name}=…' for name in _FILTERS)}")
        filters[key] = values.split(",")
    return filters


def passes(filters: dict[str, list[str]], key: str, value: object) -> bool:
    """Whether a filter lets a value through; patterns like `ggml_*` are allowed."""
    return key not in filters or any(fnmatch(str(value), pattern) for pattern in filters[key])


def workloads(filters: dict[str, list[str]]) -> list[Workload]:
    """The settings that the filters let through."""
    return [
        Workload(m, n, k, threads, cold)
        for (n, k), m, threads, cold in itertools.product(SHAPES, ROWS, THREADS, (True, False))
        if passes(filters, "shape", f"{n}x{k}") and passes(filters, "m", m)
        and passes(filters, "threads", threads) and passes(filters, "cold", "yes" if cold else "no")
    ]  # fmt: skip


def contestants(filters: dict[str, list[str]]) -> tuple[list[Contestant], list[str]]:
    """Ours and the others that the filters let through, and a sentence on each library that is not installed."""
    found, absent = peers.find()
    chosen: list[Contestant] = [s for s in ours.contestants() if passes(filters, "kind", s.name)]
    return chosen + [s for s in found if passes(filters, "peer", s.name)], absent


def rounds_of(workload: Workload, rounds: int) -> int:
    """Rounds of a setting: long products vary less and take long."""
    return rounds if workload.m < 512 else max(1, rounds // 2)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and writes JSON, Markdown and a picture; what is there is written after each setting."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="FILTER", action="extend",
        help="settings and contestants: kind=int4,sign peer=ggml_*,ort_* shape=4096x11008 m=1 threads=1 cold=yes|no",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=11, help="turns each contestant gets; half of them at M=512")
    parser.add_argument("--output", type=Path, default=report.RESULTS, help="folder for kernels.json, .md and .svg")
    chosen = parser.parse_args(arguments)
    try:
        filters = parse_filters(chosen.only)
    except ValueError as error:
        parser.error(str(error))
    entrants, absent = contestants(filters)
    for sentence in absent:
        print(sentence, file=sys.stderr)
    limits = Limits()
    about = report.machine(ours.library().isa(), limits.survey()) | {"left_out": absent, "rounds": chosen.rounds}
    rows: list[Row] = []
    for workload in workloads(filters):
        measured = measure(entrants, limits, workload, rounds_of(workload, chosen.rounds), tell)
        rows += measured.rows
        absent += measured.left_out
        report.write_json(chosen.output / "kernels.json", about | {"rows": [asdict(row) for row in rows]})
        (chosen.output / "kernels.md").write_text(report.markdown(rows, about))
    print(report.markdown(rows, about))
    try:
        plot.draw(rows, chosen.output / "kernels.svg")
    except UnavailableError as error:
        print(f"No picture: {error}.", file=sys.stderr)


def tell(sentence: str) -> None:
    """Progress, on stderr."""
    print(sentence, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
