"""Quantisation error propagation: asks whichever quantiser comes after it to correct weights before it rounds them."""

from dataclasses import dataclass
from typing import ClassVar

from hikui.lowering.errors import HikuiError, UsageError
from hikui.lowering.ir.program import CORRECTION, SITE, Program
from hikui.lowering.pipeline.contract import Pass, PassContext, PassResult
from hikui.passes.graph import float_sites, selected, sites
from hikui.passes.quantise.correction import Settings, note


@dataclass(frozen=True)
class Qep(Pass):
    """Marks sites to be corrected for the errors of the layers before them; several of them give groups their own α.

    A site that is already marked keeps its mark. The quantiser that rounds a marked site then follows the calibration
    text through the float and the quantised model and rounds W* = W + α·W·(X − X̂)·X̂ᵀ·(X̂·X̂ᵀ + λI)⁻¹ (arXiv 2504.09629).
    With `residual` a site whose product is added to a stream R makes up for that stream's error as well, by
    ρ·(R − R̂)·X̂ᵀ·(X̂·X̂ᵀ + λI)⁻¹.

    Attributes:
        alpha: how much of the correction is applied, 0 to 1; 0 leaves a site uncorrected.
        damping: λ over the mean of the diagonal of X̂·X̂ᵀ.
        residual: ρ, how much of the error of what a site is added to is made up for, 0 to 1.
        sites: regular expression of the sites to mark; empty is all.
        skip: regular expression of the sites to leave out.
    """

    name: ClassVar[str] = "qep"
    calibrates: ClassVar[bool] = True
    alpha: float = 0.5
    damping: float = 0.01
    residual: float = 0.0
    sites: str = ""
    skip: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"qep cannot apply {self.alpha:g} of the correction; alpha is between 0 and 1.")
        if not self.damping > 0:
            raise UsageError(f"qep cannot be damped by {self.damping:g}; damping is above 0.")
        if not 0 <= self.residual <= 1:
            raise UsageError(f"qep cannot make up for {self.residual:g} of the residual; it is between 0 and 1.")

    def requires(self, program: Program) -> None:
        """Raises HikuiError where no unpacked site matches."""
        if not sites(program):
            raise HikuiError("No linear site is named; run `canonicalise` first.")
        if not any(selected(float_sites(program), self.sites, self.skip)):
            raise HikuiError(
                f"No unpacked site matches '{self.sites}'; run `qep` before the quantiser, or widen `sites`."
            )

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Works on a clone; only metadata changes."""
        work = program.clone()
        marked = []
        for node in selected(float_sites(work), self.sites, self.skip):
            if CORRECTION not in node.meta:
                node.meta[CORRECTION] = note(Settings(self.alpha, self.damping, self.residual))
                marked.append(node.meta[SITE])
        if not marked:
            return PassResult(program, False)
        how = f"α {self.alpha:g}, damping {self.damping:g}"
        if self.residual:
            how += f", residual {self.residual:g}"
        return PassResult(work, True, [f"{len(marked)} sites with {how}"])
