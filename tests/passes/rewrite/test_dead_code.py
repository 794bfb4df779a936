"""dead_code: what nothing reads goes, with the tensors behind it, and nothing else does."""

import torch
from torch import Tensor
from torch.nn import functional as F

from hikui.lowering.ir.program import FLOAT_WEIGHT, STATISTICS, Program
from hikui.lowering.ir.verifier import verify
from hikui.lowering.pipeline.contract import PassContext
from hikui.passes import DeadCode
from hikui.passes.graph import hikui, insert, sites
from tests.passes.helpers import assert_same, assert_settled, calibration, calls, canonical, lower, program_of, random


def small() -> Program:
    def body(x: Tensor, a: Tensor) -> Tensor:
        return F.linear(x, a)

    return lower(program_of(body, embedding=random(24, 32), a=random(24, 32, seed=1)), "canonicalise,dead_code")


def test_statistics_and_float_weights_go_once_they_are_replaced() -> None:
    program = canonical("llama")
    before = lower(program, "calibrate{gram=true},rtn{bits=8,group=32}", calibration(program))
    measured = [key for key in before.store.keys() if key.startswith("statistics/")]
    floats = [str(node.meta[FLOAT_WEIGHT]) for node in sites(before)]
    assert measured and all(key in before.store for key in floats)
    result = DeadCode().run(before, PassContext())
    after = result.program
    assert result.modified
    gone = set(before.store.keys()) - set(after.store.keys())
    assert gone == {*measured, *floats}
    assert result.notes == [f"0 calls and {len(gone)} weights removed"]
    for node in sites(after):
        assert FLOAT_WEIGHT not in node.meta and STATISTICS not in node.meta
    assert set(after.store.keys()) == {after.weight_of(node) for node in after.weight_nodes()}
    assert all(node.users for node in after.weight_nodes())
    verify(after)
    assert_same(before, after, 0)
    assert_settled(DeadCode(), after)


def test_the_program_before_keeps_what_it_had() -> None:
    program = canonical("llama")
    before = lower(program, "calibrate,rtn", calibration(program))
    keys = before.store.keys()
    DeadCode().run(before, PassContext())
    assert before.store.keys() == keys
    assert all(STATISTICS in node.meta and FLOAT_WEIGHT in node.meta for node in sites(before))


def test_statistics_go_though_no_site_was_packed() -> None:
    program = lower(canonical("llama"), "dead_code")
    before = lower(program, "calibrate", calibration(program))
    after = lower(before, "dead_code")
    assert after.store.keys() == program.store.keys()
    assert not any(STATISTICS in node.meta for node in sites(after))


def test_chains_of_dead_calls_go_and_the_weights_that_only_they_read() -> None:
    program = small()
    work = program.clone()
    (site,) = sites(work)
    x = site.args[0]
    assert isinstance(x, torch.fx.Node)
    extra = work.add_weight("extra", random(32))
    first = insert(work, site, hikui.rms_norm.default, (x, extra, 1e-5), site)
    insert(work, site, torch.ops.aten.relu.default, (first,), site)
    work.recompile()
    result = DeadCode().run(work, PassContext())
    assert result.notes == ["2 calls and 1 weights removed"]
    assert not calls(result.program, hikui.rms_norm.default)
    assert result.program.store.keys() == program.store.keys()
    assert_same(program, result.program, 0)


def test_dead_calls_go_where_every_weight_is_read() -> None:
    work = small().clone()
    (site,) = sites(work)
    insert(work, site, torch.ops.aten.relu.default, (site.args[0],), site)
    site.meta[STATISTICS], site.meta[FLOAT_WEIGHT] = {"mean_square": "gone"}, "gone"
    result = DeadCode().run(work, PassContext())
    assert result.modified and result.notes == ["1 calls and 0 weights removed"]
    (left,) = sites(result.program)
    assert STATISTICS not in left.meta and FLOAT_WEIGHT not in left.meta


def test_a_tensor_that_no_placeholder_names_goes() -> None:
    work = small().clone()
    work.store.put("nowhere", torch.ones(1))
    result = DeadCode().run(work, PassContext())
    assert result.notes == ["0 calls and 1 weights removed"]
    assert "nowhere" not in result.program.store


def test_a_program_without_dead_code_is_handed_back() -> None:
    assert_settled(DeadCode(), small())
