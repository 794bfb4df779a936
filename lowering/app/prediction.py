"""What an artefact will be, before it is made: `hikui lower --dry-run`."""

import math
from dataclasses import dataclass
from pathlib import Path

from torch import fx

from hikui.lowering.app.lower import make_backend, prepare, resume_folder, tokenizer_nbytes
from hikui.lowering.app.request import Execution, Request, available_passes
from hikui.lowering.app.speeds import read_speeds
from hikui.lowering.artefact.manifest import MANIFEST
from hikui.lowering.artefact.staging import StagedFolder
from hikui.lowering.artefact.target import resolve
from hikui.lowering.errors import UsageError
from hikui.lowering.formats import Format
from hikui.lowering.ir import sizes
from hikui.lowering.ir.program import BLOCK, FORMAT, SENSITIVITY, Program
from hikui.lowering.pipeline.contract import Pass
from hikui.passes.graph import float_sites, groups, matrix_shape
from hikui.passes.precision.candidates import tied_nbytes
from hikui.passes.precision.latency import PICOSECONDS
from hikui.passes.precision.rest import rest_nbytes
from hikui.passes.quantise.embedding import Embedding
from hikui.passes.quantise.factorise import Factorise
from hikui.passes.quantise.pack import Pack
from hikui.passes.quantise.rounder import Rounder


@dataclass(frozen=True)
class Prediction:
    """What passes up to the last one that keeps to a budget say of the artefact.

    Attributes:
        block_bpw: true bits per weight of the sites in blocks.
        weight_bytes: of all weights.
        artefact_bytes: with runtime, program and tokenizer; about.
        cost: the sum of what sites cost, by the measure of the recipe, as if they did not touch each other.
        formats: how many sites have each format.
        milliseconds: what the products of a token take on one thread of the machine whose speeds were given, of sites
            in blocks and of all; None without speeds.
    """

    block_bpw: float
    weight_bytes: int
    artefact_bytes: int
    cost: float
    formats: dict[str, int]
    milliseconds: tuple[float, float] | None = None


def predict(
    request: Request, output: Path, *, target: str = "host", backend: str = "tvm", execution: Execution = Execution()
) -> Prediction:
    """Runs a recipe up to its last pass that keeps to a budget, and counts.

    What is measured on the way is kept beside the output, and `make_artefact` with the same request goes on from there.

    Raises:
        HikuiError: the model, the recipe or the text is at fault, or the budget cannot be met.
        UsageError: the recipe has no pass that keeps to a budget.
    """
    board, builder = resolve(target), make_backend(backend)
    beside = builder.nbytes_beside_weights(board)
    with StagedFolder(output, MANIFEST, publish=False) as held:
        prepared = prepare(
            request,
            execution,
            scratch=held.scratch,
            finished=resume_folder(output) if execution.resume else None,
            beside=beside,
            only_assign=True,
        )
        program = prepared.program.clone()
        rest = request.loaded_recipe(beside).build(available_passes())[len(prepared.passes) :]
        _format_all(program, rest)
        sites = float_sites(program)
        packed = sizes.measure(prepared.program)
        inside = [site.parameters for site in packed.sites if site.in_block]
        nbytes = sum(site.nbytes for site in packed.sites if site.in_block and site.format != "float32")
        nbytes += _tied_nbytes([node for node in sites if BLOCK in node.meta])
        every = _tied_nbytes(sites) + rest_nbytes(program, sites, _tables(rest))
        counts: dict[str, int] = {}
        for node in sites:
            counts[node.meta[FORMAT]] = counts.get(node.meta[FORMAT], 0) + 1
        return Prediction(
            8 * nbytes / sum(inside) if inside else 0.0,
            every,
            every + beside + tokenizer_nbytes(program),
            sum(float(node.meta.get(SENSITIVITY, {}).get(node.meta[FORMAT], 0.0)) for node in sites),
            dict(sorted(counts.items())),
            None if request.speeds is None else _milliseconds(sites, prepared.program, request.speeds),
        )


def _tied_nbytes(sites: list[fx.Node]) -> int:
    """Bytes of float sites in their formats, orders of columns counted once for those that share one."""
    return sum(
        tied_nbytes([Format.parse(node.meta[FORMAT]) for node in members], [matrix_shape(node) for node in members])
        for members in groups(sites).values()
    )


def _milliseconds(sites: list[fx.Node], program: Program, path: str | Path) -> tuple[float, float]:
    """Of sites in blocks and of all, those that are packed already among them.

    Raises:
        UsageError: a site has a format of which nothing was measured.
    """
    speeds = read_speeds(path)
    every = [(Format.parse(node.meta[FORMAT]), matrix_shape(node), BLOCK in node.meta) for node in sites]
    every += [
        (Format.parse(site.format), (site.out_features, site.in_features), site.in_block)
        for site in sizes.measure(program).sites
        if site.format != "float32"
    ]
    if unknown := speeds.lacks(fmt for fmt, _, _ in every):
        raise UsageError(f"{path} says nothing of {unknown[0]}, which sites have; leave out --speeds, or measure it.")
    times = [(speeds.picoseconds(fmt, *shape) / PICOSECONDS, inside) for fmt, shape, inside in every]
    return math.fsum(time for time, inside in times if inside), math.fsum(time for time, _ in times)


def _format_all(program: Program, rest: list[Pass]) -> None:
    """Gives sites that have no format yet the one that the next quantiser that takes them has for them."""
    for step in rest:
        if isinstance(step, Rounder | Factorise):
            for node in step.chosen(program):
                node.meta.setdefault(FORMAT, str(step.format_of(node)))
        elif isinstance(step, Pack):
            break
    for node in float_sites(program):
        node.meta.setdefault(FORMAT, "float32")


def _tables(rest: list[Pass]) -> Format:
    """The format that tables will have which no head shares."""
    return next((Format.parse(step.format) for step in rest if isinstance(step, Embedding)), Format("float32"))
