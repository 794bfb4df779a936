"""Rows as JSON and as Markdown, with the machine and the versions they belong to."""

import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.kernels.harness import Row

_PACKAGES = ("apache-tvm", "onnxruntime", "llama-cpp-python", "openvino", "torch")
RESULTS = Path(__file__).resolve().parent.parent / "results"


def machine(isa: str, limits: dict[str, float]) -> dict[str, object]:
    """What the figures belong to: CPU, instruction set in use, measured limits, versions."""
    return {"cpu": cpu(), "cores": cores(), "isa": isa, "limits": limits, "versions": installed()}


def cpu() -> str:
    """The CPU's name, or the architecture where the system tells none."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.machine()


def cores() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def installed() -> dict[str, str]:
    """Versions of what takes part, as far as it is installed."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write_json(path: Path, content: object) -> None:
    """Writes a file that a second run with the same figures would write again byte for byte."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def markdown(rows: Sequence[Row], about: dict[str, object]) -> str:
    """A table for each shape and number of rows: contestants down, threads and place of the weights across."""
    limits, versions = about["limits"], about["versions"]
    assert isinstance(limits, dict) and isinstance(versions, dict)
    out = [
        f"{about['cpu']}, {about['isa']}, {about['cores']} cores; "
        + ", ".join(f"{name} {value}" for name, value in versions.items()),
        "",
        "The machine's limits: " + ", ".join(f"{name} {value}" for name, value in limits.items()) + ".",
        "",
        "Cells: GMAC/s (share of the 8-stream read for M = 1 cold, of the integer unit elsewhere; for ours also how "
        "many times as fast as the quickest other library of the same width). The products of a branch are not counted "
        "in its GMAC/s.",
    ]
    for n, k, m in dict.fromkeys((row.n, row.k, row.m) for row in rows):
        chosen = [row for row in rows if (row.n, row.k, row.m) == (n, k, m)]
        settings = list(dict.fromkeys((row.threads, row.cold) for row in chosen))
        cells = {(row.name, row.threads, row.cold): _cell(row) for row in chosen}
        names = {row.name: row for row in sorted(chosen, key=lambda row: (not row.ours, row.bits))}
        heads = [f"{t} thread{'s' * (t > 1)}, {'cold' if cold else 'in cache'}" for t, cold in settings]
        out += ["", f"### N={n} K={k} M={m}", "", f"| | bits | {' | '.join(heads)} |", "|---" * (2 + len(heads)) + "|"]
        for name, row in names.items():
            values = " | ".join(cells.get((name, *setting), "–") for setting in settings)
            out.append(f"| {'**' + name + '**' if row.ours else name} | {row.bits} | {values} |")
    return "\n".join([*out, "", *_branch(rows), *_quantisation(rows)])


def _cell(row: Row) -> str:
    share = f"{row.share_of_limit:.2f}"
    return f"{row.gmacs:.1f} ({share}; {row.times_peer:.2f}×)" if row.times_peer else f"{row.gmacs:.1f} ({share})"


def _branch(rows: Sequence[Row]) -> list[str]:
    """Time with a low-rank branch over the time without."""
    chosen = [row for row in rows if row.over_plain is not None]
    if not chosen:
        return []
    out = [
        "### The low-rank branch: time over the same product without one",
        "",
        "| | setting | ratio |",
        "|---|---|---|",
    ]
    for row in chosen:
        place = "cold" if row.cold else "in cache"
        out.append(f"| {row.name} | M={row.m} N={row.n} K={row.k}, {row.threads}T, {place} | {row.over_plain:.3f} |")
    return [*out, ""]


def _quantisation(rows: Sequence[Row]) -> list[str]:
    """What quantising one row of activations adds to the product."""
    chosen = [
        r for r in rows if r.quantise_share is not None and r.m == 1 and r.threads == 1 and "branch" not in r.name
    ]
    if not chosen:
        return []
    out = ["### Quantising the activations, over the rest of the product (M = 1, one thread)", ""]
    out += ["| | setting | share |", "|---|---|---|"]
    for row in chosen:
        where = f"N={row.n} K={row.k}, {'cold' if row.cold else 'in cache'}"
        out.append(f"| {row.name} | {where} | {100 * (row.quantise_share or 0):.2f} % |")
    return [*out, ""]
