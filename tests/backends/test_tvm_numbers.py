"""What the backend `tvm` computes, against the reference interpreter."""

from pathlib import Path

import numpy as np
import pytest
import torch

from hikui.backends.tvm import TvmBackend, TvmRunner
from hikui.lowering.artefact.generate import Runner, Sampling, generate
from hikui.lowering.artefact.target import TARGETS, machine_triple, missing_features, resolve
from hikui.lowering.ir.interpreter import ReferenceRunner
from hikui.lowering.ir.program import Program
from hikui.lowering.progress import no_progress
from hikui.lowering.trace import trace
from hikui.models.synthetic import FAMILIES, tiny_model
from tests.backends import every_op
from tests.passes.helpers import lower, traced

CHUNKS = (5, 1, 1, 3, 1, 7, 1)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def largest_difference(runner: Runner, program: Program, seed: int = 0, chunks: tuple[int, ...] = CHUNKS) -> float:
    """Over prefill, chunks and single steps, relative to the largest logit."""
    reference, past, worst = ReferenceRunner(program), 0, 0.0
    tokens = np.random.default_rng(seed).integers(0, program.config.vocabulary, sum(chunks))
    for size in chunks:
        step = tokens[past : past + size]
        got, expected = runner.forward(step, past), reference.forward(step, past)
        assert got.shape == expected.shape == (size, program.config.vocabulary)
        worst = max(worst, float(np.abs(got - expected).max() / np.abs(expected).max()))
        past += size
    return worst


def test_every_op_gives_the_references_logits(tvm_host: Path) -> None:
    assert largest_difference(TvmRunner(tvm_host), every_op.program()) < 1e-5


def test_the_program_uses_every_op_of_the_dialect() -> None:
    used = {
        node.target.name() for node in every_op.program().graph.nodes if isinstance(node.target, torch._ops.OpOverload)
    }
    defined = {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("hikui::")}
    assert defined and defined <= used


def test_a_used_cache_does_not_show_in_the_next_text(tvm_host: Path) -> None:
    runner, fresh = TvmRunner(tvm_host), TvmRunner(tvm_host)
    runner.forward(np.arange(20), 0)
    runner.reset()
    prompt = np.array([7, 3, 50])
    np.testing.assert_array_equal(runner.forward(prompt, 0), fresh.forward(prompt, 0))


def test_a_kept_prefix_can_be_continued_in_another_way(tvm_host: Path) -> None:
    runner = TvmRunner(tvm_host)
    runner.forward(np.array([7, 3, 50, 11, 12]), 0)
    again = runner.forward(np.array([20, 21]), 3)
    whole = TvmRunner(tvm_host).forward(np.array([7, 3, 50, 20, 21]), 0)
    np.testing.assert_allclose(again, whole[3:], rtol=1e-5, atol=1e-5)


def test_generation_equals_the_references(tvm_host: Path) -> None:
    program = every_op.program()
    texts = [
        generate(runner, [1, 2, 3], max_new_tokens=40, sampling=Sampling()).tokens
        for runner in (TvmRunner(tvm_host), ReferenceRunner(program))
    ]
    assert texts[0] == texts[1]
    assert len(texts[0]) == every_op.CONTEXT - 3 + 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_float_model_of_each_family(family: str, tmp_path: Path) -> None:
    program = trace(tiny_model(family))
    TvmBackend().build(program, resolve("host"), tmp_path, no_progress)
    runner = TvmRunner(tmp_path)
    assert runner.context_length == program.config.context_length
    assert largest_difference(runner, program) < 1e-5


def test_factors_of_signs(tmp_path: Path) -> None:
    program = lower(traced("llama"), "canonicalise,factorise{bits=3,iterations=5},activation,pack,fuse,dead_code")
    TvmBackend().build(program, resolve("host"), tmp_path, no_progress)
    assert largest_difference(TvmRunner(tmp_path), program) < 1e-5


def test_every_op_with_avx512(tmp_path: Path) -> None:
    target = TARGETS["x86-64-vnni"]
    if machine_triple() != target.triple or missing_features(target):
        pytest.skip("this machine has no AVX-512 VNNI")
    program = every_op.program(seed=3)
    TvmBackend().build(program, target, tmp_path, no_progress)
    assert largest_difference(TvmRunner(tmp_path), program, seed=3) < 1e-5


def test_emulated_boards_give_the_references_logits(tvm_board: Path) -> None:
    runner = TvmRunner(tvm_board, emulate=True)
    try:
        assert largest_difference(runner, every_op.program()) < 1e-5
    finally:
        runner.close()
