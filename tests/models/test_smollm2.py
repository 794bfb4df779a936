"""The real model that `hikui fetch smollm2` brings, against what transformers and gguf make of the same file."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from hikui.lowering.artefact.generate import generate
from hikui.lowering.artefact.text import TextCodec
from hikui.lowering.huggingface.tokenizer import ModelTokenizer
from hikui.lowering.ir.interpreter import Interpreter, ReferenceRunner
from hikui.lowering.ir.program import Program
from hikui.lowering.trace import trace_and_compare

pytestmark = pytest.mark.slow

QUESTION = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
)


@pytest.fixture(scope="module")
def program(smollm2: Path) -> Program:
    """The traced model, held to its own logits on the way."""
    traced, fidelity = trace_and_compare(smollm2, context=1024)
    assert (fidelity.blocks, fidelity.of) == (30, 30)
    assert fidelity.largest_difference <= 1e-4
    return traced


@pytest.fixture(scope="module")
def theirs(smollm2: Path) -> Any:
    """transformers' own model of the file; `from_pretrained` wants accelerate for it, what it calls does not."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = AutoConfig.for_model(**load_gguf_checkpoint(smollm2)["config"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    state = load_gguf_checkpoint(smollm2, return_tensors=True, model_to_load=model)["tensors"]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    missing = model.load_state_dict(state, strict=False)
    assert (missing.missing_keys, missing.unexpected_keys) == (["lm_head.weight"], [])
    model.tie_weights()
    return model.eval()


def test_logits_are_those_of_transformers(program: Program, theirs: Any) -> None:
    codec = TextCodec(program.tokenizer)  # type: ignore[arg-type]
    tokens = torch.tensor([codec.encode_prompt(QUESTION + "The capital of France is Paris.")])
    with torch.no_grad():
        want = theirs(tokens).logits
    interpreter = Interpreter(program)
    got, _ = interpreter.run(tokens, 0, interpreter.new_caches())
    assert (got - want).abs().max() <= 1e-4 * (want.max() - want.min())


def test_every_parameter_is_transformers_own(program: Program, theirs: Any) -> None:
    for name, parameter in theirs.named_parameters():
        assert torch.equal(program.store.load(name), parameter), name


def test_named_tensors_are_ggufs(program: Program, smollm2: Path) -> None:
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(smollm2).tensors}

    def values(name: str) -> np.ndarray:
        return gguf.dequantize(read[name].data, read[name].tensor_type)

    load = program.store.load
    assert np.array_equal(load("model.embed_tokens.weight").numpy(), values("token_embd.weight"))
    assert np.array_equal(load("model.layers.7.mlp.down_proj.weight").numpy(), values("blk.7.ffn_down.weight"))
    assert np.array_equal(load("model.layers.29.input_layernorm.weight").numpy(), values("blk.29.attn_norm.weight"))
    paired = values("blk.3.attn_k.weight").reshape(3, 32, 2, 576)
    halves = np.concatenate([paired[:, :, 0], paired[:, :, 1]], axis=1).reshape(192, 576)
    assert np.array_equal(load("model.layers.3.self_attn.k_proj.weight").numpy(), halves)


def test_tokens_are_those_of_transformers(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    ours = Tokenizer.from_str(ModelTokenizer(smollm2).content())
    for text in (QUESTION, "Zoë paid 12.50 € for 3 apples – café!\n\tif x: return [y]", "  two  spaces ", ""):
        assert ours.encode(text).ids == theirs(text)["input_ids"]


def test_it_answers_a_question(program: Program) -> None:
    codec = TextCodec(program.tokenizer)  # type: ignore[arg-type]
    prompt = codec.encode_prompt(QUESTION)
    answer = generate(ReferenceRunner(program), prompt, max_new_tokens=16, stop=program.config.eos_token_ids).tokens
    assert "Paris" in codec.decode(answer)
