"""Cache updates and scaled_dot_product_attention → hikui::attention or hikui::attention_quantized."""

import operator

from torch import fx

from hikui.lowering.ir.program import Program
from hikui.passes.graph import aten, hikui, insert, is_call, shape
from hikui.passes.patterns.attention import (
    EAGER_SOFTMAX,
    SDPA,
    AttentionMatch,
    CacheMatch,
    match_attention,
    why_eager,
)
from hikui.passes.patterns.match import NoMatch
from hikui.passes.rewrite.fuse.report import FusionReport


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
    keys, values, before = match.keys, match.values, match.output
    share = int(shape(match.q)[1]) // int(shape(keys.values)[1])
    q = match.q
    if keys.step is not None:
        # The scores are q · (step · key + centre): the step may go to q, and the centre adds the same to every score of
        # a row, which softmax does not see.
        q = insert(program, before, aten.mul.Tensor, (q, _shared(program, keys.step, share)), before)
    if keys.quantised:
        key_cache, key_scale, k, _ = keys.update.args
        value_cache, value_scale, v, _ = values.update.args
        args: tuple[fx.node.Argument, ...] = (
            q, k, v, key_cache, value_cache, key_scale, value_scale, match.past, match.scale
        )  # fmt: skip
        call = insert(program, before, hikui.attention_quantized.default, args, before)
    else:
        key_cache, k, _ = keys.update.args
        value_cache, v, _ = values.update.args
        args = (q, k, v, key_cache, value_cache, match.past, match.scale)
        call = insert(program, before, hikui.attention.default, args, before)
    out, *caches = (
        insert(program, before, operator.getitem, (call, at), before) for at in range(5 if keys.quantised else 3)
    )
    # The weights of a row add up to one, so a centre of the values is a centre of the result.
    for target, columns in ((aten.mul.Tensor, values.step), (aten.add.Tensor, values.centre)):
        if columns is not None:
            out = insert(program, before, target, (out, _shared(program, columns, share)), before)
    match.output.replace_all_uses_with(out)
    for old, new in zip(_written(keys, values), caches, strict=True):
        if old is not None:
            program.output_node.replace_input_with(old, new)


def _written(keys: CacheMatch, values: CacheMatch) -> list[fx.Node | None]:
    """What the updates give back to be kept, in the order of the fused op's results; None where nobody asks for it."""
    if not keys.quantised:
        return [keys.update, values.update]
    items = [{user.args[1]: user for user in cache.update.users} for cache in (keys, values)]
    return [found.get(at) for at in (1, 2) for found in items]


def _shared(program: Program, columns: fx.Node, share: int) -> fx.Node:
    """A number for each column of every query head, from one for those of every key-value head."""
    if share == 1:
        return columns
    key = program.weight_of(columns)
    tensor = program.store.load(key).repeat_interleave(share, 1)
    return program.add_weight(f"{key}.queries", tensor)
