"""qep: the corrected weights are the ridge solution, and whoever rounds a marked site rounds those."""

import pytest
import torch
from torch import Tensor, fx

from hikui.lowering.engine.workers import Workers
from hikui.lowering.errors import HikuiError, UsageError
from hikui.lowering.ir.interpreter import Interpreter
from hikui.lowering.ir.packed import PackedLinear
from hikui.lowering.ir.program import SITE, Program
from hikui.lowering.pipeline.contract import Calibration
from hikui.passes import Qep
from hikui.passes.graph import sites
from hikui.passes.quantise.correction import correct
from tests.passes.helpers import assert_settled, calibration, canonical, check, lower, run


def inputs(program: Program, data: Calibration, site: str) -> Tensor:
    """What a site reads on all texts: float64 [tokens, k]."""
    seen = []

    def observe(node: fx.Node, args: tuple[object, ...], result: object) -> None:
        if node.meta.get(SITE) == site:
            assert isinstance(args[0], Tensor)
            seen.append(args[0].reshape(-1, args[0].shape[-1]).double())

    for chunk in data.chunks:
        interpreter = Interpreter(program, observe=observe)
        interpreter.run(chunk, 0, interpreter.new_caches())
    return torch.cat(seen)


def added(program: Program, data: Calibration, site: str) -> Tensor:
    """What a site's product is added to, on all texts: float64 [tokens, n]."""
    (node,) = (node for node in sites(program) if node.meta[SITE] == site)
    (total,) = node.users
    (other,) = (term for term in total.args if term is not node)
    seen = []

    def observe(at: fx.Node, args: tuple[object, ...], result: object) -> None:
        if at is other:
            assert isinstance(result, Tensor)
            seen.append(result.reshape(-1, result.shape[-1]).double())

    for chunk in data.chunks:
        interpreter = Interpreter(program, observe=observe)
        interpreter.run(chunk, 0, interpreter.new_caches())
    return torch.cat(seen)


def matrix_of(program: Program, site: str) -> Tensor:
    """The matrix of a site that was left in float32: float64 [n, k]."""
    (node,) = (node for node in sites(program) if node.meta[SITE] == site)
    return PackedLinear.of(node).dense(program.store).double()


def test_text() -> None:
    check(
        lower(canonical("llama"), "qep{alpha=0.25,damping=1,skip=down_proj},qep{alpha=0.1,damping=0.5}"),
        """
        // CHECK: aten.linear({{.*}}) : f32[1, T, 48]  // site=model.layers.0.self_attn.q_proj {{.*}} correction=0.25/1
        // CHECK: site=model.layers.0.mlp.up_proj {{.*}} correction=0.25/1
        // CHECK: site=model.layers.0.mlp.down_proj {{.*}} correction=0.1/0.5
        """,
    )
    check(
        lower(canonical("llama"), "qep{alpha=1,residual=0.5,sites=o_proj}"),
        "// CHECK: site=model.layers.0.self_attn.o_proj {{.*}} correction=1.0/0.01/0.5",
    )


@pytest.mark.parametrize("alpha", [0.3, 1.0])
@pytest.mark.parametrize("quantiser", ["rtn{bits=2,group=32", "gptq{bits=2,group=32"])
def test_the_corrected_weights_by_least_squares(alpha: float, quantiser: str) -> None:
    """The last site is left float, so what is rounded there is seen as a float32 matrix."""
    program = canonical("llama")
    data = calibration(program, chunks=6)
    site = "model.layers.1.mlp.down_proj"
    before = lower(program, f"{quantiser},skip=layers.1.mlp.down_proj|lm_head}}", data)
    x, seen = inputs(program, data, site), inputs(before, data, site)
    assert not torch.allclose(x, seen)
    out = lower(
        before, f"qep{{alpha={alpha},damping=0.1,sites=layers.1.mlp.down_proj}},rtn{{bits=32,sites=down_proj}}", data
    )
    weight = program.store.load(f"{site}.weight").double()
    n, k = weight.shape
    got = matrix_of(out, site)
    # Ridge regression of the float model's outputs, towards W, solved as one augmented least-squares problem.
    ridge = 0.1 * seen.square().mean()
    augmented = torch.cat((seen / len(seen) ** 0.5, ridge.sqrt() * torch.eye(k, dtype=torch.float64)))
    target = torch.cat(((x - seen) @ weight.t() / len(seen) ** 0.5, torch.zeros(k, n, dtype=torch.float64)))
    want = weight + alpha * torch.linalg.lstsq(augmented, target, driver="gelsd").solution.t()
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))
    assert float((want - weight).abs().max()) > 1e-3 * float(weight.abs().max())


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_what_writes_into_the_stream_makes_up_for_its_error_by_least_squares(alpha: float) -> None:
    program = canonical("llama")
    data = calibration(program, chunks=6)
    site = "model.layers.1.mlp.down_proj"
    before = lower(program, "rtn{bits=2,group=32,skip=layers.1.mlp.down_proj|lm_head}", data)
    x, seen = inputs(program, data, site), inputs(before, data, site)
    stream, off = (added(each, data, site) for each in (program, before))
    out = lower(
        before,
        f"qep{{alpha={alpha},damping=0.1,residual=0.5,sites=layers.1.mlp.down_proj}},rtn{{bits=32,sites=down_proj}}",
        data,
    )
    weight = program.store.load(f"{site}.weight").double()
    got = matrix_of(out, site)
    ridge = 0.1 * seen.square().mean()
    augmented = torch.cat((seen / len(seen) ** 0.5, ridge.sqrt() * torch.eye(weight.shape[1], dtype=torch.float64)))
    owed = alpha * (x - seen) @ weight.t() + 0.5 * (stream - off)
    target = torch.cat((owed / len(seen) ** 0.5, torch.zeros(weight.shape[::-1], dtype=torch.float64)))
    want = weight + torch.linalg.lstsq(augmented, target, driver="gelsd").solution.t()
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))
    assert float((stream - off).abs().max()) > 1e-2


def test_members_of_a_group_may_have_settings_of_their_own() -> None:
    program = lower(
        canonical("llama"), "qep{alpha=1,damping=0.01,sites=0.*q_proj},qep{alpha=0.5,damping=2,sites=0.*k_proj}"
    )
    nodes = [node for node in sites(program) if "layers.0" in node.meta[SITE] and "correction" in str(node.meta)]
    gram, cross = torch.diag(torch.linspace(1, 3, 48)).double(), 0.1 * torch.eye(48, dtype=torch.float64)
    kept = gram.clone()
    with Workers(1) as workers:
        out = correct(program, nodes, gram, cross, workers)
    assert torch.equal(gram, kept)
    for node, alpha, damping in zip(nodes, (1.0, 0.5), (0.01, 2.0), strict=True):
        weight = program.store.load(f"{node.meta[SITE]}.weight").double()
        want = weight * (1 + alpha * 0.1 / (gram.diagonal() + damping * 2.0))
        assert torch.allclose(out[node.meta[SITE]].double(), want, rtol=1e-6)


def test_the_model_is_nearer_with_it() -> None:
    program = canonical("llama")
    data = calibration(program, chunks=10)
    want = run(program, data.chunks[0])[0]
    errors = [
        float((run(lower(program, f"{qep}rtn{{bits=2,group=32}}", data), data.chunks[0])[0] - want).square().mean())
        for qep in ("", "qep{alpha=1,damping=0.1},")
    ]
    assert errors[1] < errors[0]


def test_settled_and_refused() -> None:
    program = lower(canonical("llama"), "qep")
    assert_settled(Qep(), program)
    with pytest.raises(HikuiError, match="No unpacked site matches 'nothing'; run `qep` before the quantiser"):
        lower(program, "qep{sites=nothing}")
    with pytest.raises(HikuiError, match="It follows real text"):
        lower(program, "rtn")
    wrong = ({"alpha": 1.5}, "between 0 and 1"), ({"damping": 0.0}, "above 0"), ({"residual": 2.0}, "2 of the residual")
    for options, sentence in wrong:
        with pytest.raises(UsageError, match=sentence):
            Qep(**options)  # type: ignore[arg-type]
