"""Files for llama.cpp: the floats that are written are the model, and the importance matrix has the file's names."""

from pathlib import Path

import gguf
import torch
from benchmarks.llama_files import importance, write_floats

from hikui.lowering.app.request import Request
from hikui.lowering.ir.interpreter import Interpreter
from hikui.lowering.ir.program import Program
from hikui.models import reference
from tests.passes.helpers import lower


def logits(program: Program) -> torch.Tensor:
    tokens = torch.arange(3, 19).view(1, -1)
    interpreter = Interpreter(program)
    return interpreter.run(tokens, 0, interpreter.new_caches())[0]


def test_the_file_of_floats_is_the_model(tmp_path: Path) -> None:
    exact = lower(Request("reference", None).traced(finite=False), "canonicalise")
    path, text = tmp_path / "floats.gguf", tmp_path / "text.txt"
    write_floats(exact, reference.path(), path)
    again = Request(str(path), None, tokenizer=reference.path()).traced(finite=False)
    assert torch.allclose(logits(exact), logits(again), rtol=1e-4, atol=1e-4)

    text.write_text("Once upon a time there was a fox. " * 60, "utf-8")
    names = {tensor.name for tensor in gguf.GGUFReader(path).tensors}
    matrix = importance(exact, text, 2, 16)
    assert len(matrix) == 7 * 6 and matrix.keys() <= names
    assert matrix["blk.5.ffn_down.weight"].shape == (768,) and bool((matrix["blk.0.attn_q.weight"] > 0).any())
