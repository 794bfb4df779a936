"""SmoothQuant: moves the spread of activations into the weights that read them, as far as both gain by it."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from hikui.lowering.engine.workers import Workers
from hikui.lowering.errors import UsageError
from hikui.lowering.ir.program import STATISTICS, Program
from hikui.passes.transform.folding import Fold, column_maxima
from hikui.passes.transform.scaling import Factor, Scaling


@dataclass(frozen=True)
class Smooth(Scaling):
    """Divides the columns of activations by s = max|x|^alpha / max|W|^(1−alpha), and multiplies the weights by it.

    The factor goes where the activation comes from: into a norm, or into another product (v for o, up for down, fc1
    for fc2 behind a ReLU). Where neither is possible the group is left alone, and a note says why. The float program
    computes what it did; the value caches hold values over their factors. Columns that come from one channel (query
    heads that share a KV head) share the factor of their largest magnitudes. (SmoothQuant, Xiao et al., 2023,
    section 4; there only the groups behind a norm are smoothed.)

    Attributes:
        alpha: from 0 (activations become as even as the weights' columns were uneven) to 1 (activations become even).
        sites: regular expression of the sites; empty is all. A tied group takes part as a whole or not at all.
        skip: regular expression of the sites to leave as they are.
    """

    name: ClassVar[str] = "smooth"
    needs: ClassVar[tuple[str, ...]] = ("max_abs",)
    alpha: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"smooth cannot take alpha={self.alpha:g}; it lies between 0 and 1.")

    def choose(self, program: Program, found: Fold, workers: Workers) -> Factor:
        """The formula; a channel that is always zero, or that no weight reads, is left as it is."""
        activation = found.largest(program.store.load(found.members[0].meta[STATISTICS]["max_abs"]).double())
        weight = found.largest(column_maxima(program, found.members, workers).double())
        live = (activation > 0) & (weight > 0)
        factor = torch.where(live, activation, 1.0) ** self.alpha / torch.where(live, weight, 1.0) ** (1 - self.alpha)
        factor = factor.float()
        before, after = (_spread(values[live]) for values in (activation, activation / factor.double()))
        return Factor(factor, f"the largest column is {after:.3g} times the middle one, {before:.3g} times before")


def _spread(values: torch.Tensor) -> float:
    return float(values.max() / values.median()) if values.numel() else 1.0
