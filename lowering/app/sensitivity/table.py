"""Measures a model's sites in several formats, and works out the best choice at each number of bits."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Literal

from hikui.lowering.app.lower import read_calibration
from hikui.lowering.app.notices import tell_of_text
from hikui.lowering.app.request import Execution, Request, available_passes
from hikui.lowering.engine.resume import Resume, run_key
from hikui.lowering.errors import HikuiError, UsageError
from hikui.lowering.formats import Format
from hikui.lowering.ir.program import BLOCK, GROUP, SENSITIVITY, SITE, Program
from hikui.lowering.pipeline.contract import Calibration, Pass, PassContext
from hikui.lowering.pipeline.recipe import CalibrationSettings
from hikui.lowering.pipeline.run import Pipeline
from hikui.lowering.pipeline.text import parse_pipeline

Measure = Literal["trial", "output", "pbar", "weight"]

UNITS = {
    "trial": "nats a token that the model's next tokens move, one site rounded at a time",
    "output": "relative squared error of a site's output",
    "pbar": "squared error of weights times the mean squares of what they multiply, after Squeeze10",
    "weight": "relative squared error of the weights",
}
"""What the numbers are, by measure."""

_STEPS = 13
"""Budgets on the front, from the smallest to the largest choice."""


@dataclass(frozen=True)
class SiteCosts:
    """What one site costs.

    Attributes:
        name, group: of the site, and of the sites that read the same activation.
        block: its number, or None.
        shape: (out features, in features).
        costs: by format.
        columns: by format, how these are shared out among neighbouring columns, if that was asked for.
    """

    name: str
    group: str
    block: int | None
    shape: tuple[int, int]
    costs: dict[str, float]
    columns: dict[str, tuple[float, ...]] = field(default_factory=dict)

    def half_in(self, name: str) -> float:
        """The least share of the groups of columns that has half of what a format costs; 0 where it costs nothing."""
        held = list(accumulate(sorted(self.columns[name], reverse=True)))
        if held[-1] <= 0:
            return 0.0
        return next(count for count, sum_ in enumerate(held, 1) if sum_ >= held[-1] / 2) / len(held)

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Choice:
    """The least sum of costs at some bits.

    Attributes:
        bpw: true bits per weight of the sites in blocks.
        cost: the sum.
        formats: how many sites have each format.
    """

    bpw: float
    cost: float
    formats: dict[str, int]


@dataclass(frozen=True)
class Sensitivities:
    """The whole table.

    Attributes:
        model, measure, unit, text: what was measured, and on what.
        tokens: of the text that were read.
        formats: in the order in which they were asked for.
        sites: in graph order.
        front: from few bits to many, over the sites in blocks, or over all where none is in a block.
    """

    model: str
    measure: str
    unit: str
    text: str
    tokens: int
    formats: tuple[str, ...]
    sites: tuple[SiteCosts, ...]
    front: tuple[Choice, ...]

    def as_json(self) -> str:
        """The table as JSON text; the same table gives the same bytes."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"


def measure(
    request: Request,
    formats: Sequence[str],
    by: Measure = "trial",
    *,
    texts: int = 4,
    columns: int = 0,
    settings: CalibrationSettings = CalibrationSettings(),
    execution: Execution = Execution(),
    kept: Path | None = None,
) -> Sensitivities:
    """Measures every linear site of a model in each format.

    Args:
        request: the model, its text and its context; its recipe is not looked at.
        formats: names of formats, two or more.
        by: what is measured.
        texts: windows that `trial` reads.
        columns: also share costs out among columns, so many together; 0 does not.
        settings: which windows of the text there are.
        execution: how the work is done.
        kept: folder for finished work, which a later call with the same request goes on from; removed when all is done.

    Raises:
        HikuiError: the model or the text is at fault, in one sentence.
        UsageError: a format is not known, or there are fewer than two.
    """
    names = list(dict.fromkeys(str(Format.parse(name)) for name in formats))
    if len(names) < 2:
        raise UsageError("There is nothing to choose from; give two formats or more, such as int2-g64,int4-g64.")
    if by != "trial" and (factors := [name for name in names if Format.parse(name).is_factors]):
        raise UsageError(f"{factors[0]} is of two matrices, whose error is not that of rounding one; take trial.")
    if by == "weight" and any(Format.parse(name).is_mixed for name in names):
        raise UsageError(
            "The columns of a mixed format are chosen by what activations do, so not by weight; take trial."
        )
    if columns and by == "trial":
        raise UsageError(
            "A trial rounds whole sites, so it says nothing of columns; measure by output, pbar or weight."
        )
    available = available_passes()
    listed = "|".join(names)
    how = (
        f"trial{{formats={listed},texts={texts}}}" if by == "trial" else f"sensitivity{{metric={by},formats={listed}}}"
    )
    steps = parse_pipeline(f"canonicalise,{'' if by == 'weight' else 'calibrate,'}{how}", available.values())
    execution.progress("trace", 0, 1)
    traced = request.traced()
    execution.progress("trace", 1, 1)
    for sentence in traced.cautions:
        execution.warn(sentence)
    data = None
    if by != "weight":
        path = None if request.calibration is None else Path(request.calibration)
        data = read_calibration(traced, path, settings)
        tell_of_text(data, path, settings, traced, execution.announce, execution.warn)
    resume = Resume()
    if kept is not None:
        resume = Resume(kept / run_key(traced, how, data.chunks if data else (), map(type, steps)))
    context = PassContext(
        data,
        None,
        execution.progress,
        resume=resume,
        memory=execution.memory,
        jobs=execution.jobs,
        announce=execution.announce,
        warn=execution.warn,
    )
    measured = Pipeline(steps).run(traced, context)
    sites = _sites(measured, names)
    if columns:
        shares = _columns(measured, steps[-1], context, columns)
        sites = [
            replace(site, columns={name: tuple(row) for name, row in zip(names, shares[site.name], strict=True)})
            for site in sites
        ]
    if kept is not None:
        shutil.rmtree(kept, ignore_errors=True)
    return Sensitivities(
        request.name,
        by,
        UNITS[by],
        "" if data is None else data.source,
        0 if data is None else _tokens(data, texts if by == "trial" else len(data.chunks)),
        tuple(names),
        tuple(sites),
        tuple(front(sites, names)),
    )


def _tokens(data: Calibration, texts: int) -> int:
    return sum(int(chunk.shape[1]) for chunk in data.chunks[:texts])


def _columns(program: Program, step: Pass, context: PassContext, columns: int) -> dict[str, list[list[float]]]:
    """What each format costs by groups of columns, by site; one job a block."""
    from hikui.passes.precision.sensitivity import Sensitivity, measure_columns

    assert isinstance(step, Sensitivity), "trials have no columns"
    tasks = step.tasks(program)
    out: dict[str, list[list[float]]] = {}
    for done, (index, shares) in enumerate(context.jobs.results(partial(measure_columns, columns=columns), tasks), 1):
        out |= {site.name: found.tolist() for site, found in zip(tasks[index].sites, shares, strict=True)}
        context.progress("columns", done, len(tasks))
    return out


def _sites(program: Program, names: Sequence[str]) -> list[SiteCosts]:
    from hikui.passes.graph import float_sites, matrix_shape

    out = []
    for node in float_sites(program):
        if SENSITIVITY not in node.meta:
            continue  # Ahead of the first block, where `trial` does not begin.
        n, k = matrix_shape(node)
        costs = {name: float(node.meta[SENSITIVITY][name]) for name in names}
        out.append(SiteCosts(node.meta[SITE], node.meta[GROUP], node.meta.get(BLOCK), (n, k), costs))
    if not out:
        raise HikuiError("The model has no linear site; `hikui explain` says what did not match.")
    return out


def front(sites: Sequence[SiteCosts], names: Sequence[str]) -> list[Choice]:
    """The best choices at several numbers of bits, each better than all with fewer."""
    from hikui.passes.precision.budget import Candidates, solve
    from hikui.passes.precision.candidates import tied_nbytes

    inside = [site for site in sites if site.block is not None] or list(sites)
    formats = [Format.parse(name) for name in names]
    alike: dict[str, list[SiteCosts]] = {}
    for site in inside:
        # As `assign` has it: those that read one activation share the order of a mixed format's columns.
        alike.setdefault(site.group if any(fmt.is_mixed for fmt in formats) else site.name, []).append(site)
    choices = [
        Candidates(
            tuple(site.name for site in tied),
            tuple(names),
            tuple(tied_nbytes([fmt] * len(tied), [site.shape for site in tied]) for fmt in formats),
            tuple(sum(site.costs[name] for site in tied) for name in names),
            sum(site.weights for site in tied),
        )
        for tied in alike.values()
    ]
    weights = sum(choice.weights for choice in choices)
    least, most = (sum(pick(choice.spent) for choice in choices) for pick in (min, max))
    out: list[Choice] = []
    for step in range(_STEPS):
        budget = least + (most - least) * step // (_STEPS - 1)
        picks = solve(choices, budget)
        taken = sum(choice.spent[pick] for choice, pick in zip(choices, picks, strict=True))
        cost = sum(choice.costs[pick] for choice, pick in zip(choices, picks, strict=True))
        chosen = [names[pick] for choice, pick in zip(choices, picks, strict=True) for _ in choice.sites]
        counts = {name: chosen.count(name) for name in names if name in chosen}
        found = Choice(8 * taken / weights, cost, counts)
        if not out or (found.cost < out[-1].cost and found.bpw > out[-1].bpw):
            out.append(found)
    return out
