"""Predicts what each site loses in each format: the costs that `assign` weighs bits against."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from hikui.lowering.errors import HikuiError, VerificationError
from hikui.lowering.formats import Format
from hikui.lowering.ir.program import SENSITIVITY, SITE, STATISTICS, Program
from hikui.lowering.ir.store import TensorSource, WeightStore
from hikui.lowering.pipeline.contract import Pass, PassContext, PassResult
from hikui.passes.graph import blocks, float_sites, is_measured, weight_of
from hikui.passes.matrices import finite_rows, row_parts
from hikui.passes.precision.candidates import parse_formats
from hikui.passes.quantise.columns import mixed_order, require_mixable
from hikui.passes.quantise.rounding import dequantise, round_matrix


@dataclass(frozen=True)
class Sensitivity(Pass):
    """Rounds each site to each format as `rtn` would, and notes the error; nothing is changed but metadata.

    Attributes:
        metric: `output` is the relative error of the site's output, E‖(W−Ŵ)x‖² / E‖Wx‖²: exact where `calibrate` has
            measured the Gram matrix, else from E[x²] as if columns were uncorrelated. `pbar` is the significance of
            methods after Squeeze10, Σ_ij (w_ij−ŵ_ij)²·E[x_j²], not normalised, so large sites weigh more; it never
            uses the Gram matrix. `weight` is ‖W−Ŵ‖²/‖W‖² and needs no calibration.
        formats: candidates, separated by `|`.
        clip: as in `rtn`.
    """

    name: ClassVar[str] = "sensitivity"
    metric: Literal["output", "pbar", "weight"] = "output"
    formats: str = "int4-g64|int8-g64"
    clip: Literal["mse", "minmax"] = "mse"

    def __post_init__(self) -> None:
        self._listed()

    def _listed(self) -> list[Format]:
        """The candidates: of factors, which are two matrices, the error of one says nothing."""
        return parse_formats(self.formats, factors=False)

    def requires(self, program: Program) -> None:
        """Raises HikuiError where sites, or the statistics that the metric needs, are missing."""
        found = float_sites(program)
        if not found:
            raise HikuiError("There is no unpacked linear site; run `canonicalise` first, and `rtn` later.")
        for fmt in self._listed():
            if fmt.is_mixed:
                require_mixable(found, fmt)
        if self.metric != "weight":
            for node in found:
                if not is_measured(node):
                    raise HikuiError(
                        f"Site {node.meta[SITE]} has no statistics; run `calibrate` first, or choose metric=weight."
                    )

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Works block by block, one job each; some rows of a matrix and their rounded form are in memory.

        Raises:
            HikuiError: a site's weights hold NaN or infinite values, or do not fit a format's scales.
        """
        work = program.clone()
        chosen = float_sites(work)
        tasks = self.tasks(work)
        costs: dict[str, dict[str, float]] = {}
        todo = []
        for index, task in enumerate(tasks):
            kept = context.resume.load(f"block-{index}")
            if kept is None:
                todo.append(index)
            else:
                costs.update(_costs(task, kept["costs"]))
        done = len(tasks) - len(todo)
        for at, measured in context.jobs.results(measure, [tasks[index] for index in todo]):
            context.resume.save(f"block-{todo[at]}", {"costs": measured})
            costs.update(_costs(tasks[todo[at]], measured))
            done += 1
            context.progress("sensitivity", done, len(tasks))
        for node in chosen:
            node.meta[SENSITIVITY] = costs[node.meta[SITE]]
        before = [node.meta.get(SENSITIVITY) for node in float_sites(program)]
        if before == [node.meta[SENSITIVITY] for node in chosen]:
            return PassResult(program, False)
        worst = max(
            chosen,
            key=lambda node: (max(node.meta[SENSITIVITY].values()), node.meta[SITE]),
        )
        label = "pbar, after Squeeze10" if self.metric == "pbar" else self.metric
        formats = self._listed()
        note = f"{label}: {len(chosen)} sites in {len(formats)} formats; the largest error is {worst.meta[SITE]}'s"
        return PassResult(work, True, [note])

    def tasks(self, program: Program) -> list["Task"]:
        """The jobs of a program, one a block."""
        return [self._task(program, block) for block in blocks(float_sites(program))]

    def _task(self, program: Program, block: list[list[fx.Node]]) -> "Task":
        """What a process needs to measure the sites of a block, without the program."""
        formats, out = self._listed(), []
        for members in block:
            orders = {str(fmt): mixed_order(program, members, fmt).long() for fmt in formats if fmt.is_mixed}
            for node in members:
                keys = {} if self.metric == "weight" else node.meta[STATISTICS]
                kind = "gram" if self.metric == "output" and "gram" in keys else "mean_square"
                metric = program.store.source(keys[kind]) if keys else None
                source = program.store.source(program.weight_of(weight_of(node)))
                out.append(_Site(node.meta[SITE], program.weight_of(weight_of(node)), source, metric, orders))
        return Task(tuple(out), tuple(formats), self.clip, self.metric != "pbar")

    def ensures(self, program: Program) -> None:
        """Every unpacked site has a finite cost for each format."""
        wanted = {str(fmt) for fmt in self._listed()}
        for node in float_sites(program):
            costs = node.meta.get(SENSITIVITY, {})
            if not wanted <= costs.keys() or not all(torch.isfinite(torch.tensor(list(costs.values())))):
                raise VerificationError(f"Site {node.meta[SITE]} lacks a finite cost of some format.")


@dataclass(frozen=True)
class _Site:
    """A site as a job sees it; `metric` is that of its input, None the identity."""

    name: str
    key: str
    weight: TensorSource
    metric: TensorSource | None
    orders: dict[str, Tensor]


@dataclass(frozen=True)
class Task:
    """The sites of one block and what to measure of them; it can be sent to another process."""

    sites: tuple[_Site, ...]
    formats: tuple[Format, ...]
    clip: str
    relative: bool


def measure(task: Task) -> Tensor:
    """The cost of each site of a block in each format: float64 [sites, formats].

    Raises:
        HikuiError: weights hold NaN or infinite values, or do not fit a format's scales.
    """
    return torch.tensor([_measure(site, task) for site in task.sites], dtype=torch.float64)


def measure_columns(task: Task, columns: int) -> list[Tensor]:
    """As `measure`, each cost shared out among groups of so many columns: float64 [formats, ⌈K/columns⌉], by site.

    With a Gram matrix a column has the whole of its own error and half of what it shares with each other one; the sum
    is what the site costs, and a share may be below zero.

    Raises:
        HikuiError: as `measure`.
    """
    out = []
    for site in task.sites:
        shares, total = _shares(site, task)
        parts = [each.split(columns) for each in shares / (total if task.relative and total > 0 else 1.0)]
        out.append(torch.stack([torch.stack([part.sum() for part in row]) for row in parts]))
    return out


def _costs(task: Task, costs: Tensor) -> dict[str, dict[str, float]]:
    names = [str(fmt) for fmt in task.formats]
    return {site.name: dict(zip(names, row, strict=True)) for site, row in zip(task.sites, costs.tolist(), strict=True)}


def _measure(site: _Site, task: Task) -> list[float]:
    shares, total = _shares(site, task)
    errors: list[float] = shares.sum(1).tolist()
    if not task.relative:
        return errors
    # A site whose output is nothing loses nothing.
    return [error / total if total > 0 else 0.0 for error in errors]


def _shares(site: _Site, task: Task) -> tuple[Tensor, float]:
    """The error in each format by column, float64 [formats, k], and what it is an error of."""
    store = WeightStore({site.key: site.weight})
    n, k = site.weight.info.shape
    metric = torch.ones(k, dtype=torch.float64) if site.metric is None else site.metric.load().double()
    shares, total = torch.zeros(len(task.formats), k, dtype=torch.float64), 0.0
    for rows in row_parts(n, k):
        weight = finite_rows(store, site.key, site.name, rows)
        total += float(_energy(weight, metric).sum())
        for index, fmt in enumerate(task.formats):
            shares[index] += _energy(weight - _rounded(weight, fmt, site, task.clip), metric)
    return shares, total


def _rounded(weight: Tensor, fmt: Format, site: _Site, clip: str) -> Tensor:
    if not fmt.is_integer:
        return weight.to(fmt.weight_dtype).float()
    order = site.orders.get(str(fmt))
    try:
        ordered = weight if order is None else weight[:, order]
        rounded = dequantise(round_matrix(ordered, fmt, clip), fmt)
    except OverflowError as error:
        raise HikuiError(f"Site {site.name} as {fmt}: {error}; leave the format out.") from error
    return rounded if order is None else rounded[:, order.argsort()]


def _energy(matrix: Tensor, metric: Tensor) -> Tensor:
    """Σ_i (D·R) ∘ D by column, float64 [k]; R = `metric` ([k, k] or its diagonal [k])."""
    wide = matrix.double()
    weighted = wide * metric if metric.dim() == 1 else wide @ metric
    return (weighted * wide).sum(0)
