"""What `smooth` and `awq` share: a factor for each channel of what a tied group reads, chosen somehow, then folded."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from hikui.lowering.engine.workers import Workers
from hikui.lowering.errors import HikuiError
from hikui.lowering.ir.program import SITE, STATISTICS, TRANSFORMED, Program
from hikui.lowering.pipeline.contract import Pass, PassContext, PassResult
from hikui.passes.graph import float_sites, groups, pattern, selected, sites
from hikui.passes.patterns.match import NoMatch
from hikui.passes.transform.folding import Fold, find_fold, fold


@dataclass(frozen=True)
class Factor:
    """What a transform has chosen for a group.

    Attributes:
        factor: float32 [c], positive, for each channel of the fold; None leaves the group as it is.
        note: for the report.
    """

    factor: Tensor | None
    note: str


@dataclass(frozen=True)
class Scaling(Pass):
    """Base of the passes that fold factors.

    Attributes:
        sites: regular expression of the sites; empty is all. A tied group takes part as a whole or not at all.
        skip: regular expression of the sites to leave as they are.
    """

    evens_columns: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ()
    """Which statistics of its sites it reads."""

    sites: str = ""
    skip: str = ""

    def __post_init__(self) -> None:
        for option in ("sites", "skip"):
            pattern(getattr(self, option), option)

    def wanted(self) -> tuple[str, ...]:
        """Which statistics of its sites it reads with these options."""
        return self.needs

    @abstractmethod
    def choose(self, program: Program, found: Fold, workers: Workers) -> Factor:
        """The factors of a group."""

    def requires(self, program: Program) -> None:
        """Raises HikuiError where no float site is named, or one has not been measured."""
        if not sites(program):
            raise HikuiError("No linear site is named; run `canonicalise` first.")
        chosen = list(selected(float_sites(program), self.sites, self.skip))
        if not chosen:
            raise HikuiError(f"No float site is left for {self}; run it before the sites are quantised.")
        for node in chosen:
            missing = [kind for kind in self.wanted() if kind not in node.meta.get(STATISTICS, {})]
            if missing and not _is_done(node, self.name):
                calibrate = "calibrate{gram=true}" if {"gram", "sample"} & set(missing) else "calibrate"
                raise HikuiError(
                    f"Site {node.meta[SITE]} has no statistics of the kind '{missing[0]}'; run `{calibrate}` first."
                )

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Goes from group to group on a clone; a group that has had its factors gets no others.

        Raises:
            HikuiError: a matrix holds NaN or infinite values.
        """
        work = program.clone()
        chosen = set(selected(float_sites(work), self.sites, self.skip))
        tied = {name: members for name, members in groups(float_sites(work)).items() if chosen & set(members)}
        notes, modified = [], False
        with Workers(context.workers) as workers:
            for index, (name, members) in enumerate(tied.items()):
                context.progress(self.name, index, len(tied))
                if all(_is_done(node, self.name) for node in members):
                    continue
                choice = self._attempt(work, members, chosen, workers)
                if isinstance(choice, NoMatch):
                    notes.append(f"{name}: left alone, {choice.reason}")
                    continue
                modified = True
                notes.append(f"{name}: {choice.note}")
        context.progress(self.name, len(tied), len(tied))
        if not modified:
            return PassResult(program, False, notes)
        work.recompile()
        return PassResult(work, True, notes)

    def _attempt(
        self, work: Program, members: list[fx.Node], chosen: set[fx.Node], workers: Workers
    ) -> Factor | NoMatch:
        left = [node for node in members if node not in chosen]
        if left:
            return NoMatch(f"its site {left[0].meta[SITE]} is not among the chosen ones", left[0].name)
        found = find_fold(work, members)
        if isinstance(found, NoMatch):
            return found
        choice = self.choose(work, found, workers)
        if choice.factor is not None:
            if not bool((choice.factor > 0).all() & choice.factor.isfinite().all()):
                raise HikuiError(
                    f"Site {members[0].meta[SITE]}: the factors of {self.name} are not positive numbers; leave it out "
                    "with skip."
                )
            if not torch.equal(choice.factor, torch.ones_like(choice.factor)):
                fold(work, found, choice.factor, self.name)
        for node in members:
            node.meta[TRANSFORMED] = (*node.meta.get(TRANSFORMED, ()), self.name)
        return choice


def _is_done(node: fx.Node, name: str) -> bool:
    return name in node.meta.get(TRANSFORMED, ())
