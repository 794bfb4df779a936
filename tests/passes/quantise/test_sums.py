"""What a site's output is added to: through sums, views and plain factors, and no further."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hikui.lowering.ir.program import SITE, Program
from hikui.passes.graph import sites
from hikui.passes.patterns.sums import added_to
from tests.passes.helpers import calibration, canonical, lower, program_of, random, run


def terms(program: Program, site: str) -> list[tuple[str, float]]:
    (node,) = (node for node in sites(program) if node.meta[SITE] == site)
    return [(str(term.node.target), term.factor) for term in added_to(node)]


def written(body: str) -> Program:
    def run_body(x: Tensor, a__weight: Tensor, b__weight: Tensor) -> Tensor:
        a = F.linear(x, a__weight)
        other = F.relu(x)
        result: Tensor = {
            "sum": lambda: F.linear(other + a, b__weight),
            "scaled": lambda: F.linear(4 * (other + 0.5 * a / 0.25), b__weight),
            "twice": lambda: F.linear(x + (a + other), b__weight),
            "two readers": lambda: F.linear((other + a) * a, b__weight),
            "itself": lambda: F.linear(a + a, b__weight),
            "vector": lambda: F.linear(a + b__weight[0], b__weight),
            "product": lambda: F.linear(a * other + x, b__weight),
        }[body]()
        return result

    program = program_of(
        run_body, embedding=random(24, 40), a__weight=random(40, 40, seed=1), b__weight=random(24, 40, seed=2)
    )
    return lower(program, "canonicalise")


@pytest.mark.parametrize(
    ("body", "want"),
    [
        ("sum", [("aten.relu.default", 1.0)]),
        ("scaled", [("aten.relu.default", 2.0)]),
        ("twice", [("aten.relu.default", 1.0), ("aten.add.Tensor", 1.0)]),
        ("two readers", []),
        ("itself", []),
        ("vector", []),
        ("product", []),
    ],
)
def test_terms(body: str, want: list[tuple[str, float]]) -> None:
    assert terms(written(body), "a") == want


def test_a_block_adds_to_its_stream() -> None:
    program = canonical("llama")
    for name, count in (("self_attn.o_proj", 1), ("mlp.down_proj", 1), ("self_attn.q_proj", 0), ("mlp.up_proj", 0)):
        assert len(terms(program, f"model.layers.1.{name}")) == count


@pytest.mark.parametrize("family", ["llama", "opt", "bloom", "gpt2"])
def test_models_of_every_shape_are_nearer_for_it(family: str) -> None:
    program = canonical(family)
    data = calibration(program, 12, 40)
    errors = []
    for residual in (0, 1):
        out = lower(
            program, f"qep{{alpha=1,residual={residual},skip=lm_head}},rtn{{bits=2,group=32,skip=lm_head}}", data
        )
        off = [run(out, text)[0] - run(program, text)[0] for text in data.chunks]
        errors.append(float(torch.cat(off, 1).norm()))
    assert errors[1] < 0.98 * errors[0], errors
