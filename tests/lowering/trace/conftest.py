from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hikui.lowering.ir.interpreter import Interpreter
from hikui.lowering.ir.program import Program
from hikui.lowering.trace import trace
from hikui.models.synthetic import FAMILIES, tiny_checkpoint, tiny_model


@dataclass(frozen=True)
class Traced:
    """A tiny model, its program, and the logits of the float model for a sequence as long as the context."""

    family: str
    model: torch.nn.Module
    program: Program
    tokens: Tensor
    logits: Tensor


def random_tokens(vocabulary: int, length: int) -> Tensor:
    return torch.randint(0, vocabulary, (1, length), generator=torch.Generator().manual_seed(length))


def float_logits(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(tokens).logits
    return logits


def run_in_steps(program: Program, tokens: Tensor, steps: list[int]) -> Tensor:
    """The logits of a sequence that is fed in pieces of the given lengths."""
    interpreter = Interpreter(program)
    caches, outputs, past = interpreter.new_caches(), [], 0
    for step in steps:
        logits, caches = interpreter.run(tokens[:, past : past + step], past, caches)
        outputs.append(logits)
        past += step
    return torch.cat(outputs, 1)


@pytest.fixture(scope="session", params=FAMILIES)
def traced(request: pytest.FixtureRequest) -> Traced:
    model = tiny_model(request.param)
    program = trace(model)
    tokens = random_tokens(program.config.vocabulary, program.config.context_length)
    return Traced(request.param, model, program, tokens, float_logits(model, tokens))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The folder of a tiny Llama in one safetensors file, to be spoilt."""
    return tiny_checkpoint("llama", tmp_path / "llama")
