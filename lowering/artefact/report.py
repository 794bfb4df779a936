"""The report beside an artefact: what became of each linear site, for programs (JSON) and for people (HTML)."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from torch import fx

from hikui.lowering.formats import Format
from hikui.lowering.ir.float_matrix import float_and_packed_rows
from hikui.lowering.ir.packed import is_packed
from hikui.lowering.ir.program import SITE, Program
from hikui.lowering.ir.sizes import Sizes
from hikui.lowering.ir.store import WeightStore
from hikui.lowering.memory import give_back
from hikui.lowering.pipeline.run import StepRecord
from hikui.lowering.progress import Progress

JSON = "report.json"
HTML = "report.html"


@dataclass(frozen=True)
class SiteReport:
    """One linear site as it was lowered.

    Attributes:
        weight_error: ‖W − Ŵ‖ / ‖W‖ (Frobenius) of the stored matrix with its branch; None where the site was not found
            in the float program.
        notes: what the format does to a matrix of this shape, such as padding.
    """

    name: str
    format: str
    out_features: int
    in_features: int
    rank: int
    bytes: int
    true_bits: float
    weight_error: float | None
    notes: tuple[str, ...]


def site_reports(lowered: Program, sizes: Sizes, origin: Program | None, progress: Progress) -> list[SiteReport]:
    """Compares every site with the matrix that it had in `origin`, the canonical float program, one at a time."""
    packed = {node.meta[SITE]: node for node in lowered.graph.nodes if SITE in node.meta and is_packed(node)}
    floats = {} if origin is None else _float_sites(origin)
    reports = []
    for index, site in enumerate(sizes.sites):
        progress("error of each site", index, len(sizes.sites))
        error = None
        if site.name in packed and site.name in floats and origin is not None:
            error = _error(lowered, packed[site.name], origin.store, floats[site.name])
            give_back()
        notes = Format.parse(site.format).notes(site.out_features, site.in_features) if site.name in packed else []
        reports.append(
            SiteReport(
                site.name, site.format, site.out_features, site.in_features, site.rank, site.nbytes,
                round(site.true_bits, 6), error, tuple(notes),
            )
        )  # fmt: skip
    progress("error of each site", len(sizes.sites), len(sizes.sites))
    return reports


def _float_sites(program: Program) -> dict[str, str]:
    """Site name to the store key of its [N, K] matrix."""
    found = {}
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target is torch.ops.aten.linear.default and SITE in node.meta:
            weight = node.args[1]
            assert isinstance(weight, fx.Node), "a site multiplies a stored weight"
            found[str(node.meta[SITE])] = program.weight_of(weight)
    return found


def _error(program: Program, node: fx.Node, floats: WeightStore, key: str) -> float:
    difference = total = 0.0
    for rows, approximation in float_and_packed_rows(program, node, floats, key):
        difference += float((rows - approximation).square().sum(dtype=torch.float64))
        total += float(rows.square().sum(dtype=torch.float64))
    # Three digits: beyond them, the order of a sum on another machine would show.
    return float(f"{math.sqrt(difference / total):.3g}") if total else 0.0


def write(
    directory: Path,
    *,
    title: str,
    summary: Mapping[str, object],
    sizes: Sizes,
    sites: Sequence[SiteReport],
    steps: Sequence[StepRecord],
    notices: Sequence[str] = (),
) -> None:
    """Writes report.json and report.html; neither holds a time, so that a second run writes the same bytes."""
    content = {
        "title": title,
        "summary": dict(summary),
        "notices": list(notices),
        "sizes": {
            "linear_bytes": sizes.linear_bytes,
            "branch_bytes": sizes.branch_bytes,
            "weight_bytes": sizes.total_bytes,
            "parameters": sizes.parameters,
            **sizes.bits(),
        },
        "sites": [asdict(site) for site in sites],
        "passes": [{"pass": step.step, "modified": step.modified, "notes": list(step.notes)} for step in steps],
    }
    (directory / JSON).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).resolve().parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    largest = max((site.weight_error or 0.0 for site in sites), default=0.0)
    page = environment.get_template("report.html.j2").render(content, largest=largest)
    (directory / HTML).write_text(page, "utf-8")
