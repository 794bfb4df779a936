"""Predicts what each site loses in each format: the costs that `assign` weighs bits against."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from hikui.lowering.errors import HikuiError, VerificationError
from hikui.lowering.formats import Format
from hikui.lowering.passes_base import Pass, PassContext, PassResult
from hikui.lowering.program import GROUP, SENSITIVITY, SITE, STATISTICS, Program
from hikui.passes.columns import column_order, require_mixable
from hikui.passes.formats import parse_formats
from hikui.passes.graph import float_sites, groups, weight_of
from hikui.passes.packing import load_finite
from hikui.passes.rounding import dequantise, round_matrix

_CHUNK = 1 << 22
"""Weights compared at a time, which bounds the float64 copies."""


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
        parse_formats(self.formats)

    def requires(self, program: Program) -> None:
        """Raises HikuiError where sites, or the statistics that the metric needs, are missing."""
        found = float_sites(program)
        if not found:
            raise HikuiError("There is no unpacked linear site; run `canonicalise` first, and `rtn` later.")
        for fmt in parse_formats(self.formats):
            if fmt.is_mixed:
                require_mixable(found, fmt)
        if self.metric != "weight":
            for node in found:
                if STATISTICS not in node.meta:
                    raise HikuiError(
                        f"Site {node.meta[SITE]} has no statistics; run `calibrate` first, or choose metric=weight."
                    )

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Works site by site; at most one float matrix and its rounded form are in memory.

        Raises:
            HikuiError: a site's weights hold NaN or infinite values, or do not fit a format's scales.
        """
        work = program.clone()
        chosen = float_sites(work)
        formats, tied = parse_formats(self.formats), groups(chosen)
        orders = {
            (name, fmt): column_order(work, members, fmt).long()
            for name, members in tied.items()
            for fmt in formats
            if fmt.is_mixed
        }
        for index, node in enumerate(chosen):
            context.progress("sensitivity", index, len(chosen))
            node.meta[SENSITIVITY] = self._measure(work, node, formats, orders)
        context.progress("sensitivity", len(chosen), len(chosen))
        before = [node.meta.get(SENSITIVITY) for node in float_sites(program)]
        if before == [node.meta[SENSITIVITY] for node in chosen]:
            return PassResult(program, False)
        worst = max(
            chosen,
            key=lambda node: (max(node.meta[SENSITIVITY].values()), node.meta[SITE]),
        )
        label = "pbar, after Squeeze10" if self.metric == "pbar" else self.metric
        note = f"{label}: {len(chosen)} sites in {len(formats)} formats; the largest error is {worst.meta[SITE]}'s"
        return PassResult(work, True, [note])

    def _measure(
        self, program: Program, node: fx.Node, formats: list[Format], orders: dict[tuple[str, Format], Tensor]
    ) -> dict[str, float]:
        site = node.meta[SITE]
        weight = load_finite(program, weight_of(node), site)
        out = {}
        for fmt in formats:
            if fmt.is_integer:
                order = orders.get((node.meta[GROUP], fmt))
                try:
                    ordered = weight if order is None else weight[:, order]
                    rounded = dequantise(round_matrix(ordered, fmt, self.clip), fmt)
                except OverflowError as error:
                    raise HikuiError(f"Site {site} as {fmt}: {error}; leave the format out.") from error
                rounded = rounded if order is None else rounded[:, order.argsort()]
            else:
                rounded = weight.to(fmt.weight_dtype).float()
            out[str(fmt)] = self._cost(program, node, weight, rounded)
        return out

    def _cost(self, program: Program, node: fx.Node, weight: Tensor, rounded: Tensor) -> float:
        if self.metric == "weight":
            metric = torch.ones(weight.shape[1], dtype=torch.float64)
        else:
            keys = node.meta[STATISTICS]
            exact = self.metric == "output" and "gram" in keys
            metric = program.store.load(keys["gram" if exact else "mean_square"]).double()
        error = _energy(weight, rounded, metric)
        if self.metric == "pbar":
            return error
        total = _energy(weight, None, metric)
        # A site whose output is nothing loses nothing.
        return error / total if total > 0 else 0.0

    def ensures(self, program: Program) -> None:
        """Every unpacked site has a finite cost for each format."""
        wanted = {str(fmt) for fmt in parse_formats(self.formats)}
        for node in float_sites(program):
            costs = node.meta.get(SENSITIVITY, {})
            if not wanted <= costs.keys() or not all(torch.isfinite(torch.tensor(list(costs.values())))):
                raise VerificationError(f"Site {node.meta[SITE]} lacks a finite cost of some format.")


def _energy(matrix: Tensor, minus: Tensor | None, metric: Tensor) -> float:
    """Σ (D·R) ∘ D in float64; D = matrix − minus, R = `metric` ([k, k] or its diagonal [k]), a few rows at a time."""
    rows = max(1, _CHUNK // matrix.shape[1])
    total = 0.0
    for start in range(0, matrix.shape[0], rows):
        part = matrix[start : start + rows].double()
        if minus is not None:
            part = part - minus[start : start + rows].double()
        weighted = part * metric if metric.dim() == 1 else part @ metric
        total += float((weighted * part).sum())
    return total
