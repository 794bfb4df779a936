"""Recipes and artefacts side by side: quality over true bits, spread over calibration seeds, differences from float.

Runs are independent, so they go through `jobs`; each is saved when it ends, under a key of all that its result depends
on, and a comparison that was killed goes on with what is missing.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hikui.lowering.app.assemble import checkpoint_hashes
from hikui.lowering.app.compare import runs as runs_of
from hikui.lowering.app.compare.runs import FLOAT, Outcome, Reading
from hikui.lowering.app.request import Request
from hikui.lowering.artefact.manifest import read_manifest
from hikui.lowering.engine.jobs import Jobs
from hikui.lowering.errors import HikuiError, UsageError
from hikui.lowering.evaluation import protocols
from hikui.lowering.evaluation import quality as evaluation
from hikui.lowering.evaluation.quality import Difference, Quality, Score
from hikui.lowering.ir.program import Program
from hikui.lowering.progress import Announce, Progress, log_warning, no_progress


@dataclass(frozen=True)
class Row:
    """One recipe or artefact, over all its seeds.

    Attributes:
        bits_per_char: the mean over seeds.
        spread: the standard deviation over seeds; None for a single one.
        difference: from the float model, of the means over seeds, paired over documents or windows.
        block_bpw: bits per weight over the linear sites in blocks, scales, padding and branches counted; the mean over
            seeds, as are all sizes.
        true_bpw: over all linear sites, the head among them.
        all_bpw: over all parameters of the model, everything stored counted.
        linear_bytes: of all linear sites, the mean over seeds.
    """

    label: str
    runs_as: str
    seeds: tuple[int, ...]
    bits_per_char: float
    spread: float | None
    perplexity: float
    difference: Difference
    block_bpw: float
    true_bpw: float
    all_bpw: float
    linear_bytes: float
    total_bytes: float


@dataclass(frozen=True)
class Comparison:
    """The table; the float model comes first."""

    model: str
    protocol: str
    unit: str
    parts: int
    rows: tuple[Row, ...]


def compare(
    model: str,
    reading: Reading,
    *,
    recipes: Sequence[str] = (),
    artefacts: Sequence[str] = (),
    seeds: Sequence[int] = (0,),
    budgets: Sequence[float] = (),
    output: Path | None = None,
    resume: bool = True,
    jobs: Jobs = Jobs(),
    progress: Progress = no_progress,
    warn: Announce = log_warning,
) -> Comparison:
    """Measures a model through recipes, and artefacts made from it.

    Args:
        model: a Hugging Face folder or id, or `reference`.
        reading: the texts and how they are read.
        recipes: names or files.
        artefacts: folders.
        seeds: of the calibration windows; recipes that do not calibrate run once.
        budgets: bits per weight for recipes with the pass `assign`, a row for each.
        output: folder for the results of runs, and for `save`; None keeps nothing.
        resume: take what earlier comparisons have left there.
        jobs: how the runs are done.
        progress: called with how many runs are done.
        warn: told what a user should know before the figures are believed.

    Raises:
        UsageError: there is nothing to compare, a recipe wants calibration text and none was given, or an artefact was
            made from another model.
        HikuiError: a run fails; those that have ended are kept.
    """
    runs = runs_of.plan(model, reading, recipes=recipes, artefacts=artefacts, seeds=seeds, budgets=budgets)
    traced = Request(
        model, context=reading.context, tokenizer=reading.tokenizer, trust_remote_code=reading.trust_remote_code
    ).traced()
    _refuse_other_models(traced, artefacts)
    if reading.window is not None:
        bound = traced.config.context_length
        protocols.check_windows(reading.window, reading.stride or reading.window, bound)
    if output is not None:
        runs_of.claim(output)
        runs = [replace(run, key=key, folder=output) for run, key in zip(runs, runs_of.keys(traced, runs), strict=True)]
    del traced
    done: dict[int, Outcome] = {}
    if resume:
        done = {index: kept for index, run in enumerate(runs) if (kept := runs_of.load(run)) is not None}
    todo = [index for index in range(len(runs)) if index not in done]
    before = len(done)
    progress("run", before, len(runs))
    measured = jobs.map(
        runs_of.measure, [runs[index] for index in todo], lambda count, _: progress("run", before + count, len(runs))
    )
    done |= dict(zip(todo, measured, strict=True))
    outcomes = [done[index] for index in range(len(runs))]
    for notice in dict.fromkeys(notice for outcome in outcomes for notice in outcome.notices):
        warn(notice)
    return _tabulate(model, outcomes, reading)


# ── the table ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _tabulate(model: str, outcomes: Sequence[Outcome], reading: Reading) -> Comparison:
    by_label: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_label.setdefault(outcome.label, []).append(outcome)
    (base,) = by_label[FLOAT]
    rows = [_row(label, found, base) for label, found in by_label.items()]
    unit = "document" if reading.window is None else "window"
    path = Path(model)
    name = path.resolve().name if path.exists() else model
    return Comparison(name, base.protocol, unit, len(base.each), tuple(rows))


def _row(label: str, found: Sequence[Outcome], base: Outcome) -> Row:
    first = found[0]
    bits = [Quality(outcome.each).bits_per_char for outcome in found]
    mean = tuple(
        Score(scores[0].tokens, scores[0].characters, math.fsum(score.nats for score in scores) / len(scores))
        for scores in zip(*(outcome.each for outcome in found), strict=True)
    )
    try:
        difference = evaluation.paired(mean, base.each)
    except HikuiError as error:
        raise HikuiError(f"{label} cannot be compared with the float model: {error}") from None
    average = _mean(bits)
    squares = math.fsum((value - average) ** 2 for value in bits)
    return Row(
        label,
        first.runs_as,
        tuple(outcome.seed for outcome in found if outcome.seed is not None),
        average,
        math.sqrt(squares / (len(bits) - 1)) if len(bits) > 1 else None,
        Quality(mean).perplexity,
        difference,
        _mean([outcome.block_bpw for outcome in found]),
        _mean([outcome.true_bpw for outcome in found]),
        _mean([outcome.all_bpw for outcome in found]),
        _mean([outcome.linear_bytes for outcome in found]),
        _mean([outcome.total_bytes for outcome in found]),
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _refuse_other_models(traced: Program, artefacts: Sequence[str]) -> None:
    ours = checkpoint_hashes(traced) if artefacts else {}
    for name in artefacts:
        theirs = read_manifest(Path(name)).provenance.checkpoint
        if ours and theirs and ours != theirs:
            raise UsageError(
                f"{name} was made from files with other hashes than the model's; compare artefacts of one model."
            )


def as_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison for programs."""
    return asdict(comparison)
