"""Passes on programs written as text.

Each `.ir` file here begins with `// RUN: PIPELINE`, whose last pass is the one under test. Its program gets weights
from a seed, calibrating passes get dice, and what comes out must fit the file's `// CHECK` lines (FileCheck).
`// LOGITS: 0.1` is how far the logits may lie from those of the program that went in, relative to their size.
`// WEIGHTS: gptq` gives the sites the matrices of a GPTQ checkpoint, which a text does not hold.
"""

import re
from pathlib import Path

import pytest
import torch

from hikui.lowering.checkpoint.folder import Checkpoint
from hikui.lowering.ir.printer import to_text
from hikui.lowering.ir.program import SITE, Program
from hikui.lowering.ir.reader import from_text
from hikui.lowering.ir.store import WeightStore
from hikui.lowering.pipeline.text import parse_pipeline
from hikui.passes import PASSES
from hikui.passes.graph import matrix_shape, sites
from tests.lowering.checkpoint.quantised_folders import gptq, gptq_config, random_grid, write_matrices
from tests.passes.helpers import calibration, check, lower, run

FILES = sorted(Path(__file__).parent.glob("*.ir"))


def directive(text: str, name: str) -> str | None:
    found = re.search(rf"^// {name}: (.*)$", text, re.MULTILINE)
    return None if found is None else found[1].strip()


def read(file: Path, folder: Path) -> Program:
    text = file.read_text("utf-8")
    program = from_text(text, source=file.name, seed=0)
    if directive(text, "WEIGHTS") is None:
        return program
    parts = {
        str(node.meta[SITE]): gptq(random_grid(*matrix_shape(node), seed=seed))
        for seed, node in enumerate(sites(program))
    }
    tensors = Checkpoint.open(write_matrices(folder, gptq_config(4), parts)).tensors
    return from_text(text, WeightStore(dict(tensors)), source=file.name, seed=0)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_text_in_text_out(file: Path, tmp_path: Path) -> None:
    text = file.read_text("utf-8")
    pipeline = directive(text, "RUN")
    assert pipeline is not None and "// CHECK" in text
    program = read(file, tmp_path)
    out = lower(program, pipeline, calibration(program))
    check(out, text)
    before, after = run(program)[0], run(out)[0]
    limit = float(directive(text, "LOGITS") or 0.0)
    assert float((after - before).norm() / before.norm()) <= limit
    assert to_text(from_text(to_text(out), out.store)) == to_text(out)


def test_every_pass_is_the_last_of_some_file() -> None:
    runs = [directive(file.read_text("utf-8"), "RUN") for file in FILES]
    tested = {parse_pipeline(pipeline, PASSES)[-1].name for pipeline in runs if pipeline}
    assert {kind.name for kind in PASSES} - tested == set()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_checks_do_not_hold_without_the_pass(file: Path, tmp_path: Path) -> None:
    """Checks that hold of what goes in would test nothing."""
    text = file.read_text("utf-8")
    pipeline = parse_pipeline(directive(text, "RUN") or "", PASSES)
    program = read(file, tmp_path)
    before = lower(program, ",".join(map(str, pipeline[:-1])), calibration(program)) if pipeline[1:] else program
    with pytest.raises(AssertionError):
        check(before, text)


def test_the_seeded_weights_are_finite() -> None:
    for file in FILES:
        program = from_text(file.read_text("utf-8"))
        for key in program.store.keys():
            tensor = program.store.load(key)
            assert not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
