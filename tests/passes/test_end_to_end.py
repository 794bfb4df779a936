"""Whole pipelines, on tiny models of every family and on real ones that are there."""

from pathlib import Path

import pytest
import torch

from hikui.lowering.ir import sizes
from hikui.lowering.ir.printer import to_text
from hikui.lowering.ir.program import Program
from hikui.lowering.trace import trace
from hikui.models.synthetic import FAMILIES
from hikui.passes.graph import aten, hikui
from hikui.passes.rewrite.explain import explain

from .helpers import assert_same, calibration, calls, lower, run, traced

MIXED = (
    "canonicalise,override{sites=lm_head,format=int8-g64},calibrate{gram=true},sensitivity,assign{target_bpw=9},"
    "rtn{weighted=true},sub_branch{rank=2,skip=lm_head},activation,fuse,pack{format=float16},dead_code"
)


@pytest.mark.parametrize("family", FAMILIES)
def test_same_inputs_give_the_same_bytes(family: str) -> None:
    data = calibration(traced(family))
    one, two = (lower(traced(family), MIXED, data) for _ in range(2))
    assert to_text(one) == to_text(two)
    assert one.store.keys() == two.store.keys()
    for key in one.store.keys():
        assert torch.equal(one.store.load(key), two.store.load(key))
    assert not calls(one, aten.linear.default)


def relative_error(program: Program, want: torch.Tensor) -> float:
    return float((run(program)[0] - want).norm() / want.norm())


def test_errors_fall_with_bits_and_with_a_branch() -> None:
    program = traced("llama")
    data, want = calibration(program, 8, 40), run(program)[0]
    start, end = "canonicalise,calibrate{gram=true},", ",activation,fuse,pack,dead_code"
    recipes = ("rtn{bits=4,group=32}", "rtn{bits=4,group=32},sub_branch{rank=12}", "rtn{bits=8,group=32}")
    errors = [relative_error(lower(program, start + middle + end, data), want) for middle in recipes]
    assert errors[0] > 1.3 * errors[1] > 1.3 * errors[2]


def check_real(folder: Path) -> None:
    program = trace(folder)
    layers = len(program.config.caches)
    assert explain(program) == []
    fused = lower(program, "canonicalise,fuse,pack,dead_code")
    assert len(calls(fused, hikui.attention.default)) == layers
    assert_same(program, fused)
    plain = lower(program, "canonicalise,rtn{bits=4},activation,pack,dead_code")
    quick = lower(program, "canonicalise,rtn{bits=4},activation,fuse,pack,dead_code")
    assert_same(plain, quick)
    bits = sizes.measure(quick)
    assert bits.true_bpw == pytest.approx(sizes.measure(plain).true_bpw)
    assert bits.true_bpw < 6
    assert relative_error(quick, run(program)[0]) < 0.2


def test_the_reference_model(reference: Path) -> None:
    check_real(reference)


def test_a_model_whose_width_no_group_divides(shared: Path) -> None:
    check_real(shared / "assets" / "models" / "stories260k-llama")
