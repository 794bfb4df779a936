"""What stands between `torch.export` and a Hugging Face model: positions, mask, attention and cache of our own.

transformers lets a model's mask and attention functions be replaced by name. The replacements here call the dialect's
`causal_mask` and plain `scaled_dot_product_attention`, so one graph serves every past length, and a mask that is more
than causal (a sliding window shorter than the context) is refused rather than lost.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from hikui.lowering.errors import HikuiError
from hikui.lowering.ir.cache_shape import CacheShape

IMPLEMENTATION = "hikui"
"""Name under which the mask and attention functions are registered with transformers."""

_UNSUPPORTED_ATTENTION = ("softcap", "s_aux", "position_bias", "cache")
"""Arguments of transformers' attention functions that change the result and that this one does not implement."""

_active: ContextVar["FunctionalCache"] = ContextVar("hikui_active_cache")


class FunctionalCache:
    """Stands in for a transformers cache: each update makes a new tensor of the whole context length.

    Args:
        past: int64 [1].
        context: Context length C.
        caches: float32 [1, KV, C, D], key and value of each layer in turn.
        indexed_positions: Whether the model takes its positions from us; else it may ask how much was seen.
    """

    def __init__(self, past: Tensor, context: int, caches: Sequence[Tensor], *, indexed_positions: bool) -> None:
        self.past = past
        self.context = context
        self.caches = list(caches)
        self._indexed_positions = indexed_positions

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        at = 2 * layer_idx
        self.caches[at] = torch.ops.hikui.cache_update(self.caches[at], key, self.past)
        self.caches[at + 1] = torch.ops.hikui.cache_update(self.caches[at + 1], value, self.past)
        return self.caches[at], self.caches[at + 1]

    def see_mask(self, mask_function: Callable[..., Any]) -> None:
        """Told of every mask that the model asks for; the recording run has checked it."""

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Length of the keys and index of the first one."""
        return self.context, 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Unused: the mask function takes the offset from `past`."""
        return 0

    def get_seq_length(self, layer_idx: int = 0) -> int | Tensor:
        # A model that was given positions asks only to size a mask that it then throws away. One that was not must see
        # the true, data-dependent number, so that it is either right or fails to trace.
        return 0 if self._indexed_positions else self.past.squeeze(0)


class RecordingCache(FunctionalCache):
    """Notes what each layer stores instead of storing it, and of each mask why it cannot be had, or None."""

    def __init__(self, past: Tensor, context: int, *, indexed_positions: bool) -> None:
        super().__init__(past, context, (), indexed_positions=indexed_positions)
        self.updates: list[tuple[int, tuple[int, ...], tuple[int, ...]]] = []
        self.masks: list[str | None] = []

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.updates.append((layer_idx, tuple(key.shape), tuple(value.shape)))
        keys = key.new_zeros((*key.shape[:2], self.context, key.shape[-1]))
        return keys, value.new_zeros((*value.shape[:2], self.context, value.shape[-1]))

    def see_mask(self, mask_function: Callable[..., Any]) -> None:
        self.masks.append(_why_not_causal(mask_function, self.context))

    def shapes(self, tokens: int) -> tuple[CacheShape, ...]:
        """What was recorded, layer by layer.

        Raises:
            HikuiError: The model has no key-value cache of the supported kind.
        """
        if not self.updates:
            raise HikuiError(
                "The model cannot be traced: it never writes to a key-value cache, so it is no decoder language model."
            )
        result = []
        for number, (layer, key, value) in enumerate(sorted(self.updates)):
            if layer != number:
                raise HikuiError(
                    f"The model cannot be traced: its layers write the caches {sorted(u[0] for u in self.updates)}, "
                    "where each layer must write one, numbered from 0."
                )
            if key != value or len(key) != 4 or key[0] != 1 or key[2] != tokens:
                raise HikuiError(
                    f"The model cannot be traced: layer {layer} caches keys of shape {list(key)} and values of shape "
                    f"{list(value)}, where both must be [1, heads, {tokens}, head size]."
                )
            result.append(CacheShape(heads=key[1], head_size=key[3]))
        return tuple(result)


@contextmanager
def _activated(cache: FunctionalCache) -> Iterator[None]:
    token = _active.set(cache)
    try:
        yield
    finally:
        _active.reset(token)


def _causal_mask(
    q_length: int, kv_length: int, mask_function: Callable[..., Any], attention_mask: Tensor | None = None, **_: Any
) -> Tensor:
    cache = _active.get()
    if _sees_what_follows(mask_function):
        raise HikuiError(
            "The model cannot be traced: it is an encoder, whose attention sees the tokens that follow; hikui lowers "
            "models that write a text token by token."
        )
    if attention_mask is not None or kv_length != cache.context:
        raise HikuiError(
            f"The model cannot be traced: it asks for a mask over {kv_length} keys, where its cache holds "
            f"{cache.context}; the model must be a decoder that gives its cache to transformers' mask functions."
        )
    cache.see_mask(mask_function)
    mask: Tensor = torch.ops.hikui.causal_mask(cache.past, q_length, cache.context)
    return mask


def _sees_what_follows(mask_function: Callable[..., Any]) -> bool:
    with unset_fake_temporarily():
        zero, one = torch.tensor(0), torch.tensor(1)
        return bool(mask_function(zero, zero, zero, one))


def _why_not_causal(mask_function: Callable[..., Any], context: int) -> str | None:
    """Evaluates a transformers mask function on every pair of positions; None where it is plain causal."""
    with unset_fake_temporarily():
        rows, columns, zero = torch.arange(context)[:, None], torch.arange(context)[None], torch.tensor(0)
        visible = torch.as_tensor(mask_function(zero, zero, rows, columns)).expand(context, context)
        differs = visible != (columns <= rows)
        if not bool(differs.any()):
            return None
        row = int(differs.any(1).nonzero()[0])
    if row < 2:
        return (
            f"The model cannot be traced: its attention mask is not plain causal, already at position {row}, and hikui "
            "implements no other."
        )
    return (
        f"The model cannot be traced at a context of {context}: its attention mask stops being plain causal at "
        f"position {row} (a sliding window or chunked attention); choose a context of at most {row}."
    )


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention in the signature of transformers: query [1, H, T, D], key and value [1, KV, C, D] → [1, T, H, D]."""
    for name in _UNSUPPORTED_ATTENTION:
        if options.get(name) is not None:
            raise HikuiError(
                f"The model cannot be traced: its attention uses '{name}', which hikui does not implement."
            )
    if attention_mask is None or options.get("is_causal") is False:
        raise HikuiError("The model cannot be traced: one of its attention layers is not causal.")
    heads, kv = query.shape[1], key.shape[1]
    if heads != kv:
        key, value = (
            t[:, :, None].expand(-1, -1, heads // kv, -1, -1).reshape(1, heads, t.shape[2], t.shape[3])
            for t in (key, value)
        )
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
    return out.transpose(1, 2), None


def register() -> None:
    """Makes the mask and attention functions known to transformers; doing so again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _causal_mask)


class Decoder(nn.Module):
    """A causal language model in the calling convention of a program.

    Args:
        model: A Hugging Face causal language model whose config already names `IMPLEMENTATION`.
        context: Context length C.
    """

    def __init__(self, model: nn.Module, context: int) -> None:
        super().__init__()
        self.model = model
        self.context = context
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    def aliases(self) -> dict[str, str]:
        """For each name of a parameter or buffer here, the name in the model that its sources go by."""
        first: dict[int, str] = {}
        result = {}
        named = [
            *self.model.named_parameters(remove_duplicate=False),
            *self.model.named_buffers(remove_duplicate=False),
        ]
        for name, tensor in named:
            result[f"model.{name}"] = first.setdefault(id(tensor), name)
        return result

    def _call(self, tokens: Tensor, cache: FunctionalCache) -> Tensor:
        options: dict[str, Any] = {}
        if self._takes_positions:
            options["position_ids"] = (cache.past + torch.arange(tokens.shape[1])).unsqueeze(0)
        with _activated(cache):
            result = self.model(input_ids=tokens, past_key_values=cache, use_cache=True, return_dict=True, **options)
        logits = getattr(result, "logits", None)
        if not isinstance(logits, Tensor) or logits.dim() != 3:
            raise HikuiError(
                f"The model cannot be traced: {type(self.model).__name__} returns no logits [1, tokens, vocabulary]."
            )
        return logits

    def record(self, tokens: Tensor, past: Tensor) -> tuple[tuple[CacheShape, ...], tuple[str | None, ...]]:
        """Runs the model once to learn what its layers cache: tokens int64 [1, T], past int64 [1].

        Returns:
            The caches' shapes, and for each mask that it asks for, in order, a sentence where it is not plain causal.

        The model may keep tensors of this run, so a decoder that recorded is of no further use.
        """
        cache = RecordingCache(past, self.context, indexed_positions=self._takes_positions)
        self._call(tokens, cache)
        return cache.shapes(int(tokens.shape[1])), tuple(cache.masks)

    def forward(self, tokens: Tensor, past: Tensor, caches: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Maps tokens int64 [1, T], past int64 [1], caches [1, KV, C, D] to logits [1, T, V], new caches."""
        cache = FunctionalCache(past, self.context, caches, indexed_positions=self._takes_positions)
        return self._call(tokens, cache), *cache.caches
