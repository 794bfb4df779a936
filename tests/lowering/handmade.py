"""A program small enough to write by hand: embedding, one attention with a cache, a head."""

import torch
from torch import Tensor, fx, nn

import hikui.lowering.ir.dialect  # noqa: F401
from hikui.lowering.ir.cache_shape import CacheShape
from hikui.lowering.ir.program import BLOCK, WEIGHT, ModelConfig, Program
from hikui.lowering.ir.store import WeightStore

CONTEXT, VOCABULARY, WIDTH, HEADS, KV_HEADS = 16, 24, 16, 4, 2
HEAD_SIZE = WIDTH // HEADS


class _Model(nn.Module):
    def forward(
        self, embed: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, head: Tensor,
        tokens: Tensor, past: Tensor, key_cache: Tensor, value_cache: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        x = nn.functional.embedding(tokens, embed)

        def heads(weight: Tensor, count: int) -> Tensor:
            return nn.functional.linear(x, weight).view(1, -1, count, HEAD_SIZE).transpose(1, 2)

        keys = torch.ops.hikui.cache_update(key_cache, heads(wk, KV_HEADS), past)
        values = torch.ops.hikui.cache_update(value_cache, heads(wv, KV_HEADS), past)
        mask = torch.ops.hikui.causal_mask(past, tokens.shape[1], CONTEXT)
        repeat = HEADS // KV_HEADS
        out = nn.functional.scaled_dot_product_attention(
            heads(wq, HEADS), keys.repeat_interleave(repeat, 1), values.repeat_interleave(repeat, 1), attn_mask=mask
        )
        y = x + out.transpose(1, 2).reshape(1, -1, WIDTH)
        return nn.functional.linear(y, head), keys, values


def weights(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    return {
        "embed.weight": random(VOCABULARY, WIDTH),
        "q.weight": random(WIDTH, WIDTH),
        "k.weight": random(KV_HEADS * HEAD_SIZE, WIDTH),
        "v.weight": random(KV_HEADS * HEAD_SIZE, WIDTH),
        "head.weight": random(VOCABULARY, WIDTH),
    }


def program(seed: int = 0) -> Program:
    """The program, traced by torch.export."""
    tensors = weights(seed)
    cache = torch.zeros(1, KV_HEADS, CONTEXT, HEAD_SIZE)
    inputs = (torch.arange(5)[None], torch.tensor([3]), cache, cache.clone())
    length = torch.export.Dim("length", min=1, max=CONTEXT)
    exported = torch.export.export(
        _Model(), (*tensors.values(), *inputs), dynamic_shapes=(*[None] * len(tensors), {1: length}, None, None, None)
    )
    graph = exported.graph
    for node, key in zip(graph.find_nodes(op="placeholder"), tensors, strict=False):
        node.meta[WEIGHT] = key
    for node in graph.nodes:
        if node.op == "call_function" and "attention" in str(node.target):
            node.meta[BLOCK] = 0
    return Program(
        fx.GraphModule(nn.Module(), graph),
        WeightStore.in_memory(tensors),
        ModelConfig(CONTEXT, VOCABULARY, (CacheShape(KV_HEADS, HEAD_SIZE),), "handmade", None, ()),
    )
