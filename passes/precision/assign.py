"""Chooses a format for each site under a budget of true bits per weight."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from torch import fx

from hikui.lowering.errors import HikuiError, UsageError, VerificationError
from hikui.lowering.formats import Format
from hikui.lowering.ir.program import BLOCK, FIXED, FORMAT, SENSITIVITY, SITE, Program
from hikui.lowering.pipeline.contract import Pass, PassContext, PassResult
from hikui.passes.graph import float_sites, groups, matrix_shape
from hikui.passes.precision.budget import Candidates, cheapest, solve, spend_at_random
from hikui.passes.precision.candidates import parse_formats, tied_nbytes
from hikui.passes.precision.fitted_costs import between, fitted
from hikui.passes.precision.latency import PICOSECONDS, Speeds
from hikui.passes.precision.rest import rest_nbytes


@dataclass(frozen=True)
class Assign(Pass):
    """Gives every unpacked site one of the candidate formats.

    Where one of these is mixed, sites that read one activation get the same, since they share the order of its columns.
    What `override` has fixed stays, and its bits count.

    Attributes:
        target_bpw: budget in true bits per weight, over all sites together; scales and padding count.
        formats: candidates, separated by `|`.
        mode: `optimal` has the least sum of sensitivities that the budget allows; `random` spends the budget without
            looking at them (the baseline to beat); `uniform` gives `format` to all, whatever the budget.
        format: for `uniform`.
        seed: for `random`.
        over: `all` sites, or those in `blocks` alone: then the others, such as the head, are left as they are.
        target_size: a budget in megabytes (10⁶ bytes) in the place of `target_bpw`, of all weights: also of tables,
            norms, and sites that have their format; 0 for none.
        tables: the format that `embedding` will give to tables that no head shares; for `target_size`.
        target_latency: a budget in milliseconds in the place of `target_bpw`, of what the products of these sites take
            for one token on one thread; 0 for none.
        speeds: of each kind of weights on the machine it is for, in 10⁹ weights a second (`int4=14.2|sign=40`), as
            `hikui bench` measures them; for `target_latency`.
        costs: `measured` as they are, or `fitted`: of each site its own level times what each format has on average
            where matrices are of that size, so that the noise of few texts decides less; factors between ranks that
            were tried are candidates then too.
    """

    name: ClassVar[str] = "assign"
    budget: ClassVar[str] = "target_bpw"
    size_budget: ClassVar[str] = "target_size"
    latency_budget: ClassVar[str] = "target_latency"
    target_bpw: float = 5.5
    formats: str = "int4-g64|int8-g64"
    mode: Literal["optimal", "random", "uniform"] = "optimal"
    format: str = "int8-g64"
    seed: int = 0
    over: Literal["all", "blocks"] = "all"
    target_size: float = 0.0
    tables: str = "int8-channel"
    target_latency: float = 0.0
    speeds: str = ""
    costs: Literal["measured", "fitted"] = "measured"

    def __post_init__(self) -> None:
        speeds = Speeds.parse(self.speeds)
        if self.target_latency < 0:
            raise UsageError(
                f"assign cannot keep to {self.target_latency:g} ms; target_latency is above 0, or 0 for none."
            )
        if self.target_latency and self.target_size:
            raise UsageError("assign keeps to one budget; leave out target_size or target_latency.")
        if self.target_latency and (unknown := speeds.lacks(self._listed())):
            raise UsageError(
                f"assign cannot keep to {self.target_latency:g} ms, for speeds says nothing of {unknown[0]}; add what "
                "`hikui bench` measures, or leave its formats out."
            )
        if self.target_size < 0:
            raise UsageError(f"assign cannot keep to {self.target_size:g} MB; target_size is above 0, or 0 for none.")
        if not Format.parse(self.tables).is_plain:
            raise UsageError(f"assign cannot count tables in {self.tables}; give a format whose columns are all alike.")
        if not self.target_bpw > 0:
            raise UsageError(f"assign cannot keep to {self.target_bpw:g} bits per weight; target_bpw is above 0.")
        parse_formats(self.formats)
        Format.parse(self.format)

    def chosen(self, program: Program) -> list[fx.Node]:
        """The unpacked sites that the budget is for, in graph order."""
        return [node for node in float_sites(program) if self.over == "all" or BLOCK in node.meta]

    def requires(self, program: Program) -> None:
        """Raises HikuiError where sites, or sensitivities of the candidates, are missing."""
        found = self.chosen(program)
        if not found:
            where = "" if self.over == "all" else " in a block"
            raise HikuiError(f"There is no unpacked linear site{where}; run `canonicalise` first, and `rtn` later.")
        if self.mode == "optimal":
            costs = self._costs(found)
            for node in found:
                for fmt in parse_formats(self.formats):
                    if FIXED not in node.meta and str(fmt) not in costs[node.meta[SITE]]:
                        raise HikuiError(
                            f"Site {node.meta[SITE]} has no sensitivity for {fmt}; run `sensitivity` or `trial` with "
                            "this format first."
                        )

    def _costs(self, found: Sequence[fx.Node]) -> dict[str, dict[str, float]]:
        """Of each site, by the names of formats, as `costs` has them."""
        measured = {node.meta[SITE]: dict(node.meta.get(SENSITIVITY, {})) for node in found}
        if self.costs == "measured":
            return measured
        shapes = {node.meta[SITE]: matrix_shape(node) for node in found}
        out = fitted(measured, shapes)
        for site, of_site in out.items():
            for fmt in self._listed():
                if fmt.is_factors and str(fmt) not in of_site:
                    cost = between(of_site, shapes[site], fmt)
                    if cost is not None:
                        of_site[str(fmt)] = cost
        return out

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Works on a clone.

        Raises:
            HikuiError: the budget cannot be met; the sentence names the smallest that can.
        """
        work = program.clone()
        choices = self._choices(work)
        budget = self._budget(work, sum(choice.weights for choice in choices))
        picks = self._pick(choices, budget)
        changed = False
        nodes = {node.meta[SITE]: node for node in self.chosen(work)}
        for choice, pick in zip(choices, picks, strict=True):
            for site in choice.sites:
                changed |= nodes[site].meta.get(FORMAT) != choice.formats[pick]
                nodes[site].meta[FORMAT] = choice.formats[pick]
        if not changed:
            return PassResult(program, False)
        return PassResult(work, True, self._notes(choices, picks))

    def _choices(self, program: Program) -> list[Candidates]:
        """One choice a site, and one for those that must be alike; those that `override` has fixed have none."""
        out = []
        names, known = self._names(), self._costs(self.chosen(program))
        for members in groups(self.chosen(program)).values():
            fixed = [node for node in members if FIXED in node.meta]
            free = [node for node in members if FIXED not in node.meta]
            alike = [free] if self._ties() else [[node] for node in free]
            for tied, formats in [
                *(([node], [node.meta[FIXED]]) for node in fixed),
                *((tied, names) for tied in alike),
            ]:
                if not tied:
                    continue
                shapes = [matrix_shape(node) for node in tied]
                costs = [[known[node.meta[SITE]].get(name, 0.0) for node in tied] for name in formats]
                out.append(
                    Candidates(
                        sites=tuple(node.meta[SITE] for node in tied),
                        formats=tuple(formats),
                        spent=tuple(self._spent([Format.parse(name)] * len(shapes), shapes) for name in formats),
                        costs=tuple(math.fsum(of_members) for of_members in costs),
                        weights=sum(n * k for n, k in shapes),
                    )
                )
        return out

    def _listed(self) -> list[Format]:
        """The candidates."""
        return parse_formats(self.formats) if self.mode != "uniform" else [Format.parse(self.format)]

    def _names(self) -> list[str]:
        return [str(fmt) for fmt in self._listed()]

    def _spent(self, formats: Sequence[Format], shapes: Sequence[tuple[int, int]]) -> int:
        """What tied sites take of the budget, in its unit: bytes, or picoseconds."""
        if not self.target_latency:
            return tied_nbytes(formats, shapes)
        speeds = Speeds.parse(self.speeds)
        if unknown := speeds.lacks(formats):
            raise HikuiError(
                f"An `override` asks for {unknown[0]}, of which assign's speeds say nothing; add what `hikui bench` "
                "measures, or take another format."
            )
        return sum(speeds.picoseconds(fmt, *shape) for fmt, shape in zip(formats, shapes, strict=True))

    def _ties(self) -> bool:
        """Whether sites that read one activation must have one format."""
        return any(Format.parse(name).is_mixed for name in self._names())

    def _budget(self, program: Program, weights: int) -> int:
        """For the chosen sites, which have so many weights, in the unit of `_spent`."""
        if self.target_latency:
            return math.floor(self.target_latency * PICOSECONDS)
        if self.target_size:
            rest = rest_nbytes(program, self.chosen(program), Format.parse(self.tables))
            return math.floor(self.target_size * 1e6) - rest
        return math.floor(self.target_bpw * weights / 8)

    def _pick(self, choices: Sequence[Candidates], budget: int) -> list[int]:
        if self.mode == "uniform":
            return [0] * len(choices)
        weights = sum(choice.weights for choice in choices)
        least = sum(choice.spent[pick] for choice, pick in zip(choices, cheapest(choices), strict=True))
        if least > budget and self.target_latency:
            shortest = math.ceil(least / PICOSECONDS * 1000) / 1000
            raise HikuiError(
                f"A budget of {self.target_latency:g} ms cannot be met: with {self.formats} the products of a token "
                f"take at least {shortest:.3f} ms; raise target_latency or add a faster format."
            )
        if least > budget and self.target_size:
            smallest = math.ceil((self.target_size * 1e6 + least - budget) / 1e4) / 100
            raise HikuiError(
                f"A budget of {self.target_size:g} MB cannot be met: with {self.formats} the weights take at least "
                f"{smallest:.2f} MB; raise target_size, add a smaller format, or give the other sites smaller ones."
            )
        if least > budget:
            smallest = math.ceil(8 * least / weights * 1000) / 1000
            raise HikuiError(
                f"A budget of {self.target_bpw:g} bits per weight cannot be met: with {self.formats} the smallest that "
                f"can is {smallest:.3f}; raise target_bpw or add a smaller format."
            )
        if self.mode == "random":
            return spend_at_random(choices, budget, np.random.default_rng(self.seed))
        return solve(choices, budget)

    def _notes(self, choices: Sequence[Candidates], picks: Sequence[int]) -> list[str]:
        taken = sum(choice.spent[pick] for choice, pick in zip(choices, picks, strict=True))
        weights = sum(choice.weights for choice in choices)
        if self.target_latency:
            notes = [f"{taken / PICOSECONDS:.3f} ms for the products of a token, as reckoned ({self.mode})"]
        else:
            notes = [f"{8 * taken / weights:.3f} true bits per weight ({self.mode})"]
        counts: dict[str, int] = {}
        for choice, pick in zip(choices, picks, strict=True):
            counts[choice.formats[pick]] = counts.get(choice.formats[pick], 0) + len(choice.sites)
        return notes + [f"{name}: {counts[name]} sites" for name in sorted(counts)]

    def ensures(self, program: Program) -> None:
        """Every site has a format, sites that must be alike the same one, and the budget holds."""
        spent = weights = 0
        for members in groups(self.chosen(program)).values():
            if any(FORMAT not in node.meta for node in members):
                raise VerificationError(f"Site {members[0].meta[SITE]} or one tied to it has no format.")
            if self._ties() and len({node.meta[FORMAT] for node in members if FIXED not in node.meta}) > 1:
                raise VerificationError(f"Site {members[0].meta[SITE]} and those tied to it have different formats.")
            shapes = [matrix_shape(node) for node in members]
            spent += self._spent([Format.parse(node.meta[FORMAT]) for node in members], shapes)
            weights += sum(n * k for n, k in shapes)
        if self.mode != "uniform" and spent > self._budget(program, weights):
            raise VerificationError(f"The formats take {spent / self._budget(program, weights):.4f} of the budget.")
