"""pack: every float matrix that is left, exactly as it is or as float16 has it."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hikui.lowering.errors import HikuiError, VerificationError
from hikui.lowering.ir.packed import PackedLinear
from hikui.lowering.ir.program import FLOAT_WEIGHT, FORMAT, SITE, Program
from hikui.lowering.pipeline.contract import PassContext
from hikui.passes import Pack
from hikui.passes.graph import hikui, sites
from hikui.passes.quantise.packing import float_linears
from tests.passes.helpers import (
    assert_same,
    assert_settled,
    calibration,
    calls,
    canonical,
    lower,
    program_of,
    random,
    run,
)

N, K = 24, 40


def linear(weight: Tensor) -> Program:
    def body(x: Tensor, a__weight: Tensor) -> Tensor:
        return F.linear(x, a__weight)

    return program_of(body, embedding=random(N, weight.shape[1]), a__weight=weight)


@pytest.mark.parametrize(("name", "dtype"), [("float32", torch.float32), ("float16", torch.float16)])
def test_matrices_are_those_of_the_format(name: str, dtype: torch.dtype) -> None:
    program = canonical("llama")
    result = Pack(name).run(program, PassContext())  # type: ignore[arg-type]
    out = result.program
    assert result.modified and not float_linears(out)
    assert result.notes == [f"{len(sites(program))} matrices packed as {name}"]
    for node in sites(out):
        packed = PackedLinear.of(node)
        floats = program.store.load(node.meta[FLOAT_WEIGHT])
        assert str(packed.format) == node.meta[FORMAT] == name and packed.scale is None
        assert out.store.info(out.weight_of(packed.weight)).dtype == dtype
        assert torch.equal(packed.dense(out.store), floats.to(dtype).float())
    assert float_linears(program), "the program before is as it was"
    Pack().ensures(out)
    assert_settled(Pack(name), out)  # type: ignore[arg-type]


def test_packed_as_float32_nothing_changes() -> None:
    assert_same(canonical("opt"), lower(canonical("opt"), "pack"), 1e-6)


def test_what_is_no_site_is_packed_too() -> None:
    program = linear(random(N, K, seed=1))
    assert not sites(program)
    out = Pack().run(program, PassContext()).program
    (node,) = calls(out, hikui.linear.default)
    assert SITE not in node.meta and FORMAT not in node.meta
    tokens = torch.arange(6)[None]
    got, _ = run(out, tokens, decode=2)
    want = random(N, K)[tokens].double() @ random(N, K, seed=1).double().t()
    assert float((got.double() - want).abs().max()) <= 1e-5 * float(want.abs().max())


def test_the_factors_of_a_branch_are_packed() -> None:
    program = canonical("llama")
    before = lower(program, "calibrate,rtn{group=32},sub_branch{rank=4},dead_code", calibration(program))
    left = len(float_linears(before))
    assert left == 2 * len(sites(before))
    result = Pack("float16").run(before, PassContext())
    assert result.notes == [f"{left} matrices packed as float16"]
    assert {node.meta[FORMAT] for node in sites(result.program)} == {"int4-g32"}, "what was packed stays as it is"
    assert_same(before, result.program, 2e-2)


def test_values_beyond_float16_are_refused_by_the_site() -> None:
    weight = random(N, K, seed=1)
    weight[7, 3] = 65520.0  # the least that float16 rounds to infinity
    for program, name in ((lower(linear(weight), "canonicalise"), "a"), (linear(weight), "a.weight")):
        with pytest.raises(HikuiError, match=rf"^Site {name}: its weights are beyond float16; pack them as float32\.$"):
            Pack("float16").run(program, PassContext())
        Pack("float32").run(program, PassContext())
    weight[7, 3] = 65519.0
    Pack("float16").run(linear(weight), PassContext())


def test_broken_values_are_named() -> None:
    weight = random(N, K, seed=1)
    weight[7, 3] = torch.nan
    with pytest.raises(HikuiError, match="Site a: 1 of 960 values of 'a.weight' are NaN or infinite"):
        Pack().run(lower(linear(weight), "canonicalise"), PassContext())


def test_what_is_left_is_named() -> None:
    with pytest.raises(VerificationError, match=r"^Node linear still multiplies an unpacked matrix\.$"):
        Pack().ensures(linear(random(N, K)))


def test_progress_counts_every_matrix() -> None:
    program, steps = canonical("llama"), []
    Pack().run(program, PassContext(progress=lambda *step: steps.append(step)))
    total = len(float_linears(program))
    assert steps == [("pack", done, total) for done in range(total + 1)]
