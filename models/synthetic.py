"""Checkpoints with random weights: tiny ones of every family for tests, large Llama shapes for memory and time.

`python -m hikui.models.synthetic llama-1b DIR [--layers N]` writes a checkpoint shard by shard, so that the peak memory
is that of one shard whatever the size of the model.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hikui.lowering.errors import HikuiError, UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIAL_TOKENS = ("<s>", "</s>", "<unk>")
TINY_VOCABULARY = len(SPECIAL_TOKENS) + 128
"""The special tokens and every ASCII byte; no multiple of 16, so the head has a partial block."""

TINY_CONTEXT = 64

# Shapes are chosen to be awkward: more query than key heads, FFN widths that no group divides, biases where the family
# has them. Every family shares the vocabulary and the context.
_TINY: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 48,
        "intermediate_size": 116,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": TINY_CONTEXT,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
    "qwen2": {
        "hidden_size": 64,
        "intermediate_size": 148,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": TINY_CONTEXT,
        "tie_word_embeddings": True,
    },
    "opt": {
        "hidden_size": 48,
        "word_embed_proj_dim": 48,
        "ffn_dim": 132,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": TINY_CONTEXT,
    },
    "bloom": {
        "hidden_size": 48,
        "n_layer": 2,
        "n_head": 6,
        "seq_length": TINY_CONTEXT,
    },
    "gpt2": {
        "n_embd": 48,
        "n_inner": 100,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": TINY_CONTEXT,
    },
}

FAMILIES = tuple(sorted(_TINY))
"""The families `tiny_model` knows."""


def tiny_model(family: str, seed: int = 0) -> torch.nn.Module:
    """Build a tiny Hugging Face causal language model with random float32 weights.

    Args:
        family: One of `FAMILIES`.
        seed: Seeds a generator of its own; the global one is left as it was.

    Returns:
        The model in eval mode: vocabulary `TINY_VOCABULARY`, context `TINY_CONTEXT`, BOS 0, EOS 1.

    Raises:
        UsageError: The family is unknown.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if family not in _TINY:
        raise UsageError(f"There is no tiny model of family '{family}'; choose one of {', '.join(FAMILIES)}.")
    config = AutoConfig.for_model(
        family, vocab_size=TINY_VOCABULARY, bos_token_id=0, eos_token_id=1, pad_token_id=1, **_TINY[family]
    )
    with torch.random.fork_rng(devices=[]):  # the constructor draws weights from the global generator
        model: torch.nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=False, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            parameter.copy_(_random_weight(name, tuple(parameter.shape), generator))
    return model.eval().requires_grad_(False)


def tiny_checkpoint(family: str, directory: Path, seed: int = 0) -> Path:
    """Write `tiny_model(family, seed)` with a byte-level tokenizer as a Hugging Face folder, and return the folder."""
    model: Any = tiny_model(family, seed)
    model.save_pretrained(directory)
    write_tokenizer(directory, TINY_VOCABULARY, TINY_CONTEXT)
    return directory


def _random_weight(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw one float32 tensor: matrices with variance 1/fan-in, scales of norms around one, biases around zero."""
    values = torch.randn(shape, generator=generator)
    if len(shape) > 1:
        return values.mul_(shape[-1] ** -0.5)
    return values.mul_(0.1) if name.endswith("bias") else values.mul_(0.1).add_(1.0)


def byte_tokenizer(vocabulary: int) -> "Tokenizer":
    """Make a tokenizer with one token a byte: the special tokens, then as many byte values as the vocabulary has room.

    Args:
        vocabulary: Size of the model's vocabulary; a byte beyond it encodes as `<unk>`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    # The byte-level pre-tokenizer writes printable bytes as themselves and the others from U+0100 upwards.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = {ord(character) for character in alphabet if ord(character) < 256}
    hidden = iter(character for character in alphabet if ord(character) >= 256)
    characters = [chr(byte) if byte in printable else next(hidden) for byte in range(256)]
    tokens = [*SPECIAL_TOKENS, *characters][:vocabulary]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def write_tokenizer(directory: Path, vocabulary: int, context: int) -> None:
    """Write `byte_tokenizer(vocabulary)` into a checkpoint folder: tokenizer.json and tokenizer_config.json."""
    byte_tokenizer(vocabulary).save(str(directory / "tokenizer.json"))
    settings = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "model_max_length": context,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
    }
    _write_json(directory / "tokenizer_config.json", settings)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class LlamaShape:
    """The sizes of a Llama-style model, named as in its config.json."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield every checkpoint key with its shape, in the order in which they are written."""
        width, ffn, kv = self.hidden_size, self.intermediate_size, self.num_key_value_heads * self.head_dim
        yield "model.embed_tokens.weight", (self.vocab_size, width)
        for layer in range(self.num_hidden_layers):
            prefix = f"model.layers.{layer}."
            yield prefix + "input_layernorm.weight", (width,)
            yield prefix + "self_attn.q_proj.weight", (width, width)
            yield prefix + "self_attn.k_proj.weight", (kv, width)
            yield prefix + "self_attn.v_proj.weight", (kv, width)
            yield prefix + "self_attn.o_proj.weight", (width, width)
            yield prefix + "post_attention_layernorm.weight", (width,)
            yield prefix + "mlp.gate_proj.weight", (ffn, width)
            yield prefix + "mlp.up_proj.weight", (ffn, width)
            yield prefix + "mlp.down_proj.weight", (width, ffn)
        yield "model.norm.weight", (width,)
        if not self.tie_word_embeddings:
            yield "lm_head.weight", (self.vocab_size, width)

    def config(self) -> dict[str, Any]:
        """Give the content of config.json."""
        return asdict(self) | {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "bos_token_id": 0,
            "dtype": "bfloat16",
            "eos_token_id": 1,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "mlp_bias": False,
            "model_type": "llama",
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
        }


PRESETS: dict[str, LlamaShape] = {
    "llama-1b": LlamaShape(2048, 8192, 16, 32, 8, 128256, 2048, tie_word_embeddings=True),
    "llama-7b": LlamaShape(4096, 11008, 32, 32, 32, 32000, 2048, tie_word_embeddings=False),
}
"""`llama-1b` has the shapes of Llama-3.2-1B (1.24 G parameters), `llama-7b` those of Llama-2-7B (6.74 G)."""

_FILL_ELEMENTS = 1 << 24
"""Elements drawn at a time: the float32 draw of a large embedding stays at 64 MiB."""


def write_llama(shape: LlamaShape, directory: Path, seed: int = 0, shard_bytes: int = 1 << 29) -> int:
    """Write a random bfloat16 Llama checkpoint with config, index and tokenizer.

    Tensors go out one after the other into shards; memory stays at one shard.

    Args:
        shape: The sizes of the model.
        directory: Made if absent.
        seed: Seeds the generator of the weights.
        shard_bytes: A shard is closed before it would pass this size; a larger tensor has a shard of its own.

    Returns:
        The number of parameters.

    Raises:
        HikuiError: The folder cannot be written.
    """
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    room = shard_bytes
    for name, sizes in shape.tensors():
        nbytes = 2 * torch.Size(sizes).numel()
        if nbytes > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append((name, sizes))
        room -= nbytes
    weight_map: dict[str, str] = {}
    total = 0
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for number, shard in enumerate(shards, start=1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            tensors = {name: _random_bfloat16(name, sizes, generator) for name, sizes in shard}
            save_file(tensors, directory / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file)
            total += sum(tensor.numel() for tensor in tensors.values())
        index = {"metadata": {"total_size": 2 * total}, "weight_map": weight_map}
        _write_json(directory / "model.safetensors.index.json", index)
        _write_json(directory / "config.json", shape.config())
        write_tokenizer(directory, shape.vocab_size, shape.max_position_embeddings)
    except OSError as error:
        raise HikuiError(f"The checkpoint cannot be written to {directory}: {error.strerror or error}.") from error
    return total


def _random_bfloat16(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw a tensor as `_random_weight` does, in pieces of whole rows."""
    result = torch.empty(shape, dtype=torch.bfloat16)
    rows = max(1, _FILL_ELEMENTS // max(1, torch.Size(shape[1:]).numel()))
    for start in range(0, shape[0], rows):
        piece = result[start : start + rows]
        piece.copy_(_random_weight(name, tuple(piece.shape), generator))
    return result


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m hikui.models.synthetic", description=__doc__)
    parser.add_argument("preset", choices=sorted(PRESETS))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, help="number of blocks instead of the preset's")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    shape = PRESETS[options.preset]
    if options.layers is not None:
        if options.layers < 1:
            parser.error("--layers must be at least 1")
        shape = replace(shape, num_hidden_layers=options.layers)
    try:
        total = write_llama(shape, options.directory, options.seed)
    except HikuiError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"{options.directory}: {total:,} parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
