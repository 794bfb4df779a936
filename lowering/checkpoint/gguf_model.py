"""What a GGUF file's metadata says of a model, and which of its tensors each parameter is.

Names of tensors come from the package gguf, names of the metadata and what llama.cpp does to the values from
transformers. transformers leaves out what the metadata says beyond that: here the size of a head is taken from it too,
and what would make another model is refused.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hikui.lowering.checkpoint.gguf_tensor import GgufTensor
from hikui.lowering.errors import HikuiError
from hikui.lowering.huggingface.gguf_file import GgufFile, GgufList

ARCHITECTURES = ("gemma3", "llama", "qwen2", "qwen3")
"""Those whose metadata, tensors and tokenizers are read; `llama` is also SmolLM's, Mistral's and others'."""

_MODEL_TYPES = {"gemma3": "gemma3_text"}
"""transformers' names where they are not the same."""

_EMBEDDING, _HEAD, _ROPE = "token_embd.weight", "output.weight", "rope_freqs.weight"
_TOKENS = "tokenizer.ggml.tokens"
_BESIDE = "put the model's config.json beside it and give the folder"

_NEEDED = (
    "context_length", "block_count", "embedding_length", "feed_forward_length", "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)  # fmt: skip
_UNDERSTOOD = ("attention.key_length", "attention.value_length", "rope.dimension_count")
"""Keys that `_head_size` reads."""

_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "attention.causal": (True,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "nextn_predict_layers": (0,),
    "rope.freq_base_swa": (10000.0,),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.factor": (1.0,),
    "rope.scaling.finetuned": (True, False),
    "rope.scaling.type": ("none",),
}
"""Keys that nothing here reads, with the values at which they change nothing."""

_SILENT = ("rope.scaling.original_context_length", "tensor_data_layout")
"""Keys that say nothing without another, or nothing of the computation."""

_LARGEST_GEMMA3 = 62
"""Blocks of the one Gemma 3 that scales its queries by the width of the model and not of a head."""


def gguf_config(file: GgufFile) -> dict[str, Any]:
    """What config.json would say, from the metadata.

    Raises:
        HikuiError: a key is missing, of another kind or contradicts the tensors; or the model is none that is read.
    """
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    architecture = architecture_of(file)
    table: Any = GGUF_CONFIG_MAPPING
    names: dict[str, str | None] = table[architecture]
    for key in _NEEDED:
        if f"{architecture}.{key}" not in file.metadata:
            raise HikuiError(f"{file.path} has no {architecture}.{key} in its metadata; {_BESIDE}.")
    if _EMBEDDING not in file.tensors or len(file.tensors[_EMBEDDING].shape) != 2:
        raise HikuiError(f"{file.path} has no matrix '{_EMBEDDING}', so it is no language model.")
    config: dict[str, Any] = {"model_type": _MODEL_TYPES.get(architecture, architecture)}
    for key, name in names.items():
        value = _number_of(file, architecture, key)
        if name is not None and value is not None:
            config[name] = value
    heads = config["num_attention_heads"]
    config.setdefault("num_key_value_heads", heads)
    config["head_dim"] = _head_size(file, architecture, config["hidden_size"], heads)
    config["vocab_size"] = file.tensors[_EMBEDDING].shape[0]
    config["tie_word_embeddings"] = _HEAD not in file.tensors
    for kind, key in (("bos", "bos_token_id"), ("eos", "eos_token_id"), ("padding", "pad_token_id")):
        config[key] = file.integer(f"tokenizer.ggml.{kind}_token_id")
    turn = file.integer("tokenizer.ggml.eot_token_id")
    if turn is not None and turn != config["eos_token_id"]:
        # The end of a turn ends a text too, as in llama.cpp.
        config["eos_token_id"] = [token for token in (config["eos_token_id"], turn) if token is not None]
    for part, key in (("attn_q", "attention_bias"), ("ffn_up", "mlp_bias")):
        if architecture != "qwen2" and f"blk.0.{part}.bias" in file.tensors:
            config[key] = True
    if architecture == "gemma3":
        _complete_gemma3(file, config)
    _refuse_what_changes_the_model(file, architecture, {*names, *_UNDERSTOOD})
    _refuse_contradictions(file, architecture, config)
    return config


def architecture_of(file: GgufFile) -> str:
    """The architecture by its name in llama.cpp.

    Raises:
        HikuiError: the metadata names none, or one that is not read.
    """
    architecture = file.text("general.architecture")
    if architecture is None:
        raise HikuiError(f"{file.path} has no general.architecture in its metadata, so it does not say what it holds.")
    if architecture not in ARCHITECTURES:
        raise HikuiError(
            f"{file.path} is of the architecture '{architecture[:40]}'; of a GGUF hikui reads "
            f"{', '.join(ARCHITECTURES)}, so give the Hugging Face folder of this model."
        )
    return architecture


def has_tokenizer(file: GgufFile) -> bool:
    """Whether the metadata holds a tokenizer.

    Raises:
        HikuiError: its tokens are no list, or more than the embedding has.
    """
    tokens = file.metadata.get(_TOKENS)
    if tokens is None:
        return False
    if not isinstance(tokens, GgufList):
        raise HikuiError(f"{file.path} sets {_TOKENS} to something else than a list.")
    rows = file.tensors[_EMBEDDING].shape[0] if _EMBEDDING in file.tensors else 0
    if tokens.length > rows:
        raise HikuiError(
            f"{file.path} has a tokenizer of {tokens.length} tokens, and its embedding ('{_EMBEDDING}') has {rows} "
            "rows, one a token; the two belong to different models."
        )
    return True


def by_parameter(file: GgufFile, tensors: Mapping[str, GgufTensor], module: nn.Module) -> dict[str, GgufTensor]:
    """The tensors by the names of the module's parameters, the order of rows and the values as transformers has them.

    Args:
        file: the GGUF.
        tensors: by their names in it.
        module: as transformers builds it from the config, whose parameters may be empty.

    Raises:
        HikuiError: a tensor is no parameter of the module, or it is turned in a way that is not read.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    architecture = architecture_of(file)
    config: Any = module.config
    number = next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture)
    table = get_tensor_name_map(number, config.num_hidden_layers)
    processors: Any = TENSOR_PROCESSORS
    processor = processors.get(architecture, TensorProcessor)(config=config.to_dict())
    found, taken = {}, set()
    for name, _ in module.named_parameters(remove_duplicate=False):
        stem, _, kind = name.rpartition(".")
        key = f"{table.get_name(stem)}.{kind}"
        if key in tensors:
            found[name] = _as_transformers_has_it(file, tensors[key], processor)
            taken.add(key)
    _refuse_other_angles(file, tensors, module)
    left = sorted(set(tensors) - taken - {_ROPE})
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise HikuiError(
            f"{file.path} holds the tensor {left[0][:80]!r}{more}, which {type(module).__name__} as it is configured "
            f"has no parameter for, so the model would be another; if the config is another, {_BESIDE}."
        )
    return found


def _as_transformers_has_it(file: GgufFile, tensor: GgufTensor, processor: Any) -> GgufTensor:
    """Asks transformers what it does to a tensor, with the numbers of its rows and with zeros in its place."""
    rows = tensor.shape[0]
    try:
        moved = processor.process(weights=np.arange(rows)[:, None], name=tensor.name).weights
        shifted = processor.process(weights=np.zeros(rows, np.float32), name=tensor.name).weights
    except ValueError as error:
        raise HikuiError(
            f"The tensor {tensor.name[:80]!r} in {file.path} has {rows} rows, which do not divide into the "
            "model's heads."
        ) from error
    offset = float(shifted[0])
    order = torch.from_numpy(np.array(moved).reshape(-1) - round(offset)).long()
    same = torch.equal(order, torch.arange(rows))
    if not torch.equal(order.sort().values, torch.arange(rows)) or bool((shifted != offset).any()):
        raise HikuiError(f"The tensor {tensor.name[:80]!r} in {file.path} is stored in a way that hikui does not read.")
    return replace(tensor, order=None if same else order, added=offset)


def _number_of(file: GgufFile, architecture: str, key: str) -> int | float | None:
    """A number of the architecture's metadata, whole unless its key is one of a real number."""
    whole = f"{architecture}.{key}"
    if key in ("rope.freq_base", "attention.layer_norm_rms_epsilon"):
        real = file.number(whole)
        if real is not None and real <= 0:
            raise HikuiError(f"{file.path} sets {whole} to {real}, where a number above 0 is due.")
        return real
    value = file.integer(whole)
    if value == 0:
        raise HikuiError(f"{file.path} sets {whole} to 0, where a number from 1 on is due.")
    return value


def _head_size(file: GgufFile, architecture: str, width: int, heads: int) -> int:
    told = {key: _number_of(file, architecture, key) for key in _UNDERSTOOD}
    named = {key: value for key, value in told.items() if value is not None}
    size = named.get("attention.key_length", named.get("rope.dimension_count", width // heads))
    for key, value in named.items():
        if value != size:
            raise HikuiError(
                f"{file.path} sets {architecture}.{key} to {value}, where keys have a size of {size}; hikui reads "
                f"GGUFs whose keys, values and rotary angles have one size, so {_BESIDE}."
            )
    if size % 2:
        raise HikuiError(f"{file.path} has heads of size {size}, and rotary angles need an even one.")
    return int(size)


def _complete_gemma3(file: GgufFile, config: dict[str, Any]) -> None:
    """What llama.cpp knows of Gemma 3 without being told."""
    if "rope_theta" not in config:
        raise HikuiError(f"{file.path} has no gemma3.rope.freq_base in its metadata; {_BESIDE}.")
    largest = config["num_hidden_layers"] == _LARGEST_GEMMA3
    scale = config["hidden_size"] // config["num_attention_heads"] if largest else config["head_dim"]
    config["query_pre_attn_scalar"] = scale


def _refuse_what_changes_the_model(file: GgufFile, architecture: str, read: set[str]) -> None:
    """Refuses a key of the architecture that nothing reads, unless it is known to change nothing."""
    for whole, value in file.metadata.items():
        prefix, _, key = whole.partition(".")
        if prefix != architecture or key in read or key in _SILENT or value in _NEUTRAL.get(key, ()):
            continue
        context = file.integer(f"{architecture}.context_length") or 0
        if key == "attention.sliding_window" and type(value) is int and value >= context:
            continue
        told = f"a list of {value.length}" if isinstance(value, GgufList) else f"{value!r:.60}"
        raise HikuiError(
            f"{file.path} sets {whole[:80]} to {told}, which hikui does not read from a GGUF and which may make "
            f"another model; {_BESIDE}."
        )


def _refuse_contradictions(file: GgufFile, architecture: str, config: Mapping[str, Any]) -> None:
    """Holds the sizes of the metadata to the tensors, before a model of these sizes is built."""
    blocks = {int(found[1]) for name in file.tensors if (found := re.match(r"blk\.(\d{1,9})\.", name))}
    count = config["num_hidden_layers"]
    if blocks != set(range(len(blocks))) or len(blocks) != count:
        raise HikuiError(
            f"{file.path} sets {architecture}.block_count to {count}, but its tensors belong to {len(blocks)} blocks, "
            f"the last {max(blocks, default=-1)}; fetch it again."
        )
    for key, name, axis, wanted in _sizes(architecture, config):
        shape = file.tensors[name].shape if name in file.tensors else ()
        if len(shape) != 2:
            raise HikuiError(f"{file.path} has no matrix '{name}', which every {architecture} has; fetch it again.")
        if shape[axis] != wanted:
            raise HikuiError(
                f"{file.path} says {key}, which makes {wanted}, but '{name}' has the shape {list(shape)}; fetch it "
                "again."
            )


def _sizes(architecture: str, config: Mapping[str, Any]) -> Iterator[tuple[str, str, int, int]]:
    """What is said, the tensor that must agree, along which axis, and the size."""
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"], config["num_key_value_heads"]
    yield f"{architecture}.embedding_length {hidden}", _EMBEDDING, 1, hidden
    yield f"{architecture}.feed_forward_length {inner}", "blk.0.ffn_up.weight", 0, inner
    of = f"of size {head}"
    yield f"{architecture}.attention.head_count {queries} {of}", "blk.0.attn_q.weight", 0, queries * head
    yield f"{architecture}.attention.head_count_kv {keys} {of}", "blk.0.attn_k.weight", 0, keys * head


def _refuse_other_angles(file: GgufFile, tensors: Mapping[str, GgufTensor], module: nn.Module) -> None:
    """Refuses factors of the rotary angles (Llama 3.1 and later have some) that are not those of the config."""
    if _ROPE not in tensors:
        return
    config: Any = module.config
    parameters = getattr(config, "rope_parameters", None) or {}
    theta, size = parameters.get("rope_theta"), getattr(config, "head_dim", None)
    found = next((buffer for name, buffer in module.named_buffers() if name.endswith("rotary_emb.inv_freq")), None)
    factors = tensors[_ROPE].load()
    if found is not None and theta is not None and size is not None and factors.shape == found.shape:
        plain: Tensor = 1.0 / theta ** (torch.arange(0, size, 2).double() / size)
        if torch.allclose(found.double(), plain / factors.double(), rtol=1e-4, atol=0):
            return
    raise HikuiError(
        f"{file.path} changes the rotary angles by factors ('{_ROPE}') that its metadata, or the config.json beside "
        f"it, does not account for; {_BESIDE}."
    )
