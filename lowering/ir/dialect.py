"""The operators that hikui adds to the graph: `torch.ops.hikui.*`.

Each has a schema, a meta kernel (shapes, also symbolic ones) and a reference kernel in torch that says what a backend
must compute. Importing this module registers them. docs/architecture.md lists shapes and dtypes.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from hikui.lowering import formats
from hikui.lowering.formats import ROWS, SUM_WIDTH, Format
from hikui.lowering.ir.attention import attend

NAMESPACE = "hikui"
_library = torch.library.Library(NAMESPACE, "DEF")

_BLOCKS = 512
"""Blocks of rows unpacked at a time: unpacked, the head of a large vocabulary takes gigabytes."""

_LOOKUPS = 2048
"""Rows of an embedding unpacked at a time."""

_PACKED_A8 = "Tensor q, Tensor q_scale, Tensor q_sums, Tensor weight, Tensor scale, Tensor? bias"


def _define(schema: str, reference: Callable[..., object], meta: Callable[..., object]) -> None:
    name = schema.split("(", 1)[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", meta, lib=_library)


@lru_cache(maxsize=256)
def _format(text: str) -> Format:
    return Format.parse(text)


# ── mask and cache ──────────────────────────────────────────────────────────────────────────────────────────────────


def _causal_mask(past: Tensor, tokens: int, context: int) -> Tensor:
    rows = past + torch.arange(tokens, device=past.device)
    hidden = torch.arange(context, device=past.device) > rows[:, None]
    return torch.zeros(1, 1, tokens, context).masked_fill(hidden, float("-inf"))


def _causal_mask_meta(past: Tensor, tokens: int, context: int) -> Tensor:
    return past.new_empty((1, 1, tokens, context), dtype=torch.float32)


def _cache_update(cache: Tensor, new: Tensor, past: Tensor) -> Tensor:
    at = past + torch.arange(new.shape[2], device=past.device)
    return cache.index_copy(2, at, new).contiguous()


def _cache_update_meta(cache: Tensor, new: Tensor, past: Tensor) -> Tensor:
    return torch.empty_like(cache, memory_format=torch.contiguous_format)


def _cache_update_quantized(codes: Tensor, scale: Tensor, new: Tensor, past: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    at = past + torch.arange(new.shape[2], device=past.device)
    new_codes, new_scale = formats.quantize_cache(new, formats.cache_format(codes.dtype))
    codes, scale = codes.index_copy(2, at, new_codes), scale.index_copy(2, at, new_scale)
    held = torch.arange(codes.shape[2], device=past.device) < past + new.shape[2]
    # What lies behind the last token may be of another text; nobody is to see it, nor a scale that is no number.
    values = torch.where(held[:, None], formats.dequantize_cache(codes, scale), 0.0)
    return values, codes.contiguous(), scale.contiguous()


def _cache_update_quantized_meta(
    codes: Tensor, scale: Tensor, new: Tensor, past: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    values = new.new_empty((1, codes.shape[1], codes.shape[2], new.shape[3]))
    return values, _like_meta(codes), _like_meta(scale)


# ── linear ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _linear(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, format: str, n: int) -> Tensor:
    dense = formats.unpack(_format(format), weight, scale, n, x.shape[-1])
    return F.linear(x, dense, bias)


def _linear_meta(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, format: str, n: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], n), dtype=torch.float32)


def _activation_meta(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    lead, kq = x.shape[:-1], formats.activation_k(int(x.shape[-1]))
    return (
        x.new_empty((*lead, kq), dtype=torch.int8),
        x.new_empty(tuple(lead), dtype=torch.float32),
        x.new_empty((*lead, kq // SUM_WIDTH), dtype=torch.int32),
    )


def _quantize_activation(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return formats.quantize_activation(x)


def _quantize_activation_int4(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return formats.quantize_activation(x, bits=4)


def _activation_static_meta(x: Tensor, step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _activation_meta(x)


def _linear_a8(
    q: Tensor, q_scale: Tensor, q_sums: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, format: str, n: int
) -> Tensor:
    fmt, groups = _format(format), scale.shape[1]
    kp = fmt.stored_columns(weight.shape[1], groups)
    # Torch has no quick integer product; the narrowest float that holds every partial sum exactly gives the same sums.
    largest = kp // groups * 127 * max(map(abs, fmt.levels))
    exact = torch.float32 if largest <= 2**24 else torch.float64
    grouped = q[..., :kp].reshape(-1, groups, kp // groups).to(exact).transpose(0, 1)
    parts = []
    for start in range(0, weight.shape[0], _BLOCKS):
        blocks = slice(start, start + _BLOCKS)
        rows = weight[blocks].shape[0] * ROWS
        codes = formats.unpack_codes(fmt, weight[blocks], rows, kp).view(rows, groups, kp // groups)
        scales = scale[blocks].transpose(1, 2).reshape(rows, groups)
        dots = torch.bmm(grouped, codes.permute(1, 2, 0).to(exact))
        parts.append((dots.double() * scales.t().double()[:, None]).sum(0))
    y = torch.cat(parts, 1)[:, :n] * q_scale.reshape(-1, 1).double()
    y = y.float() if bias is None else (y + bias.double()).float()
    return y.reshape(*q.shape[:-1], n).contiguous()


def _linear_a8_meta(
    q: Tensor, q_scale: Tensor, q_sums: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, format: str, n: int
) -> Tensor:
    return q.new_empty((*q.shape[:-1], n), dtype=torch.float32)


def _linear_a8_branch(
    q: Tensor, q_scale: Tensor, q_sums: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None,
    x: Tensor, a: Tensor, b: Tensor, format: str, n: int,
) -> Tensor:  # fmt: skip
    y = _linear_a8(q, q_scale, q_sums, weight, scale, bias, format, n)
    rank, fmt = b.shape[1], _format("float16")
    t = F.linear(x, formats.unpack(fmt, a, None, rank, x.shape[-1]))
    return y + F.linear(t, formats.unpack(fmt, b, None, n, rank))


def _linear_a8_branch_meta(
    q: Tensor, q_scale: Tensor, q_sums: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None,
    x: Tensor, a: Tensor, b: Tensor, format: str, n: int,
) -> Tensor:  # fmt: skip
    return q.new_empty((*q.shape[:-1], n), dtype=torch.float32)


# ── embedding ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _embedding(ids: Tensor, weight: Tensor, scale: Tensor | None, format: str, rows: int, columns: int) -> Tensor:
    wanted, fmt = ids.reshape(-1), _format(format)
    if wanted.numel() and (int(wanted.min()) < 0 or int(wanted.max()) >= rows):
        raise IndexError(f"an id of {int(wanted.min())} … {int(wanted.max())} is none of the embedding's {rows} rows")
    out = torch.empty(wanted.numel(), columns)
    for start in range(0, wanted.numel(), _LOOKUPS):
        part = wanted[start : start + _LOOKUPS]
        held = None if scale is None else _as_blocks(scale, part)
        out[start : start + _LOOKUPS] = formats.unpack(fmt, _as_blocks(weight, part), held, part.numel(), columns)
    return out.reshape(*ids.shape, columns)


def _as_blocks(stored: Tensor, rows: Tensor) -> Tensor:
    """Some rows of a tensor of the packed layout [blocks, ·, 16, …], as the rows of new blocks."""
    picked = stored[rows // ROWS, :, rows % ROWS]
    blocks = F.pad(picked, (0, 0) * (picked.dim() - 1) + (0, -len(rows) % ROWS))
    held: Tensor = blocks.unflatten(0, (-1, ROWS))
    return held.transpose(1, 2)


def _embedding_meta(ids: Tensor, weight: Tensor, scale: Tensor | None, format: str, rows: int, columns: int) -> Tensor:
    return ids.new_empty((*ids.shape, columns), dtype=torch.float32)


# ── norm, SwiGLU, rotary, attention ─────────────────────────────────────────────────────────────────────────────────


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))


def _rms_norm_quantize(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = _rms_norm(x, weight, eps)
    return (y, *formats.quantize_activation(y))


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _swiglu_quantize(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = _swiglu(gate, up)
    return (y, *formats.quantize_activation(y))


def _like_meta(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _like_quantize_meta(x: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (_like_meta(x), *_activation_meta(x))


def _rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat((-high, low), dim=-1) * sin.unsqueeze(1)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, past: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    keys, values = _cache_update(key_cache, k, past), _cache_update(value_cache, v, past)
    repeat, mask = q.shape[1] // k.shape[1], _causal_mask(past, q.shape[2], key_cache.shape[2])
    out = attend(q, keys.repeat_interleave(repeat, 1), values.repeat_interleave(repeat, 1), mask, scale=scale)
    return out.contiguous(), keys, values


def _attention_meta(
    q: Tensor, k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, past: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _like_meta(q), _like_meta(key_cache), _like_meta(value_cache)


def _attention_quantized(
    q: Tensor, k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, key_scale: Tensor, value_scale: Tensor,
    past: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    keys, key_cache, key_scale = _cache_update_quantized(key_cache, key_scale, k, past)
    values, value_cache, value_scale = _cache_update_quantized(value_cache, value_scale, v, past)
    repeat, mask = q.shape[1] // k.shape[1], _causal_mask(past, q.shape[2], keys.shape[2])
    out = attend(q, keys.repeat_interleave(repeat, 1), values.repeat_interleave(repeat, 1), mask, scale=scale)
    return out.contiguous(), key_cache, value_cache, key_scale, value_scale


def _attention_quantized_meta(
    q: Tensor, k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, key_scale: Tensor, value_scale: Tensor,
    past: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    caches = _like_meta(key_cache), _like_meta(value_cache), _like_meta(key_scale), _like_meta(value_scale)
    return (_like_meta(q), *caches)


_define("causal_mask(Tensor past, SymInt tokens, int context) -> Tensor", _causal_mask, _causal_mask_meta)
_define("cache_update(Tensor cache, Tensor new, Tensor past) -> Tensor", _cache_update, _cache_update_meta)
_define(
    "cache_update_quantized(Tensor codes, Tensor scale, Tensor new, Tensor past) -> (Tensor, Tensor, Tensor)",
    _cache_update_quantized,
    _cache_update_quantized_meta,
)
_define(
    "linear(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, str format, int out_features) -> Tensor",
    _linear,
    _linear_meta,
)
_define("quantize_activation(Tensor x) -> (Tensor, Tensor, Tensor)", _quantize_activation, _activation_meta)
_define("quantize_activation_int4(Tensor x) -> (Tensor, Tensor, Tensor)", _quantize_activation_int4, _activation_meta)
_define(
    "quantize_activation_static(Tensor x, Tensor step) -> (Tensor, Tensor, Tensor)",
    formats.quantize_activation_static,
    _activation_static_meta,
)
_define(f"linear_a8({_PACKED_A8}, str format, int out_features) -> Tensor", _linear_a8, _linear_a8_meta)
_define(
    f"linear_a8_branch({_PACKED_A8}, Tensor x, Tensor a, Tensor b, str format, int out_features) -> Tensor",
    _linear_a8_branch,
    _linear_a8_branch_meta,
)
_define(
    "embedding(Tensor ids, Tensor weight, Tensor? scale, str format, int rows, int columns) -> Tensor",
    _embedding,
    _embedding_meta,
)
_define("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", _rms_norm, _like_meta)
_define(
    "rms_norm_quantize(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    _rms_norm_quantize,
    _like_quantize_meta,
)
_define("swiglu(Tensor gate, Tensor up) -> Tensor", _swiglu, _like_meta)
_define(
    "swiglu_quantize(Tensor gate, Tensor up) -> (Tensor, Tensor, Tensor, Tensor)", _swiglu_quantize, _like_quantize_meta
)
_define("rotary(Tensor x, Tensor cos, Tensor sin) -> Tensor", _rotary, _like_meta)
_define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor key_cache, Tensor value_cache, Tensor past, float scale)"
    " -> (Tensor, Tensor, Tensor)",
    _attention,
    _attention_meta,
)
_define(
    "attention_quantized(Tensor q, Tensor k, Tensor v, Tensor key_cache, Tensor value_cache, Tensor key_scale,"
    " Tensor value_scale, Tensor past, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _attention_quantized,
    _attention_quantized_meta,
)

_ops = torch.ops.hikui
ROUNDING_OPS = frozenset(
    {
        _ops.quantize_activation.default,
        _ops.quantize_activation_int4.default,
        _ops.quantize_activation_static.default,
        _ops.rms_norm_quantize.default,
        _ops.swiglu_quantize.default,
        _ops.cache_update_quantized.default,
        _ops.attention_quantized.default,
    }
)
"""Ops that round activations or caches: what comes after them is no continuous function of their operands."""
