"""silu(gate) · up → hikui::swiglu."""

from hikui.lowering.ir.program import Program
from hikui.passes.graph import aten, hikui, insert, is_call, replace
from hikui.passes.patterns.match import NoMatch
from hikui.passes.patterns.swiglu import match_swiglu
from hikui.passes.rewrite.fuse.report import FusionReport


def fuse_swiglu(program: Program) -> FusionReport:
    """Rewrites every gated unit, in place."""
    report = FusionReport("swiglu")
    for node in list(program.graph.nodes):
        if not is_call(node, aten.silu.default):
            continue
        match = match_swiglu(node)
        if isinstance(match, NoMatch):
            report.misses.append(match)
            continue
        args = (match.gate, match.up)
        replace(
            match.output,
            insert(program, match.output, hikui.swiglu.default, args, match.output),
        )
        report.fused += 1
    return report
