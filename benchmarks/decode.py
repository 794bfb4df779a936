"""Tokens a second of whole models, one token at a time, side by side: artefacts of one machine in turns.

    python -m benchmarks.decode DIR DIR … [--tokens 24] [--rounds 7] [--json FILE]

Every round each artefact decodes so many tokens from an empty cache, one after the other, so that all meet the same
machine. A ratio is that of each round's seconds to the first artefact's; the table gives medians and the quartiles.
OMP_NUM_THREADS and TVM_NUM_THREADS bound the threads, as everywhere.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.kernels.report import cpu
from hikui.lowering.app.runners import open_runner
from hikui.lowering.artefact.generate import Runner
from hikui.lowering.artefact.manifest import Artefact


@dataclass(frozen=True)
class Row:
    """One artefact: milliseconds a token in each round, and its sizes."""

    name: str
    block_bpw: float
    all_bpw: float
    megabytes: float
    milliseconds: list[float]

    def ratios(self, first: "Row") -> list[float]:
        """How much faster than the first in each round."""
        return [theirs / own for own, theirs in zip(self.milliseconds, first.milliseconds, strict=True)]


def decode(runner: Runner, tokens: int) -> float:
    """Milliseconds a token, without the first, which may make buffers."""
    runner.reset()
    runner.forward(np.array([1], dtype=np.int64), 0)
    start = time.perf_counter()
    for past in range(1, tokens + 1):
        runner.forward(np.array([1 + past % 7], dtype=np.int64), past)
    return 1000 * (time.perf_counter() - start) / tokens


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def table(rows: Sequence[Row]) -> list[str]:
    """Markdown."""
    lines = [
        "| artefact | bits in blocks | of all | MB | ms a token | faster than the first |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        middle, low, high = quartiles(row.milliseconds)
        ratio, least, most = quartiles(row.ratios(rows[0]))
        lines.append(
            f"| {row.name} | {row.block_bpw:.2f} | {row.all_bpw:.2f} | {row.megabytes:.1f} | "
            f"{middle:.1f} ({low:.1f}–{high:.1f}) | {ratio:.2f} ({least:.2f}–{most:.2f}) |"
        )
    return lines


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artefacts", nargs="+", type=Path)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    artefacts = [Artefact.load(path) for path in options.artefacts]
    runners = [open_runner(artefact) for artefact in artefacts]
    found: list[list[float]] = [[] for _ in runners]
    for number in range(options.rounds + 1):
        for place, runner in zip(found, runners, strict=True):
            spent = decode(runner, options.tokens if number else 2)
            # The first round brings the weights into memory.
            if number:
                place.append(spent)
    for runner in runners:
        runner.close()
    rows = [
        Row(
            path.name,
            artefact.manifest.sizes.block_bpw,
            artefact.manifest.sizes.all_bpw,
            artefact.manifest.sizes.total_bytes / 1e6,
            spent,
        )
        for path, artefact, spent in zip(options.artefacts, artefacts, found, strict=True)
    ]
    threads = os.environ.get("TVM_NUM_THREADS", "all")
    print(f"{cpu()}, {threads} threads, {options.tokens} tokens a round, {options.rounds} rounds, quartiles")
    print("\n".join(table(rows)))
    if options.json is not None:
        content = {"cpu": cpu(), "threads": threads, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
