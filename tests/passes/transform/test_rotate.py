"""rotate: orthogonal matrices, the residual stream that they turn, and what they do to outliers."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm

from hikui.lowering.errors import HikuiError, UsageError
from hikui.lowering.ir import sizes
from hikui.lowering.ir.interpreter import Interpreter
from hikui.lowering.ir.program import BLOCK, SITE, STATISTICS, Program
from hikui.lowering.pipeline.contract import PassContext
from hikui.passes import Rotate
from hikui.passes.graph import aten, sites, weight_of
from hikui.passes.patterns.match import NoMatch
from hikui.passes.patterns.residual import match_residual
from hikui.passes.transform.hadamard import Rotation, random_hadamard, random_orthogonal
from tests.passes.helpers import (
    SMALL_VOCABULARY,
    assert_settled,
    calibration,
    calls,
    canonical,
    check,
    lower,
    program_of,
    random,
    run,
)

from .test_smooth import assert_equal_logits


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_orthogonal(rotation: Rotation) -> None:
    matrix, one = rotation.matrix(), torch.eye(rotation.size, dtype=torch.float64)
    assert float((matrix @ matrix.t() - one).abs().max()) <= 1e-12
    assert float((matrix.t() @ matrix - one).abs().max()) <= 1e-12


@pytest.mark.parametrize("n", [1, 2, 8, 12, 20, 24, 28, 36, 44, 48, 56, 60, 64, 104, 256, 768])
def test_hadamard_matrices_have_entries_of_one_size(n: int) -> None:
    rotation, known = random_hadamard(n, generator())
    assert known
    assert_orthogonal(rotation)
    torch.testing.assert_close(rotation.matrix().abs() * n**0.5, torch.ones(n, n, dtype=torch.float64))


@pytest.mark.parametrize("n", [3, 6, 14, 100, 116, 172])
def test_other_sizes_get_an_orthogonal_factor(n: int) -> None:
    rotation, known = random_hadamard(n, generator())
    assert not known
    assert_orthogonal(rotation)


def test_applying_is_multiplying_and_seeds_differ() -> None:
    x = random(5, 3, 48, seed=1).double()
    makers: list[Callable[[int], Rotation]] = [
        lambda seed: random_hadamard(48, generator(seed))[0],
        lambda seed: random_orthogonal(48, generator(seed)),
    ]
    for make in makers:
        one, same, other = make(0), make(0), make(1)
        assert_orthogonal(one)
        torch.testing.assert_close(one.apply(x), x @ one.matrix(), rtol=0, atol=1e-12)
        assert torch.equal(one.matrix(), same.matrix())
        assert not torch.allclose(one.matrix(), other.matrix())


def test_text() -> None:
    check(
        lower(canonical("qwen2"), "rotate"),
        """
        // CHECK-NOT: "model.embed_tokens.weight"
        // CHECK: %w_model_layers_0_self_attn_q_proj_bias = weight
        // CHECK: %[[E:.*]] = weight "model.embed_tokens.weight.rotated" : f32[131, 64]
        // CHECK: %[[Q:.*]] = weight "model.layers.0.self_attn.q_proj.weight.rotated" : f32[64, 64]
        // CHECK: %[[H:.*]] = weight "model.embed_tokens.weight.rotated#2" : f32[131, 64]
        // CHECK: %[[N:.*]] = weight "model.layers.0.input_layernorm.weight.rotated" : f32[64]
        // CHECK: aten.embedding(%[[E]], %tokens, 1) : f32[1, T, 64]
        // CHECK: %[[X:.*]] = aten.mul.Tensor(%[[N]], %{{.*}}) : f32[1, T, 64]
        // CHECK: aten.linear(%[[X]], %[[Q]], %w_model_layers_0_self_attn_q_proj_bias) : f32[1, T, 64]
        // CHECK: aten.linear(%{{.*}}, %[[H]]) : f32[1, T, 131]  // site=lm_head
        """,
    )


def test_text_of_ends() -> None:
    """What is outside of blocks stays: the table, the last norm and the head, which share what they shared."""
    check(
        lower(canonical("qwen2"), "rotate{ends=float16}"),
        """
        // CHECK-DAG: %[[E:.*]] = weight "model.embed_tokens.weight" : f32[131, 64]
        // CHECK-DAG: %[[I:.*]] = weight "rotation.in.weight" : f32[64, 64]
        // CHECK-DAG: %[[O:.*]] = weight "rotation.out.weight" : f32[64, 64]
        // CHECK-DAG: %[[N:.*]] = weight "model.norm.weight" : f32[64]
        // CHECK: %[[R:.*]] = aten.embedding(%[[E]], %tokens, 1) : f32[1, T, 64]
        // CHECK: aten.linear(%[[R]], %[[I]]) : f32[1, T, 64]  // site=rotation.in group=rotation.in format=float16
        // CHECK: %[[X:.*]] = aten.linear(%[[S:[a-z0-9_]+]], %[[O]]) : f32[1, T, 64]  // site=rotation.out
        // CHECK-NEXT: aten.pow.Tensor_Scalar(%[[X]], 2)
        // CHECK-NOT: %[[S]]
        // CHECK: aten.linear(%{{.*}}, %[[E]]) : f32[1, T, 131]  // site=lm_head
        """,
    )


def test_ends_leave_the_stream_between_them_rotated_and_no_table_twice() -> None:
    program = canonical("qwen2")
    plain, ends = lower(program, "rotate"), lower(program, "rotate{ends=int8-channel}")
    for node in sites(ends):
        name = node.meta[SITE]
        if name == "lm_head" or name.startswith("rotation."):
            continue
        (same,) = (other for other in sites(plain) if other.meta[SITE] == name)
        assert torch.equal(
            ends.store.load(ends.weight_of(weight_of(node))), plain.store.load(plain.weight_of(weight_of(same)))
        )
    packed = lower(ends, "rtn{bits=8,group=0},pack,embedding,activation,fuse,dead_code")
    formats = {site.name: site.format for site in sizes.measure(packed).sites}
    assert formats["rotation.in"] == formats["rotation.out"] == formats["lm_head"] == "int8-channel"
    alone = lower(program, "rtn{bits=8,group=0},pack,embedding,activation,fuse,dead_code")
    # Two matrices of the stream's width with a scale a row, and what ones in the place of norms' weights do not change.
    assert sizes.measure(packed).total_bytes - sizes.measure(alone).total_bytes == 2 * 64 * (64 + 2)
    with pytest.raises(UsageError, match="rotate cannot have its ends in mixed-g32-c32"):
        Rotate(ends="mixed-g32-c32")
    with pytest.raises(UsageError, match="Format 'flaot' is not known"):
        Rotate(ends="flaot")


@pytest.mark.parametrize(
    "options", ["", "{kind=orthogonal,seed=3}", "{heads=true}", "{ends=float16}", "{ends=float16,heads=true,seed=3}"]
)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_logits_stay_and_a_second_run_does_nothing(family: str, options: str) -> None:
    program = canonical(family)
    out = lower(program, f"rotate{options}")
    assert_equal_logits(program, out)
    keys, rotated = (run(work)[1][::2] for work in (program, out))
    assert all(torch.allclose(one, two, atol=1e-4) for one, two in zip(keys, rotated, strict=True))
    heads = "heads" in options
    values, turned = (run(work)[1][1] for work in (program, out))
    assert torch.allclose(values, turned, atol=1e-4) != heads
    torch.testing.assert_close(values.norm(dim=-1), turned.norm(dim=-1), rtol=1e-4, atol=1e-5)
    assert_settled(Rotate(heads=heads), out)
    assert_settled(Rotate(kind="orthogonal", seed=7, heads=heads), out)


def test_heads_can_follow_later() -> None:
    program = canonical("llama")
    stream = lower(program, "rotate")
    both = lower(stream, "rotate{heads=true}")
    assert_equal_logits(program, both)
    key = "model.layers.0.mlp.gate_proj.weight.rotated"
    assert torch.equal(both.store.load(key), stream.store.load(key))


def test_the_stream_is_what_it_was_times_the_matrix() -> None:
    program = canonical("qwen2")
    out = lower(program, "rotate{seed=5}")
    matrix = random_hadamard(64, generator(5))[0].matrix()
    tokens = torch.arange(20)[None]
    seen: list[dict[str, Tensor]] = []
    for work in (program, out):
        values: dict[str, Tensor] = {}

        def observe(node: torch.fx.Node, _: object, result: object, values: dict[str, Tensor] = values) -> None:
            if isinstance(result, Tensor) and node.meta.get("val") is not None:
                values[node.name] = result.double()

        interpreter = Interpreter(work, observe=observe)
        interpreter.run(tokens, 0, interpreter.new_caches())
        seen.append(values)
    for name in ("embedding", "linear_3", "add_4", "linear_6", "add_6"):
        before, after = (values[name] for values in seen)
        torch.testing.assert_close(after, before @ matrix, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "reads"), [("opt", "add_3"), ("bloom", "embedding"), ("gpt2", "add_1")])
def test_layer_norms_are_refused_by_name(family: str, reads: str) -> None:
    match = rf"layer_norm \(aten.layer_norm.default\) reads the residual stream at {reads}"
    with pytest.raises(HikuiError, match=match):
        lower(canonical(family), "rotate")
    said: list[str] = []
    program = canonical(family)
    result = Rotate(heads=True, ends="float16", required=False).run(program, PassContext(warn=said.append))
    assert result.program is program and not result.modified
    assert len(said) == 1 and said[0].startswith("The residual stream stays as it is, for it cannot be rotated: ")
    assert re.search(match, said[0])


def test_a_norm_that_is_read_in_a_block_and_outside_has_no_end() -> None:
    program = canonical("llama").clone()
    sites(program)[0].meta.pop(BLOCK)
    match = r"The residual stream cannot be rotated back: mul\w* is read inside of a block and outside; leave out"
    with pytest.raises(HikuiError, match=match):
        Rotate(ends="float16").run(program, PassContext())
    assert Rotate().run(program, PassContext()).modified


NORM, GAIN = random(40, seed=1), random(40, seed=2)


def stream_of(change: str) -> Program:
    """A small model whose residual stream is whole, but for one change."""

    def body(x: Tensor, n__weight: Tensor, a__weight: Tensor, a__bias: Tensor, head__weight: Tensor) -> Tensor:
        h = linear(rms_norm(x, (40,), n__weight, 1e-5), a__weight, a__bias)
        y = x * 0.5 + h * (torch.relu(x) if change == "relu" else 2.0)
        if change == "slice":
            y = y + x[..., :1]
        out = linear(rms_norm(y, (40,), n__weight, 1e-5), head__weight)
        if change == "norm":
            out = out + rms_norm(y, (40,), n__weight, 1e-5).mean()
        return out + y.sum() if change == "sum" else out

    weights = {"n__weight": NORM, "a__weight": random(40, 40, seed=3), "a__bias": GAIN}
    head = random(SMALL_VOCABULARY, 40, seed=4)
    program = program_of(body, embedding=random(SMALL_VOCABULARY, 40), **weights, head__weight=head)
    # What the helper adds to the embedding, for `past` to be read, is no part of such a model.
    (looked_up,) = calls(program, aten.embedding.default)
    (beside,) = looked_up.users
    beside.replace_all_uses_with(looked_up)
    return lower(program, "canonicalise")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("relu", "relu (aten.relu.default) reads the residual stream"),
        ("slice", "reads the residual stream"),
        ("norm", "is no float product"),
        ("sum", "sum_1 (aten.sum.default) reads the residual stream"),
    ],
)
def test_what_breaks_the_stream_is_named(change: str, why: str) -> None:
    found = match_residual(stream_of(change).graph)
    assert isinstance(found, NoMatch) and why in found.reason


def test_a_shared_norm_and_plain_factors_are_no_hindrance() -> None:
    program = stream_of("")
    found = match_residual(program.graph)
    assert not isinstance(found, NoMatch)
    assert (len(found.writers), len(found.norms), len(found.readers)) == (1, 2, 2)
    out = lower(program, "rotate")
    assert_equal_logits(program, out)
    assert [key for key in out.store.keys() if key.startswith("a.bias")] == ["a.bias.rotated"]
    assert_settled(Rotate(), out)


def test_packed_and_unnamed_programs_are_refused() -> None:
    with pytest.raises(HikuiError, match=r"linear_default.* is no float product; rotate takes unquantised models"):
        lower(canonical("llama"), "rtn,rotate")
    with pytest.raises(HikuiError, match="run `canonicalise` first"):
        lower(program_of(lambda x: x * 2, embedding=random(SMALL_VOCABULARY, 40)), "rotate")


def test_statistics_are_dropped_and_what_needs_them_says_so() -> None:
    program = lower(canonical("llama"), "calibrate{gram=true}", calibration(canonical("llama")))
    result = Rotate().run(program, PassContext())
    assert result.notes[-1] == "statistics of 22 sites no longer hold; run `calibrate` after this"
    assert not [key for key in result.program.store.keys() if key.startswith("statistics/")]
    assert all(STATISTICS not in node.meta for node in sites(result.program))
    assert STATISTICS in sites(program)[0].meta
    with pytest.raises(HikuiError, match="run `calibrate` first"):
        lower(result.program, "smooth")
    again = lower(program, "rotate,calibrate,smooth,rtn{bits=8}", calibration(program))
    assert float((run(again)[0] - run(program)[0]).norm() / run(program)[0].norm()) < 0.05


def test_planted_outliers_are_spread() -> None:
    program = canonical("llama").clone()
    for node in sites(program):
        key = program.weight_of(weight_of(node))
        weight = program.store.load(key).clone()
        if weight.shape[1] == 48 and not node.meta[SITE].endswith("o_proj"):
            weight[:, 11] *= 20.0
            program.store.put(key, weight)
    out = lower(program, "rotate")

    def shape(work: Program) -> tuple[float, float]:
        kurtosis, peak = [], []
        for node in sites(work):
            weight = work.store.load(work.weight_of(weight_of(node))).double()
            if weight.shape[1] == 48 and not node.meta[SITE].endswith("o_proj"):
                kurtosis.append(float(weight.pow(4).mean() / weight.pow(2).mean() ** 2))
                peak.append(float((weight.abs().amax(1) / weight.pow(2).mean(1).sqrt()).mean()))
        return max(kurtosis), max(peak)

    before, after = shape(program), shape(out)
    assert before[0] > 30 and after[0] < 6
    assert after[1] < 0.6 * before[1]
    assert_equal_logits(program, out)
    errors = [(run(lower(work, "rtn{bits=4,group=0}"))[0] - run(program)[0]).norm() for work in (program, out)]
    assert errors[1] < 0.7 * errors[0]


def test_parts_give_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = lower(canonical("llama"), "rotate{heads=true}")
    monkeypatch.setattr("hikui.passes.transform.rotate._PART", 48 * 5)
    monkeypatch.setattr("hikui.passes.matrices.PART", 48 * 7)
    parts = lower(canonical("llama"), "rotate{heads=true}")
    assert parts.store.keys() == whole.store.keys()
    for key in whole.store.keys():
        torch.testing.assert_close(parts.store.load(key), whole.store.load(key), rtol=1e-6, atol=1e-7)
