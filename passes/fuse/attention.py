"""Cache updates and scaled_dot_product_attention → hikui::attention."""

import operator

from torch import fx

from hikui.lowering.program import Program
from hikui.passes.fuse.report import FusionReport
from hikui.passes.graph import hikui, insert, is_call
from hikui.passes.patterns.attention import (
    EAGER_SOFTMAX,
    SDPA,
    AttentionMatch,
    match_attention,
    why_eager,
)
from hikui.passes.patterns.match import NoMatch


def fuse_attention(program: Program) -> FusionReport:
    """Rewrites every attention, in place."""
    report = FusionReport("attention")
    for node in list(program.graph.nodes):
        if is_call(node, SDPA):
            match = match_attention(node)
            if isinstance(match, NoMatch):
                report.misses.append(match)
            else:
                _rewrite(program, match)
                report.fused += 1
        elif is_call(node, *EAGER_SOFTMAX) and (reason := why_eager(node)) is not None:
            report.misses.append(reason)
    return report


def _rewrite(program: Program, match: AttentionMatch) -> None:
    key_cache, k, _ = match.key_update.args
    value_cache, v, _ = match.value_update.args
    args = (match.q, k, v, key_cache, value_cache, match.past, match.scale)
    call = insert(program, match.output, hikui.attention.default, args, match.output)
    outputs: list[fx.Node] = [
        insert(program, match.output, operator.getitem, (call, index), match.output) for index in range(3)
    ]
    match.output.replace_all_uses_with(outputs[0])
    for update, cache in zip((match.key_update, match.value_update), outputs[1:], strict=True):
        program.output_node.replace_input_with(update, cache)
