"""GGUF files of tiny random models, with the names and the order of rows that llama.cpp's converter gives them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

CONTEXT = 64

_SIZES: dict[str, Any] = {
    "vocab_size": 260, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": CONTEXT, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": None,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "llama",
        {**_SIZES, "tie_word_embeddings": False, "rope_parameters": {"rope_theta": 5e4, "rope_type": "default"}},
    ),
    "qwen2": ("qwen2", {**_SIZES, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**_SIZES, "head_dim": 32, "tie_word_embeddings": True}),
    "gemma3": (
        "gemma3_text",
        {
            **_SIZES, "num_hidden_layers": 6, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": CONTEXT,
            "tie_word_embeddings": True,
        },
    ),
}  # fmt: skip
"""llama.cpp's architecture, transformers' name, and the config."""

_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip


def model_of(architecture: str, seed: int = 0) -> Any:
    """A tiny model with random float32 weights, in eval mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, settings = FAMILIES[architecture]
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(drawn * parameter.shape[-1] ** -0.5 if drawn.dim() > 1 else 0.1 * drawn)
            if drawn.dim() == 1 and architecture != "gemma3":
                parameter.add_(1.0)
    return model.eval().requires_grad_(False)


def stored_name(architecture: str, name: str) -> str:
    """llama.cpp's name of a parameter."""
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, _, ending = name.rpartition(".")
    if stem in outer:
        return f"{outer[stem]}.{ending}"
    _, _, block, inner = stem.split(".", 3)
    names = {**_NAMES, "post_attention_layernorm": "post_attention_norm"} if architecture == "gemma3" else _NAMES
    return f"blk.{block}.{names[inner]}.{ending}"


def stored_values(architecture: str, name: str, values: Tensor, heads: Mapping[str, int]) -> np.ndarray:
    """What llama.cpp's converter makes of a parameter: rows of q and k in pairs, norms of Gemma with 1 added."""
    array = values.numpy()
    if architecture == "llama" and (part := name.split(".")[-2]) in heads:
        # A head's rows are its first half and its second; there they alternate.
        return np.concatenate([
            rows[[half * (len(rows) // 2) + pair for pair in range(len(rows) // 2) for half in range(2)]]
            for rows in np.split(array, heads[part])
        ])  # fmt: skip
    if architecture == "gemma3" and name.endswith("norm.weight"):
        return array + np.float32(1)
    return array


def restored_values(architecture: str, name: str, stored: np.ndarray, heads: Mapping[str, int]) -> Tensor:
    """And back."""
    if architecture == "llama" and (part := name.split(".")[-2]) in heads:
        return torch.from_numpy(np.concatenate([
            np.concatenate([rows[0::2], rows[1::2]]) for rows in np.split(stored, heads[part])
        ]))  # fmt: skip
    if architecture == "gemma3" and name.endswith("norm.weight"):
        return torch.from_numpy(stored - np.float32(1))
    return torch.from_numpy(np.array(stored))


def write_gguf(
    path: Path,
    architecture: str = "llama",
    kind: Kind = Kind.F32,
    *,
    seed: int = 0,
    kinds: Mapping[str, Kind] = {},
    without: tuple[str, ...] = (),
    change: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    tokenizer: Callable[[gguf.GGUFWriter], None] | None = None,
) -> Any:
    """Writes a tiny model, and gives the model with the weights that the file then stands for.

    Args:
        path: the file.
        architecture: llama.cpp's name of it.
        kind: type of the matrices; vectors are F32.
        seed: of the weights.
        kinds: other types, by the tensor's name in the file.
        without: keys of the metadata, without the architecture, to leave out.
        change: adds to the metadata.
        tokenizer: writes one; by default the bytes and two merges, with BOS.
    """
    model = model_of(architecture, seed)
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in _metadata(architecture, config).items():
        if key in without:
            continue
        if isinstance(value, float):
            writer.add_float32(f"{architecture}.{key}", value)
        else:
            writer.add_uint32(f"{architecture}.{key}", value)
    (tokenizer or byte_level)(writer)
    change(writer)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, parameter in model.named_parameters():
        key = stored_name(architecture, name)
        values = stored_values(architecture, name, parameter.data, heads)
        held = kinds.get(key, kind if values.ndim > 1 else Kind.F32)
        blocks = gguf.quantize(values, held)
        writer.add_tensor(key, blocks, raw_dtype=held)
        parameter.data = restored_values(architecture, name, gguf.dequantize(blocks, held).reshape(values.shape), heads)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _metadata(architecture: str, config: Any) -> dict[str, float | int]:
    size = config.head_dim if hasattr(config, "head_dim") else config.hidden_size // config.num_attention_heads
    theta = 1e6 if architecture == "gemma3" else config.rope_parameters["rope_theta"]
    found: dict[str, float | int] = {
        "context_length": CONTEXT, "block_count": config.num_hidden_layers, "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size, "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads, "rope.freq_base": float(theta),
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
    }  # fmt: skip
    if architecture in ("llama", "qwen2"):
        return {**found, "rope.dimension_count": size}
    found |= {"attention.key_length": size, "attention.value_length": size}
    return {**found, "attention.sliding_window": CONTEXT} if architecture == "gemma3" else found


def byte_level(writer: gguf.GGUFWriter, *, bos: bool = True, pre: str = "qwen2") -> None:
    """A byte-level tokenizer of 260 tokens: <s>, </s>, every byte, and two merges."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = ["<s>", "</s>", *bytes_to_unicode().values(), "on", "onc"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(["o n", "on c"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(bos)
    writer.add_chat_template("{% for message in messages %}<s>{{ message['content'] }}{% endfor %}")


def sentence_pieces(writer: gguf.GGUFWriter) -> None:
    """A SentencePiece tokenizer, of which llama.cpp says no more than the pieces and their scores."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(200)),
        "▁",
        *"abcdefghijklmnopqrstuvw",
        "▁a",
        "on",
    ]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(pieces)
    writer.add_token_scores([0.0 if at < 203 else -float(at) for at in range(len(pieces))])
    writer.add_token_types([2, 3, 3] + [6] * 200 + [1] * (len(pieces) - 203))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
