"""The report beside an artefact: what became of each linear site, for programs (JSON) and for people (HTML)."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from torch import Tensor, fx

from hikui.lowering.formats import ROWS, Format, unpack
from hikui.lowering.ir.program import SITE, Program
from hikui.lowering.ir.sizes import OPERANDS, Sizes, column_order
from hikui.lowering.ir.store import WeightStore
from hikui.lowering.memory import give_back
from hikui.lowering.pipeline.contract import Progress
from hikui.lowering.pipeline.run import StepRecord

JSON = "report.json"
HTML = "report.html"
_BLOCKS = 128


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
    packed = {node.meta[SITE]: node for node in lowered.graph.nodes if SITE in node.meta and node.target in OPERANDS}
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
    for rows, approximation in matrices(program, node, floats, key):
        difference += float((rows - approximation).square().sum(dtype=torch.float64))
        total += float(rows.square().sum(dtype=torch.float64))
    # Three digits: beyond them, the order of a sum on another machine would show.
    return float(f"{math.sqrt(difference / total):.3g}") if total else 0.0


def matrices(program: Program, node: fx.Node, floats: WeightStore, key: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Some rows at a time, the float matrix of a packed site and what the site multiplies with: float32 [rows, K] each.

    Both have their columns in the packed site's order; a branch inside the site's op is part of the second.

    Args:
        program: the lowered program.
        node: a call of one of `OPERANDS`.
        floats: holds the float matrix under `key`.
        key: its store key.
    """
    places = OPERANDS[node.target]
    fmt = Format.parse(str(node.args[places.format]))
    n, k = floats.info(key).shape

    def load(position: int) -> Tensor | None:
        operand = node.args[position]
        return program.store.load(program.weight_of(operand)) if isinstance(operand, fx.Node) else None

    weight, scale = load(places.weight), load(places.scale)
    assert weight is not None, "a packed op has its weight"
    held = column_order(node)
    order = None if held is None else program.store.load(program.weight_of(held)).long()
    branch = tuple(tensor for position in places.branch if (tensor := load(position)) is not None)
    # By blocks of rows: unpacked, the head of a large vocabulary takes gigabytes.
    for block in range(0, weight.shape[0], _BLOCKS):
        blocks = slice(block, block + _BLOCKS)
        rows = floats.load_rows(key, block * ROWS, min((block + _BLOCKS) * ROWS, n)).float()
        rows = rows if order is None else rows[:, order]
        count = rows.shape[0]
        approximation = unpack(fmt, weight[blocks], None if scale is None else scale[blocks], count, k)
        if branch:
            approximation += _product(branch[0], branch[1][blocks], count, k)
        yield rows, approximation


def _product(a: Tensor, b: Tensor, n: int, k: int) -> Tensor:
    """B·A of a branch whose factors are packed as float16: float32 [n, k]."""
    half, rank = Format("float16"), int(b.shape[1])
    return unpack(half, b, None, n, rank) @ unpack(half, a, None, rank, k)


def write(
    directory: Path,
    *,
    title: str,
    summary: Mapping[str, object],
    sizes: Sizes,
    sites: Sequence[SiteReport],
    steps: Sequence[StepRecord],
) -> None:
    """Writes report.json and report.html; neither holds a time, so that a second run writes the same bytes."""
    content = {
        "title": title,
        "summary": dict(summary),
        "sizes": {
            "linear_bytes": sizes.linear_bytes,
            "branch_bytes": sizes.branch_bytes,
            "weight_bytes": sizes.total_bytes,
            "true_bpw": round(sizes.true_bpw, 6),
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
