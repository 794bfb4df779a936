"""A model that uses every op and format of the dialect.

Two blocks with all their parts, the first fused, the second not, and two of attention alone over quantised caches.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import hikui.lowering.ir.dialect  # noqa: F401
from hikui.lowering.formats import Format, pack
from hikui.lowering.ir.cache_shape import CacheShape
from hikui.lowering.ir.program import WEIGHT, ModelConfig, Program
from hikui.lowering.ir.store import WeightStore
from hikui.passes.quantise.rounding import round_matrix

VOCABULARY, WIDTH, HEADS, KV_HEADS, SIZE, FFN, CONTEXT, RANK = 61, 48, 4, 2, 12, 72, 32, 5
EOS = 57
SHAPES = {
    "q": (HEADS * SIZE, WIDTH),
    "k": (KV_HEADS * SIZE, WIDTH),
    "v": (KV_HEADS * SIZE, WIDTH),
    "o": (WIDTH, HEADS * SIZE),
    "gate": (FFN, WIDTH),
    "up": (FFN, WIDTH),
    "down": (WIDTH, FFN),
}
_NAMES = (
    ("int4-g32", "int4-channel", "int8-g64", "int8-channel", "int4-g64", "int8-g32", "int4-g32"),
    ("sign-g32", "int2-channel", "int3-g64", "ternary-g32", "nf4-g64", "fp4-g32", "mixed-g32-c32"),
)
FORMATS = tuple(dict(zip(SHAPES, names, strict=True)) for names in _NAMES)
LOW = "int3-g32"
TABLES = (
    "sign-g32",
    "int2-g64",
    "ternary-channel",
    "int3-g32",
    "int4-g32",
    "nf4-g64",
    "fp4-channel",
    "int8-channel",
    "float32",
)
"""Of tables that tokens are looked up in; one of float16 is the head."""


def quantised(text: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    fmt = Format.parse(text)
    packed = pack(fmt, *round_matrix(weight, fmt))
    assert packed.scale is not None
    return packed.weight, packed.scale


def weights(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / torch.tensor(shape[-1]).sqrt()

    tensors = {"embedding": random(VOCABULARY, WIDTH) * 4, "frequencies": 10000 ** (-torch.arange(0, SIZE, 2) / SIZE)}
    for block in range(2):
        for site, shape in SHAPES.items():
            name = f"{block}.{site}"
            tensors[f"{name}.weight"], tensors[f"{name}.scale"] = quantised(FORMATS[block][site], random(*shape))
        tensors[f"{block}.q.bias"] = random(HEADS * SIZE)
        tensors[f"{block}.a"] = pack(Format("float16"), random(RANK, FFN)).weight
        tensors[f"{block}.b"] = pack(Format("float16"), random(WIDTH, RANK)).weight
        tensors[f"{block}.norm1"], tensors[f"{block}.norm2"] = 1 + random(WIDTH), 1 + random(WIDTH)
    tensors["norm"], tensors["plain"], tensors["plain.bias"] = 1 + random(WIDTH), random(WIDTH, WIDTH), random(WIDTH)
    tensors["order"] = torch.randperm(FFN, generator=generator).to(torch.int32)
    tensors["step"] = torch.tensor([0.02])
    tensors["low"], tensors["low.scale"] = quantised(LOW, random(WIDTH, WIDTH))
    for name in TABLES:
        if Format.parse(name).is_integer:
            tensors[name], tensors[f"{name}.scale"] = quantised(name, random(VOCABULARY, WIDTH))
        else:
            tensors[name] = pack(Format.parse(name), random(VOCABULARY, WIDTH)).weight
    tensors["middle"] = pack(Format("float32"), random(WIDTH, WIDTH)).weight
    tensors["head"] = pack(Format("float16"), random(VOCABULARY, WIDTH)).weight
    return tensors


class _Model(nn.Module):
    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        t = dict(zip(self.names, inputs, strict=False))
        tokens, past, *caches = inputs[len(self.names) :]
        angles = (past + torch.arange(tokens.shape[1]))[None, :, None].float() * t["frequencies"]
        cos, sin = torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()
        x, written = F.embedding(tokens, t["embedding"]), []
        looked_up = torch.ops.hikui.embedding
        for name in TABLES:
            x = x + looked_up(tokens, t[name], t.get(f"{name}.scale"), name, VOCABULARY, WIDTH)
        x = x + looked_up(tokens, t["head"], None, "float16", VOCABULARY, WIDTH)
        for block, make in enumerate((self.fused, self.unfused)):
            own = {name.removeprefix(f"{block}."): tensor for name, tensor in t.items()}
            x, *new = make(own, x, cos, sin, past, *caches[2 * block : 2 * block + 2])
            written += new
        for over, first in ((self.over_int8, 4), (self.over_int4, 8)):
            x, *new = over(x, past, *caches[first : first + 4])
            written += new
        ops = torch.ops.hikui
        x = ops.rms_norm(F.linear(x, t["plain"], t["plain.bias"]), t["norm"], 1e-5)
        x = ops.linear(x, t["middle"], None, t["plain.bias"], "float32", WIDTH)
        x = ops.linear(x, t["low"], t["low.scale"], t["plain.bias"], LOW, WIDTH)
        return (ops.linear(x, t["head"], None, None, "float16", VOCABULARY), *written)

    @staticmethod
    def site(
        block: int, t: dict[str, Tensor], name: str, q: tuple[Tensor, Tensor, Tensor], bias: Tensor | None = None
    ) -> Tensor:
        weight, scale = t[f"{name}.weight"], t[f"{name}.scale"]
        product: Tensor = torch.ops.hikui.linear_a8(*q, weight, scale, bias, FORMATS[block][name], SHAPES[name][0])
        return product

    def heads(
        self, block: int, t: dict[str, Tensor], q: tuple[Tensor, Tensor, Tensor], cos: Tensor, sin: Tensor
    ) -> list[Tensor]:
        query, key, value = (
            self.site(block, t, name, q, t["q.bias"] if name == "q" else None)
            .view(1, cos.shape[1], -1, SIZE)
            .transpose(1, 2)
            for name in ("q", "k", "v")
        )
        rotary = torch.ops.hikui.rotary
        return [rotary(query.contiguous(), cos, sin), rotary(key.contiguous(), cos, sin), value.contiguous()]

    @staticmethod
    def branch(block: int, t: dict[str, Tensor], q: tuple[Tensor, Tensor, Tensor], x: Tensor) -> Tensor:
        operands = (t["down.weight"], t["down.scale"], None, x, t["a"], t["b"])
        product: Tensor = torch.ops.hikui.linear_a8_branch(*q, *operands, FORMATS[block]["down"], WIDTH)
        return product

    def fused(
        self, t: dict[str, Tensor], x: Tensor, cos: Tensor, sin: Tensor, past: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ops = torch.ops.hikui
        q, k, v = self.heads(0, t, ops.rms_norm_quantize(x, t["norm1"], 1e-5)[1:], cos, sin)
        out, keys, values = ops.attention(q, k, v, keys, values, past, SIZE**-0.5)
        x = x + self.site(0, t, "o", ops.quantize_activation(out.transpose(1, 2).reshape(1, -1, HEADS * SIZE)))
        quantised = ops.rms_norm_quantize(x, t["norm2"], 1e-5)[1:]
        z, *q = ops.swiglu_quantize(self.site(0, t, "gate", quantised), self.site(0, t, "up", quantised))
        return x + self.branch(0, t, q, z), keys, values

    def unfused(
        self, t: dict[str, Tensor], x: Tensor, cos: Tensor, sin: Tensor, past: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ops = torch.ops.hikui
        q, k, v = self.heads(1, t, ops.quantize_activation(ops.rms_norm(x, t["norm1"], 1e-5)), cos, sin)
        keys, values = ops.cache_update(keys, k, past), ops.cache_update(values, v, past)
        mask = ops.causal_mask(past, cos.shape[1], CONTEXT)

        def shared(cache: Tensor) -> Tensor:
            repeat = HEADS // KV_HEADS
            return cache[:, :, None].expand(1, KV_HEADS, repeat, CONTEXT, SIZE).reshape(1, HEADS, CONTEXT, SIZE)

        out = F.scaled_dot_product_attention(q, shared(keys), shared(values), attn_mask=mask, scale=0.3)
        x = x + self.site(
            1, t, "o", ops.quantize_activation_static(out.transpose(1, 2).reshape(1, -1, HEADS * SIZE), t["step"])
        )
        quantised = ops.quantize_activation_int4(ops.rms_norm(x, t["norm2"], 1e-5))
        z = ops.swiglu(self.site(1, t, "gate", quantised), self.site(1, t, "up", quantised))
        z = torch.index_select(z, -1, t["order"])
        return x + self.branch(1, t, ops.quantize_activation(z), z), keys, values

    @staticmethod
    def over_int8(
        x: Tensor, past: Tensor, keys: Tensor, values: Tensor, key_scale: Tensor, value_scale: Tensor
    ) -> tuple[Tensor, ...]:
        q = x.view(1, -1, HEADS, SIZE).transpose(1, 2).contiguous()
        k, v = q[:, :KV_HEADS].contiguous(), q[:, KV_HEADS:].contiguous()
        out, *caches = torch.ops.hikui.attention_quantized(
            q, k, v, keys, values, key_scale, value_scale, past, SIZE**-0.5
        )
        return (x + out.transpose(1, 2).reshape(1, -1, WIDTH), *caches)

    @staticmethod
    def over_int4(
        x: Tensor, past: Tensor, keys: Tensor, values: Tensor, key_scale: Tensor, value_scale: Tensor
    ) -> tuple[Tensor, ...]:
        update = torch.ops.hikui.cache_update_quantized
        q = x.view(1, -1, HEADS, SIZE).transpose(1, 2)
        k, keys, key_scale = update(keys, key_scale, q[:, KV_HEADS:].contiguous(), past)
        v, values, value_scale = update(values, value_scale, q[:, :KV_HEADS].contiguous(), past)
        share, mask = HEADS // KV_HEADS, torch.ops.hikui.causal_mask(past, x.shape[1], CONTEXT)
        k, v = (
            held[:, :, None].expand(1, KV_HEADS, share, CONTEXT, SIZE).reshape(1, HEADS, CONTEXT, SIZE)
            for held in (k, v)
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return x + out.transpose(1, 2).reshape(1, -1, WIDTH), keys, values, key_scale, value_scale


def program(seed: int = 0) -> Program:
    """The program, traced by torch.export."""
    tensors = weights(seed)
    shapes = tuple(CacheShape(KV_HEADS, SIZE, fmt) for fmt in ("float32", "float32", "int8", "int4"))
    config = ModelConfig(CONTEXT, VOCABULARY, shapes, "every op", None, (EOS,))
    return _traced(_Model([*tensors]), tensors, config)


class _Table(nn.Module):
    def forward(self, *inputs: Tensor) -> tuple[Tensor]:
        table, head, tokens, past = inputs
        x = F.embedding(tokens, table) + past.float()
        return (torch.ops.hikui.linear(x, head, None, None, "float32", head.shape[0] * head.shape[2]),)


def table(rows: int, width: int) -> Program:
    """Two big matrices and no cache: an embedding and a head."""
    generator = torch.Generator().manual_seed(0)
    table, head = (torch.randn(rows, width, generator=generator) / width**0.25 for _ in range(2))
    tensors = {"embedding": table, "head": pack(Format("float32"), head).weight}
    return _traced(_Table(), tensors, ModelConfig(rows, rows, (), "table", None, ()))


def _traced(model: nn.Module, tensors: dict[str, Tensor], config: ModelConfig) -> Program:
    caches = [torch.zeros(tensor.shape, dtype=getattr(torch, tensor.dtype)) for tensor in config.cache_tensors()]
    inputs = (*tensors.values(), torch.zeros(1, 7, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), *caches)
    length = torch.export.Dim("length", min=2, max=config.context_length)
    dynamic = (*[None] * len(tensors), {1: length}, None, *[None] * len(caches))
    graph = torch.export.export(model, inputs, dynamic_shapes={"inputs": dynamic}).graph
    for node, key in zip(graph.find_nodes(op="placeholder"), tensors, strict=False):
        node.meta[WEIGHT] = key
    return Program(fx.GraphModule(nn.Module(), graph), WeightStore.in_memory(tensors), config)
