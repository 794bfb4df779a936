"""What a quantiser's sites become one after the other: floats among them, sites that do not fit, work that is kept."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hikui.lowering.engine.resume import Resume
from hikui.lowering.errors import HikuiError
from hikui.lowering.formats import Format
from hikui.lowering.ir.packed import PackedLinear
from hikui.lowering.ir.program import Program
from hikui.lowering.pipeline.contract import PassContext
from hikui.passes import Rtn
from hikui.passes.graph import sites
from hikui.passes.quantise.rounding import dequantise, round_matrix
from tests.passes.helpers import lower, program_of, random

N, K = 40, 32


def two_sites(first: Tensor, second: Tensor, formats: str = "") -> Program:
    def body(x: Tensor, a__weight: Tensor, b__weight: Tensor) -> Tensor:
        return F.linear(x, a__weight) + F.linear(x, b__weight)

    program = program_of(body, embedding=random(N, K), a__weight=first, b__weight=second)
    return lower(program, f"canonicalise{formats}")


def dense(program: Program) -> list[Tensor]:
    return [PackedLinear.of(node).dense(program.store) for node in sites(program)]


@pytest.mark.parametrize("name", ["float16", "float32"])
def test_a_site_of_a_float_format_is_packed_as_it_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hikui.passes.matrices.PART", 16 * K)
    first, second = random(N, K, seed=1), random(N, K, seed=2)
    program = two_sites(first, second, f",override{{sites=a,format={name}}}")
    out = Rtn(group=32).run(program, PassContext()).program
    fmt = Format("int4", 32)
    want = [first.to(Format(name).weight_dtype).float(), dequantise(round_matrix(second, fmt), fmt)]
    assert all(torch.equal(got, due) for got, due in zip(dense(out), want, strict=True))


def test_values_that_a_format_does_not_hold_are_named_with_their_site() -> None:
    weight = random(N, K, seed=1)
    weight[33, 4] = -65504.0
    Rtn().run(two_sites(weight, random(N, K, seed=2), ",override{sites=a,format=float16}"), PassContext())
    weight[33, 4] = -65505.0
    program = two_sites(random(N, K, seed=2), weight, ",override{sites=b,format=float16}")
    with pytest.raises(
        HikuiError, match=r"^Site b: its weights pass float16's largest value 65504; pack it as float32"
    ):
        Rtn().run(program, PassContext())
    weight[33, 4] = 1e9
    program = two_sites(random(N, K, seed=2), weight)
    sentence = r"^Site b: a scale of 1.\d+e\+08 is beyond float16; leave it out with skip, or choose a float format\.$"
    with pytest.raises(HikuiError, match=sentence):
        Rtn().run(program, PassContext())


def test_finished_sites_are_taken_from_what_was_kept(tmp_path: Path) -> None:
    program = two_sites(random(N, K, seed=1), random(N, K, seed=2), ",override{sites=a,format=float16}")
    once = Rtn().run(program, PassContext(resume=Resume(tmp_path))).program
    # The matrices of another program show that nothing is rounded again, scales included.
    other = two_sites(random(N, K, seed=3), random(N, K, seed=4), ",override{sites=a,format=float16}")
    again = Rtn().run(other, PassContext(resume=Resume(tmp_path))).program
    assert all(torch.equal(got, due) for got, due in zip(dense(again), dense(once), strict=True))
    fresh = Rtn().run(other, PassContext()).program
    assert not any(torch.equal(got, due) for got, due in zip(dense(fresh), dense(once), strict=True))
