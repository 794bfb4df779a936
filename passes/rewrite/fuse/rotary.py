"""x·cos + rotate_half(x)·sin → hikui::rotary."""

from hikui.lowering.ir.program import Program
from hikui.passes.graph import hikui, insert, replace
from hikui.passes.patterns.match import NoMatch
from hikui.passes.patterns.rotary import is_half_rotation, match_rotary
from hikui.passes.rewrite.fuse.report import FusionReport


def fuse_rotary(program: Program) -> FusionReport:
    """Rewrites every rotation, in place."""
    report = FusionReport("rotary")
    for node in list(program.graph.nodes):
        if not is_half_rotation(node):
            continue
        match = match_rotary(node)
        if isinstance(match, NoMatch):
            report.misses.append(match)
            continue
        args = (match.x, match.cos, match.sin)
        replace(
            match.output,
            insert(program, match.output, hikui.rotary.default, args, match.output),
        )
        report.fused += 1
    return report
