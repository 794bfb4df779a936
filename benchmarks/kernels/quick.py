"""`python -m benchmarks.kernels.quick`: one thread, 4096×4096, M = 1 and 512, in at most three minutes.

Writes a list of rows to benchmarks/results/quick.json. `gmacs` counts the time to quantise the activations;
`share_of_limit` is bytes read over what reading over eight streams moves (M = 1 cold) or multiply-accumulates over the
best integer unit's (elsewhere), as the row's `limit` says; `peer` is the quickest other library of the same width of
weights, null where none is installed.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.kernels import ours, report
from benchmarks.kernels.__main__ import contestants, tell
from benchmarks.kernels.contestant import Workload
from benchmarks.kernels.harness import Row, measure
from benchmarks.kernels.limits import Limits

_SIZE = 4096
_ROUNDS = {1: 15, 512: 3}
_FIELDS = (
    "name", "bits", "m", "n", "k", "threads", "cold", "gmacs", "limit", "share_of_limit", "quantise_share",
    "over_plain", "peer", "peer_gmacs", "times_peer",
)  # fmt: skip


def entries(rows: Sequence[Row]) -> list[dict[str, object]]:
    """Our rows as the file has them."""
    return [{name: getattr(row, name) for name in _FIELDS} for row in rows if row.ours]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and writes the file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels.quick", description=__doc__)
    parser.add_argument("--output", type=Path, default=report.RESULTS / "quick.json")
    chosen = parser.parse_args(arguments)
    found, absent = contestants({})
    for sentence in absent:
        print(sentence, file=sys.stderr)
    limits = Limits()
    about = report.machine(ours.library().isa(), limits.survey(3))
    rows: list[Row] = []
    for m, rounds in _ROUNDS.items():
        # A branch is a matter of one row; with many rows weights in memory cost next to nothing.
        entrants = [s for s in found if m == 1 or "branch" not in s.name]
        for cold in (True, False) if m == 1 else (True,):
            rows += measure(entrants, limits, Workload(m, _SIZE, _SIZE, 1, cold), rounds, tell).rows
    report.write_json(chosen.output, entries(rows))
    print(report.markdown(rows, about))


if __name__ == "__main__":
    main()
