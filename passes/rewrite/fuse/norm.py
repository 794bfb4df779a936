"""RMS norm → hikui::rms_norm."""

from hikui.lowering.ir.program import Program
from hikui.passes.graph import aten, hikui, insert, is_call, replace
from hikui.passes.patterns.match import NoMatch
from hikui.passes.patterns.norm import match_rms_norm
from hikui.passes.rewrite.fuse.report import FusionReport


def fuse_norms(program: Program) -> FusionReport:
    """Rewrites every RMS norm, in place."""
    report = FusionReport("norm")
    for node in list(program.graph.nodes):
        if not is_call(node, aten.rsqrt.default, aten.rms_norm.default):
            continue
        match = match_rms_norm(node)
        if isinstance(match, NoMatch):
            report.misses.append(match)
            continue
        args = (match.x, match.weight, match.eps)
        replace(
            match.output,
            insert(program, match.output, hikui.rms_norm.default, args, match.output),
        )
        report.fused += 1
    return report
