"""Numbers that leave float32: `lower` names the node, and no generator writes a token from them."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import hikui
from hikui.lowering.app.assemble import reference_numbers
from hikui.lowering.app.lower import make_backend
from hikui.lowering.artefact import verify
from hikui.lowering.artefact.generate import Runner, Sampling, generate
from hikui.lowering.artefact.manifest import REFERENCE, Artefact, Reference
from hikui.lowering.artefact.target import resolve
from hikui.lowering.errors import HikuiError
from hikui.lowering.ir.interpreter import ReferenceRunner
from hikui.lowering.ir.program import Program
from hikui.lowering.progress import no_progress
from hikui.lowering.trace import trace
from hikui.models.synthetic import tiny_checkpoint

WEIGHTS = "model.safetensors"
HUGE = 3e38


def spoilt(folder: Path, key: str, value: float) -> Path:
    """A tiny Llama of which one tensor is a single, finite, number."""
    tiny_checkpoint("llama", folder)
    tensors = load_file(folder / WEIGHTS)
    tensors[key] = torch.full_like(tensors[key], value)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("model.norm.weight", r"node 'mul_\d+' \(aten\.mul\.Tensor\) at modeling_llama\.py:\d+ is the first"),
        ("model.layers.1.input_layernorm.weight", r"node '\w+' \(aten\.\S+\) in block 1 at \w+\.py:\d+ is the first"),
    ],
)
def test_lowering_names_the_first_node_that_is_not_finite(key: str, words: str, tmp_path: Path) -> None:
    folder = spoilt(tmp_path / "model", key, HUGE)
    with pytest.raises(HikuiError, match=words) as caught:
        hikui.lower(folder, tmp_path / "out", recipe="float", backend="onnxruntime")
    assert str(caught.value).startswith("The model itself gives logits that are not finite for 4 tokens: ")
    assert not (tmp_path / "out").exists()


def test_a_lowered_program_whose_numbers_are_not_finite_is_refused_too(tmp_path: Path) -> None:
    program = trace(spoilt(tmp_path / "model", "model.norm.weight", HUGE))
    with pytest.raises(HikuiError, match=r"^The lowered program gives logits that are not finite for 9 tokens: node '"):
        reference_numbers(program)


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """As one might be made elsewhere: `lower` refuses it."""
    return trace(spoilt(tmp_path_factory.mktemp("overflowing") / "model", "model.norm.weight", HUGE))


@pytest.fixture(scope="module", params=["onnxruntime", "tvm"])
def overflowing_artefact(
    request: pytest.FixtureRequest, overflowing: Program, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    directory = tmp_path_factory.mktemp(request.param)
    make_backend(request.param).build(overflowing, resolve("host"), directory, no_progress)
    return directory


def runner_of(directory: Path) -> Runner:
    if (directory / "model.onnx").exists():
        from hikui.backends.onnxruntime import OrtRunner

        return OrtRunner(directory)
    from hikui.backends.tvm import TvmRunner

    return TvmRunner(directory)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_runner_writes_a_token(overflowing_artefact: Path, overflowing: Program, temperature: float) -> None:
    for runner in (runner_of(overflowing_artefact), ReferenceRunner(overflowing)):
        with pytest.raises(HikuiError, match="After 3 tokens the model gives logits that are not finite"):
            generate(runner, [1, 2, 3], max_new_tokens=4, sampling=Sampling(temperature=temperature))


def test_the_boards_runner_stops_with_a_sentence(overflowing_artefact: Path) -> None:
    if (overflowing_artefact / "model.onnx").exists():
        command = [sys.executable, str(overflowing_artefact / "bin" / "ort_run.py"), str(overflowing_artefact)]
    else:
        command = [str(next(overflowing_artefact.glob("bin/*/hikui-run"))), str(overflowing_artefact)]
    done = subprocess.run([*command, "--tokens", "1,2,3", "--json"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "logits that are not finite, so there is no next token" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_verifying_an_older_artefact_does_not_blame_its_files(artefact: Artefact) -> None:
    reference = artefact.reference()
    logits = np.full_like(reference.logits, math.nan)
    Reference(reference.tokens, reference.prompt, logits).save(artefact.directory / REFERENCE)
    with pytest.raises(
        HikuiError, match=r"has logits that say nothing: all zero, or not finite; lower the model again"
    ):
        verify.check_numbers(artefact, lambda: pytest.fail("nothing is to be run"))
