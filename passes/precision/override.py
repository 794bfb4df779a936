"""Fixes the format of named sites, before and above any assignment."""

from dataclasses import dataclass
from typing import ClassVar

from hikui.lowering.errors import HikuiError
from hikui.lowering.formats import Format
from hikui.lowering.ir.program import FIXED, FORMAT, SITE, Program
from hikui.lowering.pipeline.contract import Pass, PassContext, PassResult
from hikui.passes.graph import float_sites, pattern, selected, sites


@dataclass(frozen=True)
class Override(Pass):
    """Gives the sites that a regular expression finds one format; of several overrides the first one counts.

    Attributes:
        sites: regular expression, searched in site names; empty is all.
        format: as `int8-g64`.
        required: whether it is an error that no site matches.
    """

    name: ClassVar[str] = "override"
    sites: str = ""
    format: str = "int8-g64"
    required: bool = True

    def __post_init__(self) -> None:
        pattern(self.sites, "sites")
        Format.parse(self.format)

    def requires(self, program: Program) -> None:
        """Raises HikuiError where nothing matches."""
        if not sites(program):
            raise HikuiError("No linear site is named; run `canonicalise` first.")
        if self.required and not any(selected(sites(program), self.sites, "")):
            known = ", ".join(node.meta[SITE] for node in sites(program)[-3:])
            raise HikuiError(f"No site matches '{self.sites}'; sites are called for example {known}.")

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Works on a clone."""
        work = program.clone()
        changed = []
        for node in selected(float_sites(work), self.sites, ""):
            if FIXED not in node.meta:
                node.meta[FIXED] = node.meta[FORMAT] = str(Format.parse(self.format))
                changed.append(node.meta[SITE])
        if not changed:
            return PassResult(program, False)
        return PassResult(work, True, [f"{name}: {self.format}" for name in changed])
