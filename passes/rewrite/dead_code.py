"""Removes what nothing reads: calls, weight placeholders, and the tensors behind them."""

from dataclasses import dataclass
from typing import ClassVar

from hikui.lowering.ir.program import FLOAT_WEIGHT, LATENT, STATISTICS, Program
from hikui.lowering.pipeline.contract import Pass, PassContext, PassResult
from hikui.passes.graph import erase_dead


@dataclass(frozen=True)
class DeadCode(Pass):
    """Removes calls and weights that nothing reads; measured statistics and replaced float weights go with them."""

    name: ClassVar[str] = "dead_code"

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Works on a clone."""
        work = program.clone()
        calls = erase_dead(work)
        weights = work.remove_unused_weights()
        if not calls and not weights:
            return PassResult(program, False)
        for node in work.graph.nodes:
            node.meta.pop(FLOAT_WEIGHT, None)
            node.meta.pop(LATENT, None)
            node.meta.pop(STATISTICS, None)
        work.recompile()
        return PassResult(work, True, [f"{calls} calls and {len(weights)} weights removed"])
