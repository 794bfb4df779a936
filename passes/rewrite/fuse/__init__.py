"""Folds neighbouring calls into the ops that backends have kernels for: one file a fusion."""

from dataclasses import dataclass
from typing import ClassVar

from hikui.lowering.ir.program import Program
from hikui.lowering.pipeline.contract import Pass, PassContext, PassResult
from hikui.passes.graph import erase_dead
from hikui.passes.rewrite.fuse.attention import fuse_attention
from hikui.passes.rewrite.fuse.branch import fuse_biases, fuse_branches
from hikui.passes.rewrite.fuse.norm import fuse_norms
from hikui.passes.rewrite.fuse.quantise import fuse_quantise
from hikui.passes.rewrite.fuse.report import FusionReport
from hikui.passes.rewrite.fuse.rotary import fuse_rotary
from hikui.passes.rewrite.fuse.swiglu import fuse_swiglu


@dataclass(frozen=True)
class Fuse(Pass):
    """Fuses norms, rotations, attention, gated units, activation quantisers, biases and low-rank branches.

    Attributes:
        norm: root-mean-square norms into `rms_norm`.
        attention: cache updates and attention into `attention`.
        rotary: rotary position embeddings into `rotary`.
        swiglu: gated units into `swiglu`.
        branch: low-rank branches and biases into the quantised product.
        quantise: the quantisers of activations into the norm or gated unit before them.
    """

    name: ClassVar[str] = "fuse"
    norm: bool = True
    attention: bool = True
    rotary: bool = True
    swiglu: bool = True
    branch: bool = True
    quantise: bool = True

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Works on a clone; the notes say what was fused, and why other candidates were not."""
        work = program.clone()
        steps = (
            (self.norm, fuse_norms),
            (self.rotary, fuse_rotary),
            (self.attention, fuse_attention),
            (self.swiglu, fuse_swiglu),
            (self.branch, fuse_branches),
            (self.branch, fuse_biases),
            (self.quantise, fuse_quantise),
        )
        reports: list[FusionReport] = [step(work) for wanted, step in steps if wanted]
        notes = [note for report in reports for note in report.notes()]
        if not any(report.fused for report in reports):
            return PassResult(program, False, notes)
        erase_dead(work)
        work.recompile()
        return PassResult(work, True, notes)
