"""explain: what stays out of the low-bit path, and why."""

import pytest
import torch
from torch import Tensor

from hikui.lowering.ir.printer import to_text
from hikui.passes.rewrite.explain import explain
from tests.passes.helpers import SMALL_VOCABULARY, program_of, random, traced

EMBEDDING = random(SMALL_VOCABULARY, 12)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_nothing_to_say(family: str) -> None:
    assert explain(traced(family)) == []


def test_alibi_is_named_with_its_module_and_the_program_is_left_alone() -> None:
    program = traced("bloom")
    before = to_text(program)
    findings = explain(program)
    attention = [finding for finding in findings if finding.pattern == "attention"]
    assert [finding.module for finding in attention] == [
        "transformer.h.0.self_attention",
        "transformer.h.1.self_attention",
    ]
    assert all("added to the scores" in finding.reason for finding in attention)
    products = [finding for finding in findings if finding.pattern == "linear site"]
    assert {finding.reason for finding in products} == {"both of its operands are activations"}
    assert len(products) == 4
    assert to_text(program) == before


def test_layer_norms_are_told_apart_from_rms_norms() -> None:
    reasons = {finding.reason for finding in explain(traced("gpt2"))}
    assert reasons == {"a layer norm subtracts the mean, which hikui::rms_norm does not; it stays as it is"}


def test_a_weight_that_is_computed_is_no_site() -> None:
    def body(x: Tensor, a__weight: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, a__weight.sign() * 0.5)

    (finding,) = explain(program_of(body, embedding=EMBEDDING, a__weight=random(3, 12)))
    assert finding.pattern == "linear site"
    assert "is made by aten.mul.Tensor, not a stored weight" in finding.reason
    assert str(finding).startswith(f"linear site: {finding.node}")


def test_a_norm_without_a_stored_scale() -> None:
    def body(x: Tensor, n__weight: Tensor) -> Tensor:
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return normed * (1.0 + n__weight)

    (finding,) = explain(program_of(body, embedding=EMBEDDING, n__weight=random(12)))
    assert finding.pattern == "norm"
    assert "not a stored weight" in finding.reason
