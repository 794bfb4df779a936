"""Round to nearest: quantises each linear site on its own, without looking at the others."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from hikui.lowering.engine.workers import Workers
from hikui.lowering.formats import Format
from hikui.passes.measure.evidence import Evidence
from hikui.passes.quantise.output_rounding import OutputMetric, round_to_output
from hikui.passes.quantise.quantiser import Quantiser
from hikui.passes.quantise.rounder import KINDS_BY_BITS
from hikui.passes.quantise.rounding import Rounded, round_matrix


@dataclass(frozen=True)
class Rtn(Quantiser[OutputMetric | Tensor | None]):
    """Rounds the weights of linear sites to nearest.

    `bits` may also be 16 or 32, a float format, which takes no notice of the group.

    Attributes:
        clip: `mse` searches the scale with the least squared error; `minmax` covers the largest value; `output`
            searches the one with the least squared error of each group's own part of the output, which needs the Gram
            matrix.
        weighted: weigh each column's error by its mean square activation, as `calibrate` measured it.
    """

    name: ClassVar[str] = "rtn"
    kinds: ClassVar[Mapping[int, str]] = {**KINDS_BY_BITS, 16: "float16", 32: "float32"}
    clip: Literal["mse", "minmax", "output"] = "mse"
    weighted: bool = False

    def wants(self) -> frozenset[str]:
        """What scales are searched with."""
        return frozenset({"gram"} if self.clip == "output" else {"mean_square"} if self.weighted else ())

    def prepare(self, evidence: Evidence, workers: Workers, fmt: Format) -> OutputMetric | Tensor | None:
        """What errors are weighed with: the Gram matrix, or each column's mean square."""
        return OutputMetric(evidence.take_gram()) if self.clip == "output" else evidence.mean_square

    def quantise(self, weight: Tensor, fmt: Format, prepared: OutputMetric | Tensor | None) -> Rounded:
        """Rounds some rows; see `Rounder.quantise`."""
        if isinstance(prepared, OutputMetric):
            return round_to_output(weight, fmt, prepared)
        return round_matrix(weight, fmt, self.clip, prepared)
