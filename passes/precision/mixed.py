"""Gives sites a format of two parts: the columns that matter in int4, all others as signs (after Squeeze10)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from hikui.lowering.errors import HikuiError, UsageError
from hikui.lowering.formats import GROUPS, MIXED, Format
from hikui.lowering.ir.program import COLUMNS, FORMAT, SITE, Program
from hikui.lowering.pipeline.contract import Pass, PassContext, PassResult
from hikui.passes.graph import float_sites, groups, matrix_shape, selected, sites
from hikui.passes.precision.candidates import tied_nbytes
from hikui.passes.quantise.columns import BY_OUTPUT, Criterion, require_mixable


@dataclass(frozen=True)
class Mixed(Pass):
    """Assigns `mixed-…` to every site that has no format yet; `rtn` then chooses the columns and rounds.

    A weight takes about 1 + 3·share + 16/group bits: 1.6 with the defaults, where K is large.

    Attributes:
        share: of the columns that are int4, between 0 and 1; rounded to whole groups, at least one.
        group: input columns that share a scale: 32, 64 or 128.
        by: which columns matter: those with the largest Σ_i w_ij²·E[x_j²], what the outputs owe to them (`output`);
            Σ_i (|w_ij| − mean_j |w_ij|)²·E[x_j²], what signs would cost the outputs (`pbar`, after Squeeze10's
            post-binarisation activation robustness, whose formula is not published); the same first factor over the
            diagonal of the inverse of E[x·xᵀ], what they would cost after all others have made up for it (`obs`, after
            Optimal Brain Surgeon; wants `calibrate{gram=true}`); E[x_j²] (`activation`, after PTQ1.61); Σ_i w_ij²
            (`weight`); or by chance, to compare with (`random`).
        seed: of chance.
        sites: regular expression of the sites to assign; empty is all.
        skip: regular expression of the sites to leave as they are.
    """

    name: ClassVar[str] = "mixed"
    share: float = 0.15
    group: int = 128
    by: Criterion = BY_OUTPUT
    seed: int = 0
    sites: str = ""
    skip: str = ""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UsageError(f"mixed cannot make {self.share:g} of the columns int4; share is above 0 and at most 1.")
        if self.group not in GROUPS:
            raise UsageError(f"mixed cannot take a group of {self.group}; choose {', '.join(map(str, GROUPS))}.")

    def requires(self, program: Program) -> None:
        """Raises HikuiError where no site is named, or one has no statistics or too few columns."""
        if not sites(program):
            raise HikuiError("No linear site is named; run `canonicalise` first.")
        for node in self._chosen(program):
            require_mixable([node], self._format(node), self.by)

    def _chosen(self, program: Program) -> list[fx.Node]:
        return [node for node in selected(float_sites(program), self.sites, self.skip) if FORMAT not in node.meta]

    def _format(self, node: fx.Node) -> Format:
        _, k = matrix_shape(node)
        if k < self.group:
            raise HikuiError(
                f"Site {node.meta[SITE]} has {k} columns, fewer than a group of {self.group}; choose a smaller group, "
                "or leave it out with skip."
            )
        wanted = max(1, round(self.share * k / self.group))
        return Format(MIXED, self.group, min(wanted, k // self.group) * self.group)

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Works on a clone."""
        work = program.clone()
        chosen = self._chosen(work)
        if not chosen:
            return PassResult(program, False)
        nbytes = weights = 0
        counts: dict[str, int] = {}
        for members in groups(chosen).values():
            # Tied sites have the same columns, so the same format.
            fmt = self._format(members[0])
            shapes = [matrix_shape(node) for node in members]
            nbytes += tied_nbytes([fmt] * len(shapes), shapes)
            weights += sum(n * k for n, k in shapes)
            counts[str(fmt)] = counts.get(str(fmt), 0) + len(members)
            for node in members:
                node.meta[FORMAT] = str(fmt)
                if self.by != BY_OUTPUT:
                    node.meta[COLUMNS] = f"random/{self.seed}" if self.by == "random" else self.by
        notes = [f"{8 * nbytes / weights:.3f} true bits per weight over these sites"]
        return PassResult(work, True, notes + [f"{name}: {counts[name]} sites" for name in sorted(counts)])
