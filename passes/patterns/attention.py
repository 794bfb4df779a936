"""Causal attention over a cache, float or quantised, as `scaled_dot_product_attention` states it."""

import math
import operator
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import fx

from hikui.passes.graph import argument, aten, hikui, is_call, is_weight, same_size, shape
from hikui.passes.patterns.match import NoMatch

SDPA = aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class CacheMatch:
    """A cache that is written and read.

    Attributes:
        update: `cache_update` or `cache_update_quantized`.
        values: the whole cache after it, float32 [1, KV, C, D].
        step, centre: what the values read are multiplied by and then shifted by, [1, KV, 1, D] each, or None.
    """

    update: fx.Node
    values: fx.Node
    step: fx.Node | None = None
    centre: fx.Node | None = None

    @property
    def quantised(self) -> bool:
        return is_call(self.update, hikui.cache_update_quantized.default)

    @property
    def past(self) -> fx.node.Argument:
        return self.update.args[3 if self.quantised else 2]


@dataclass(frozen=True)
class AttentionMatch:
    """Attention of q [1, H, T, D] over the caches after k and v [1, KV, T, D] are written into them."""

    q: fx.Node
    keys: CacheMatch
    values: CacheMatch
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
    caches = [_cache_behind(operand, q) for operand in (keys, values)]
    for found in caches:
        if isinstance(found, NoMatch):
            return found
    of_keys, of_values = caches
    assert isinstance(of_keys, CacheMatch) and isinstance(of_values, CacheMatch)
    past = mask.args[0]
    if of_keys.past is not past or of_values.past is not past:
        return NoMatch("the mask and the caches count from different positions", node.name)
    assert isinstance(past, fx.Node)
    if mask.args[2] != shape(of_keys.values)[2] or shape(of_keys.values) != shape(of_values.values):
        return NoMatch("the caches and the mask differ in shape", node.name)
    if stored_type(of_keys) != stored_type(of_values):
        return NoMatch("keys and values are stored in different forms", node.name)
    if not _masks_this_many(mask, q):
        return NoMatch("the mask has other rows than the queries", node.name)
    scale = argument(node, 6, "scale")
    if scale is None:
        scale = 1.0 / math.sqrt(int(shape(q)[-1]))
    if not isinstance(scale, int | float):
        return NoMatch("its scale is not a number", node.name)
    return AttentionMatch(q, of_keys, of_values, past, float(scale), node)


def stored_type(cache: CacheMatch) -> torch.dtype:
    """What the tensor of a cache holds."""
    stored = cache.update.args[0]
    assert isinstance(stored, fx.Node)
    dtype: torch.dtype = stored.meta["val"].dtype
    return dtype


def _masks_this_many(mask: fx.Node, q: fx.Node) -> bool:
    return same_size(shape(mask)[2], shape(q)[2])


def _cache_behind(operand: object, q: fx.Node) -> CacheMatch | NoMatch:
    """The cache behind an operand of attention, through the repetition of its heads and the scaling of its columns."""
    node = _one_of_each_head(operand)
    if isinstance(node, NoMatch):
        return node
    chain: list[fx.Node] = []
    step = centre = None
    if is_call(node, aten.add.Tensor) and is_columns(node.args[1], node) and not node.kwargs:
        centre = node.args[1]
        chain.append(node)
        node = node.args[0]
    if is_call(node, aten.mul.Tensor) and is_columns(node.args[1], node):
        step = node.args[1]
        chain.append(node)
        node = node.args[0]
    update = _update_of(node, q, scaled=bool(chain))
    if isinstance(update, NoMatch):
        return update
    assert isinstance(node, fx.Node), "it is an update's value"
    if (shared := _shared(update, [node, *chain])) is not None:
        return shared
    if int(shape(q)[1]) % int(shape(node)[1]):
        return NoMatch(f"{shape(q)[1]} query heads do not share {shape(node)[1]} cached ones evenly", node.name)
    return CacheMatch(update, node, step, centre)


def _one_of_each_head(node: object) -> object:
    """What an operand repeats the heads of, or the operand itself; `NoMatch` where it repeats otherwise."""
    if is_call(node, aten.reshape.default):
        expanded = node.args[0]
        if not is_call(expanded, aten.expand.default) or not is_call(expanded.args[0], aten.unsqueeze.default):
            return NoMatch(f"{node.name} is no repetition of the cache's heads", node.name)
        single = expanded.args[0]
        source = single.args[0]
        assert isinstance(source, fx.Node)
        if single.args[1] != 2 or source.meta["val"].dim() != 4 or not _repeats_heads(source, expanded, node):
            return NoMatch(f"{node.name} does not repeat each head of the cache side by side", node.name)
        return source
    if is_call(node, aten.repeat_interleave.self_int):
        if argument(node, 2, "dim") != 1:
            return NoMatch(f"{node.name} does not repeat the heads of the cache", node.name)
        return node.args[0]
    return node


def _update_of(node: object, q: fx.Node, *, scaled: bool) -> fx.Node | NoMatch:
    """The cache update whose value is read; only a quantised one's may be scaled."""
    if is_call(node, operator.getitem) and is_call(node.args[0], hikui.cache_update_quantized.default):
        update = node.args[0]
        if node.args[1] != 0:
            return NoMatch(f"{node.name} is not what {update.name} lets be read", node.name)
        return update
    if is_call(node, hikui.cache_update.default) and not scaled:
        return node
    return NoMatch(f"its keys or values are {_describe(node)}, not an updated cache", q.name)


def _shared(update: fx.Node, links: list[fx.Node]) -> NoMatch | None:
    """Why the values on the way from a cache to one attention are not this attention's alone, or None."""
    cache = update.args[0]
    if not isinstance(cache, fx.Node) or cache.op != "placeholder":
        return NoMatch(f"{update.name} updates {_describe(cache)}, not a cache of the program", update.name)
    for link in links:
        readers = [user for user in link.users if user.op != "output"]
        if len(readers) != 1:
            return NoMatch(f"{link.name} is read by {len(readers)} calls, not by one attention alone", link.name)
    return None


def is_columns(node: object, values: fx.Node) -> TypeGuard[fx.Node]:
    """Whether a node is a stored number for each column of each head of a cache: [1, KV, 1, D]."""
    if not is_weight(node):
        return False
    _, heads, _, size = shape(values)
    return shape(node) == (1, heads, 1, size)


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
