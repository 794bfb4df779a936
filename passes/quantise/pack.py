"""Packs what is still float: backends have kernels for packed matrices only."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch

from hikui.lowering.errors import HikuiError, VerificationError
from hikui.lowering.formats import Format
from hikui.lowering.formats import pack as pack_matrix
from hikui.lowering.ir.program import FORMAT, SITE, Program
from hikui.lowering.pipeline.contract import Pass, PassContext, PassResult
from hikui.passes.graph import weight_of
from hikui.passes.quantise.packing import float_linears, pack_by_rows, replace_with_packed


@dataclass(frozen=True)
class Pack(Pass):
    """Packs every remaining float linear, sites and branch factors alike, without rounding beyond its format.

    Attributes:
        format: `float32`, or `float16`.
    """

    name: ClassVar[str] = "pack"
    format: Literal["float32", "float16"] = "float32"

    def requires(self, program: Program) -> None:
        """Raises HikuiError where a site still waits for its factors."""
        for node in float_linears(program):
            if Format.parse(node.meta.get(FORMAT, "float32")).is_factors:
                raise HikuiError(
                    f"Site {node.meta[SITE]} is to become {node.meta[FORMAT]}, and nothing has factorised it; run "
                    "`factorise` first."
                )

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Packs one matrix after the other.

        Raises:
            HikuiError: a matrix holds NaN or infinite values, or values beyond the format.
        """
        work = program.clone()
        chosen = float_linears(work)
        if not chosen:
            return PassResult(program, False)
        fmt = Format.parse(self.format)
        for index, node in enumerate(chosen):
            context.progress("pack", index, len(chosen))
            site = str(node.meta.get(SITE, work.weight_of(weight_of(node))))
            packed = pack_by_rows(work, weight_of(node), site, fmt, partial(pack_matrix, fmt))
            if not bool(torch.isfinite(packed.weight).all()):
                raise HikuiError(f"Site {site}: its weights are beyond {fmt}; pack them as float32.")
            replace_with_packed(work, node, fmt, packed)
        context.progress("pack", len(chosen), len(chosen))
        work.recompile()
        return PassResult(work, True, [f"{len(chosen)} matrices packed as {fmt}"])

    def ensures(self, program: Program) -> None:
        """No float linear with a stored matrix is left."""
        left = float_linears(program)
        if left:
            raise VerificationError(f"Node {left[0].name} still multiplies an unpacked matrix.")
