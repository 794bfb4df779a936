"""Families whose graphs hold more than Llama's: greedy tokens on both backends against transformers' own."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from hikui.lowering.app.lower import make_backend
from hikui.lowering.artefact.generate import Runner, Sampling, generate
from hikui.lowering.artefact.target import resolve
from hikui.lowering.ir.program import Program
from hikui.lowering.progress import no_progress
from hikui.lowering.trace import trace_and_compare
from hikui.models.synthetic import TINY_CONTEXT, TINY_VOCABULARY

NEW_TOKENS = 24
PROMPT = tuple(range(5, 5 + 14))

_OLD_NAMES: dict[str, Any] = {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": TINY_CONTEXT, "bos_token_id": 0}
_NEW_NAMES: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 92, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": TINY_CONTEXT, "bos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
_FALCON: dict[str, Any] = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": TINY_CONTEXT,
    "bos_token_id": 0,
}  # fmt: skip

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_neo": (
        "gpt_neo",
        {
            "hidden_size": 48, "intermediate_size": 92, "num_heads": 4, "num_layers": 2, "window_size": 8,
            "attention_types": [[["global", "local"], 1]], "max_position_embeddings": TINY_CONTEXT, "bos_token_id": 0,
        },
    ),
    "gptj": ("gptj", {**_OLD_NAMES, "rotary_dim": 8}),
    "cohere": ("cohere", _NEW_NAMES),
    "glm4": ("glm4", {**_NEW_NAMES, "head_dim": 12}),
    "falcon": ("falcon", {**_FALCON, "num_kv_heads": None}),
    "falcon, grouped": ("falcon", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "gpt_bigcode": ("gpt_bigcode", _OLD_NAMES),
    "ministral3": ("ministral3", {**_NEW_NAMES, "head_dim": 12, "sliding_window": None, "pad_token_id": 0}),
    "diffllama": ("diffllama", _NEW_NAMES),
    "olmo, clipped": ("olmo", {**_NEW_NAMES, "clip_qkv": 0.5}),
}  # fmt: skip


def model_of(name: str) -> nn.Module:
    family, options = FAMILIES[name]
    config = AutoConfig.for_model(family, vocab_size=TINY_VOCABULARY, eos_token_id=1, **options)
    with torch.random.fork_rng(devices=[]):
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else parameter + 0.1 * noise)
    return model.eval().requires_grad_(False)


def greedy(model: nn.Module, prompt: Sequence[int], count: int) -> list[int]:
    """By the model's own forward, without a cache."""
    tokens = list(prompt)
    for _ in range(count):
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
        best, second = logits.topk(2).values
        assert best - second > 1e-4 * logits.abs().max(), "a tie decides nothing; choose another seed"
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]


def built(program: Program, backend: str, directory: Path) -> Runner:
    directory.mkdir()
    make_backend(backend).build(program, resolve("host"), directory, no_progress)
    if backend == "tvm":
        from hikui.backends.tvm import TvmRunner

        return TvmRunner(directory)
    from hikui.backends.onnxruntime import OrtRunner

    return OrtRunner(directory)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    model = model_of(family)
    wanted = greedy(model, PROMPT, NEW_TOKENS)
    program, _ = trace_and_compare(model)
    for backend in ("onnxruntime", "tvm"):
        runner = built(program, backend, tmp_path / backend)
        try:
            result = generate(runner, PROMPT, max_new_tokens=NEW_TOKENS, sampling=Sampling())
        finally:
            runner.close()
        assert result.tokens == wanted, backend
