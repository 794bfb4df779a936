"""What every quantiser of matrices shares: site by site, or on a walk through the model.

A quantiser that needs nothing but the weights, or the statistics that `calibrate` has stored, works site by site. One
that follows what its own rounding does to the activations, or that a `qep` pass has asked to correct the weights, walks
through the model with the float and the quantised activations side by side, block by block (`walk.py`).
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from hikui.lowering.engine.workers import Workers
from hikui.lowering.errors import HikuiError
from hikui.lowering.formats import Format
from hikui.lowering.ir.program import CORRECTION, SITE, STATISTICS, Program
from hikui.lowering.pipeline.contract import PassContext, PassResult
from hikui.passes.graph import sites
from hikui.passes.measure.evidence import Evidence, OwnEvidence
from hikui.passes.quantise.columns import require_mixable
from hikui.passes.quantise.packer import Packer
from hikui.passes.quantise.rounder import Prepared, Rounder
from hikui.passes.quantise.walk import Walk


@dataclass(frozen=True)
class Quantiser(Rounder[Prepared]):
    """Base of the passes that round matrices; `Rounder` has the options."""

    sequential: ClassVar[bool] = False
    """Whether it measures its sites' inputs itself, behind the blocks that it has already quantised."""

    def walks(self, program: Program) -> bool:
        """Whether it has to go through the model with the calibration text."""
        return self.sequential or any(CORRECTION in node.meta for node in self.chosen(program))

    def requires(self, program: Program) -> None:
        """Raises HikuiError where no site is named, or statistics are wanted and missing."""
        if not sites(program):
            raise HikuiError("No linear site is named; run `canonicalise` first.")
        walks = self.walks(program)
        for node in self.chosen(program):
            if not walks and self.wants():
                missing = sorted(self.wants() - node.meta.get(STATISTICS, {}).keys())
                if missing:
                    option = "{gram=true}" if missing == ["gram"] else ""
                    raise HikuiError(
                        f"Site {node.meta[SITE]} has no statistics of the kind '{missing[0]}', which {self} needs; "
                        f"run `calibrate{option}` first."
                    )
            if (fmt := self.format_of(node)).is_mixed:
                require_mixable([node], fmt)

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Quantises one site after the other; at most one float matrix is in memory.

        Raises:
            HikuiError: a site's weights hold NaN or infinite values, or do not fit the format; or the pass has to go
                through the model and there is no calibration text, or not enough memory.
        """
        work = program.clone()
        chosen = self.chosen(work)
        if not chosen:
            return PassResult(program, False)
        with Workers(context.workers) as workers:
            if self.walks(work):
                notes = Walk(Packer(self, work, chosen, workers), program, work, context, workers).run()
            else:
                notes = self._site_by_site(work, chosen, context, workers)
        work.recompile()
        return PassResult(work, True, notes)

    def _site_by_site(self, work: Program, chosen: list[fx.Node], context: PassContext, workers: Workers) -> list[str]:
        notes: list[str] = []
        packer = Packer(self, work, chosen, workers)
        for index, node in enumerate(chosen):
            context.progress(self.name, index, len(chosen))
            evidence = OwnEvidence.stored(work, node, self.wants()) if self.wants() else None
            notes += packer.pack(node, evidence, resume=context.resume)
        context.progress(self.name, len(chosen), len(chosen))
        return notes


@dataclass(frozen=True)
class DataFreeQuantiser(Quantiser[None]):
    """Base of those that look at the weights alone."""

    def prepare(self, evidence: Evidence, workers: Workers, fmt: Format) -> None:
        """Nothing is worked out beforehand."""
