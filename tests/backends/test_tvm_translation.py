"""What TVM translates otherwise than torch means it, and what it cannot translate."""

from pathlib import Path

import numpy as np
import pytest

from hikui.backends.tvm import TvmBackend, TvmRunner
from hikui.backends.tvm.index import ALIGNMENT
from hikui.backends.tvm.module import relax_module
from hikui.backends.tvm.runner import _aligned
from hikui.lowering.artefact.target import resolve
from hikui.lowering.errors import HikuiError
from hikui.lowering.ir.interpreter import ReferenceRunner
from hikui.lowering.ir.program import Program
from hikui.lowering.ir.reader import from_text
from hikui.lowering.progress import no_progress

HEAD = """program small context=8 vocabulary=4 T=1..8 caches=[1x4]
  %w = weight "w" : f32[4, 4]
  %tokens = input : i64[1, T]
  %past = input : i64[1]
  %key_cache_0 = input : f32[1, 1, 8, 4]
  %value_cache_0 = input : f32[1, 1, 8, 4]
  %e = aten.embedding(%w, %tokens) : f32[1, T, 4]
  %new = aten.unsqueeze(%e, 0) : f32[1, 1, T, 4]
  %key = hikui.cache_update(%key_cache_0, %new, %past) : f32[1, 1, 8, 4]
  %value = hikui.cache_update(%value_cache_0, %new, %past) : f32[1, 1, 8, 4]
"""


def program(*lines: str) -> Program:
    return from_text(HEAD + "".join(f"  {line} : ?\n" for line in lines) + "  return %y, %key, %value\n")


def integers(line: str) -> tuple[str, ...]:
    """Something computed of the tokens' ids, added to the logits."""
    return f"%x = {line}", "%u = aten.unsqueeze(%x, 2)", "%y = aten.add.Tensor(%e, %u)"


MEANINGS = {
    "int + float": integers("aten.add.Tensor(%tokens, 0.5)"),
    "int / int": integers("aten.div.Tensor(%tokens, 2)"),
    "root of int": integers("aten.sqrt(%tokens)"),
    "int < float": integers("aten.lt.Scalar(%tokens, 2.5)"),
    "index from the end": (
        "%i = aten.sub.Tensor(%past, 1)",
        "%x = aten.index.Tensor(%e, [None, None, %i])",
        "%y = aten.add.Tensor(%e, %x)",
    ),
    "two indices": (
        "%i = aten.sub.Tensor(%tokens, 4)",
        "%x = aten.index.Tensor(%w, [%i, %tokens])",
        "%u = aten.unsqueeze(%x, 2)",
        "%y = aten.add.Tensor(%e, %u)",
    ),
    "same shape": ("%n = aten.sym_size.int(%tokens, 1)", "%y = aten.reshape(%e, [1, %n, 4])"),
    "norm without a weight": ("%y = aten.rms_norm(%e, [4])",),
}


@pytest.mark.parametrize("lines", MEANINGS.values(), ids=MEANINGS)
def test_torchs_meaning_is_kept(lines: tuple[str, ...], tmp_path: Path) -> None:
    small = program(*lines)
    TvmBackend().build(small, resolve("host"), tmp_path, no_progress)
    tokens = np.array([0, 1, 2, 3, 2])
    expected = ReferenceRunner(small).forward(tokens, 0)
    runner = TvmRunner(tmp_path)
    try:
        np.testing.assert_allclose(runner.forward(tokens, 0), expected, rtol=1e-5, atol=1e-6)
    finally:
        runner.close()


def test_ids_begin_where_compiled_code_may_load_vectors() -> None:
    for count in range(1, 20):
        ids = np.arange(count + 1)[1:]
        held = _aligned(ids)
        assert held.ctypes.data % ALIGNMENT == 0
        np.testing.assert_array_equal(held, ids)


def test_an_error_of_tvm_names_the_node_and_the_way_out() -> None:
    with pytest.raises(HikuiError) as caught:
        relax_module(program("%y = aten.group_norm(%e, 1)"))
    message = str(caught.value)
    assert "node 'y', aten.group_norm" in message
    assert message.endswith("; lower with --backend onnxruntime, or report it.")
    assert caught.value.__cause__ is not None, "--debug shows what TVM has raised"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("aten.index.Tensor(%e, [None, %tokens, %tokens])", "indexes some dimensions together"),
        ("aten.addcmul(%e, %e, %e)", "no translation for the operators 'addcmul.default'"),
    ],
)
def test_what_has_no_translation_is_said(line: str, words: str) -> None:
    lines = [f"%x = {line}", "%y = aten.add.Tensor(%e, %x)"]
    if "index" in line:
        lines[1:] = ["%u = aten.transpose.int(%x, 1, 2)", "%y = aten.add.Tensor(%e, %u)"]
    with pytest.raises(HikuiError, match=words):
        relax_module(program(*lines))
