"""A norm or a gated unit, then quantize_activation → one op that gives both."""

import operator

from torch import fx

from hikui.lowering.ir.program import Program
from hikui.passes.graph import hikui, insert, is_call
from hikui.passes.patterns.match import NoMatch
from hikui.passes.rewrite.fuse.report import FusionReport

FUSED = {
    hikui.rms_norm.default: hikui.rms_norm_quantize.default,
    hikui.swiglu.default: hikui.swiglu_quantize.default,
}


def fuse_quantise(program: Program) -> FusionReport:
    """Rewrites every `rms_norm` or `swiglu` whose result is quantised, in place."""
    report = FusionReport("norm or swiglu with its quantiser")
    for node in list(program.graph.nodes):
        if not is_call(node, hikui.quantize_activation.default):
            continue
        source = node.args[0]
        if not is_call(source, *FUSED):
            made_by = source.target if isinstance(source, fx.Node) else source
            report.misses.append(
                NoMatch(
                    f"the activation comes from {made_by}, which has no quantising form",
                    node.name,
                )
            )
            continue
        _rewrite(program, source, node)
        report.fused += 1
    return report


def _rewrite(program: Program, source: fx.Node, quantiser: fx.Node) -> None:
    call = insert(program, source, FUSED[source.target], source.args, source)  # type: ignore[index]
    outputs = [insert(program, source, operator.getitem, (call, index), source) for index in range(4)]
    for user in list(quantiser.users):
        index = user.args[1]
        assert isinstance(index, int)
        user.replace_all_uses_with(outputs[1 + index])
        program.graph.erase_node(user)
    program.graph.erase_node(quantiser)
    source.replace_all_uses_with(outputs[0])
    program.graph.erase_node(source)
