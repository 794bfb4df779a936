"""Causal attention over a cache, as `scaled_dot_product_attention` states it."""

import math
from dataclasses import dataclass

from torch import fx

from hikui.passes.graph import argument, aten, hikui, is_call, same_size, shape
from hikui.passes.patterns.match import NoMatch

SDPA = aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class AttentionMatch:
    """Attention of q [1, H, T, D] over the caches after k and v [1, KV, T, D] are written into them.

    Attributes:
        key_update, value_update: the `cache_update` nodes that the fused op takes over.
    """

    q: fx.Node
    key_update: fx.Node
    value_update: fx.Node
    past: fx.Node
    scale: float
    output: fx.Node


def match_attention(node: fx.Node) -> AttentionMatch | NoMatch:
    """Recognises `scaled_dot_product_attention` over two `cache_update`s with the causal mask, GQA or not."""
    if not is_call(node, SDPA):
        return NoMatch(f"{node.target} is no scaled_dot_product_attention", node.name)
    q, keys, values = node.args[:3]
    assert isinstance(q, fx.Node)
    if argument(node, 4, "dropout_p", 0.0) != 0.0 or argument(node, 5, "is_causal", False) is not False:
        return NoMatch("it drops out, or masks by itself without looking at the cache", node.name)
    mask = argument(node, 3, "attn_mask")
    if not is_call(mask, hikui.causal_mask.default):
        return NoMatch(f"its mask is {_describe(mask)}, not hikui::causal_mask alone", node.name)
    updates = [_cache_behind(operand, q) for operand in (keys, values)]
    for found in updates:
        if isinstance(found, NoMatch):
            return found
    key_update, value_update = updates
    assert isinstance(key_update, fx.Node) and isinstance(value_update, fx.Node)
    past = mask.args[0]
    if key_update.args[2] is not past or value_update.args[2] is not past:
        return NoMatch("the mask and the caches count from different positions", node.name)
    assert isinstance(past, fx.Node)
    if mask.args[2] != shape(key_update)[2] or shape(key_update) != shape(value_update):
        return NoMatch("the caches and the mask differ in shape", node.name)
    if not _masks_this_many(mask, q):
        return NoMatch("the mask has other rows than the queries", node.name)
    scale = argument(node, 6, "scale")
    if scale is None:
        scale = 1.0 / math.sqrt(int(shape(q)[-1]))
    if not isinstance(scale, int | float):
        return NoMatch("its scale is not a number", node.name)
    return AttentionMatch(q, key_update, value_update, past, float(scale), node)


def _masks_this_many(mask: fx.Node, q: fx.Node) -> bool:
    return same_size(shape(mask)[2], shape(q)[2])


def _cache_behind(operand: object, q: fx.Node) -> fx.Node | NoMatch:
    """The `cache_update` behind an operand of attention, through the repetition of its heads."""
    node = operand
    if is_call(node, aten.reshape.default):
        expanded = node.args[0]
        if not is_call(expanded, aten.expand.default) or not is_call(expanded.args[0], aten.unsqueeze.default):
            return NoMatch(f"{node.name} is no repetition of the cache's heads", node.name)
        single = expanded.args[0]
        source = single.args[0]
        assert isinstance(source, fx.Node)
        if single.args[1] != 2 or source.meta["val"].dim() != 4 or not _repeats_heads(source, expanded, node):
            return NoMatch(
                f"{node.name} does not repeat each head of the cache side by side",
                node.name,
            )
        node = source
    elif is_call(node, aten.repeat_interleave.self_int):
        if argument(node, 2, "dim") != 1:
            return NoMatch(f"{node.name} does not repeat the heads of the cache", node.name)
        node = node.args[0]
    if not is_call(node, hikui.cache_update.default):
        return NoMatch(f"its keys or values are {_describe(node)}, not an updated cache", q.name)
    cache = node.args[0]
    if not isinstance(cache, fx.Node) or cache.op != "placeholder":
        return NoMatch(
            f"{node.name} updates {_describe(cache)}, not a cache of the program",
            node.name,
        )
    readers = [user for user in node.users if user.op != "output"]
    if len(readers) != 1:
        return NoMatch(
            f"{node.name} is read by {len(readers)} calls, not by one attention alone",
            node.name,
        )
    if int(shape(q)[1]) % int(shape(node)[1]):
        return NoMatch(
            f"{shape(q)[1]} query heads do not share {shape(node)[1]} cached ones evenly",
            node.name,
        )
    return node


def _repeats_heads(source: fx.Node, expanded: fx.Node, merged: fx.Node) -> bool:
    batch, heads, context, size = shape(source)
    wide, flat = shape(expanded), shape(merged)
    if len(wide) != 5 or len(flat) != 4:
        return False
    return (wide[0], wide[1], *wide[3:]) == (batch, heads, context, size) and flat == (
        batch,
        int(heads) * int(wide[2]),
        context,
        size,
    )


def _describe(node: object) -> str:
    if not isinstance(node, fx.Node):
        return str(node)
    return f"{node.name} ({node.target})" if node.op == "call_function" else node.name


EAGER_SOFTMAX = (aten.softmax.int, aten._softmax.default)


def why_eager(node: fx.Node) -> NoMatch | None:
    """Why attention that is written out around a softmax is not fused; None where the softmax is no attention's."""
    if not is_call(node, *EAGER_SOFTMAX):
        return None
    seen, todo = {node}, [node]
    scores: fx.Node | None = None
    biases: list[str] = []
    while todo:
        current = todo.pop()
        for operand in current.all_input_nodes:
            if operand in seen:
                continue
            seen.add(operand)
            if is_call(operand, aten.bmm.default, aten.baddbmm.default, aten.matmul.default):
                scores = operand
                continue
            if is_call(operand, hikui.causal_mask.default) or operand.op != "call_function":
                continue
            todo.append(operand)
    if scores is None:
        return None
    if is_call(scores, aten.baddbmm.default):
        bias = scores.args[0]
        assert isinstance(bias, fx.Node)
        biases.append(bias.name)
    added = f", with {biases[0]} added to the scores (ALiBi), which hikui::attention does not take" if biases else ""
    return NoMatch(
        f"attention is written out as {scores.name}, softmax and a product{added}",
        node.name,
    )
