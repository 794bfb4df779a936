"""smooth and the folding below it: factors move, the program computes what it did."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from hikui.lowering.errors import HikuiError, UsageError
from hikui.lowering.ir.interpreter import Interpreter
from hikui.lowering.ir.program import SENSITIVITY, SITE, STATISTICS, Program
from hikui.lowering.pipeline.contract import Calibration, PassContext
from hikui.passes import Smooth
from hikui.passes.graph import groups, sites, weight_of
from hikui.passes.patterns.match import NoMatch
from hikui.passes.transform.folding import find_fold
from tests.passes.helpers import (
    SMALL_VOCABULARY,
    assert_settled,
    calibration,
    canonical,
    check,
    lower,
    program_of,
    random,
    run,
)

FAMILIES = ["llama", "qwen2", "opt", "bloom", "gpt2"]


@cache
def measured(family: str) -> Program:
    program = canonical(family)
    return lower(program, "calibrate{gram=true}", calibration(program, 8, 40))


def assert_equal_logits(one: Program, two: Program, tolerance: float = 1e-5) -> None:
    """Value caches hold values over their factors, so only logits can be compared."""
    a, b = run(one)[0], run(two)[0]
    assert float((a - b).abs().max()) <= tolerance * float(a.abs().max())


def inputs(program: Program, group: str, data: Calibration) -> Tensor:
    """What a group reads on the calibration text: float64 [tokens, k]."""
    (first, *_) = groups(sites(program))[group]
    seen: list[Tensor] = []

    def observe(node: object, args: tuple[object, ...], _: object) -> None:
        if node is first:
            assert isinstance(args[0], Tensor)
            seen.append(args[0].flatten(0, -2).double())

    interpreter = Interpreter(program, observe=observe)
    for chunk in data.chunks:
        interpreter.run(chunk, 0, interpreter.new_caches())
    return torch.cat(seen)


def weights(program: Program, group: str) -> list[Tensor]:
    return [program.store.load(program.weight_of(weight_of(node))).double() for node in groups(sites(program))[group]]


def test_text() -> None:
    out = lower(measured("llama"), "smooth{sites=layers.0.(self_attn|mlp.down)}")
    check(
        out,
        """
        // CHECK-NOT: "model.layers.0.self_attn.q_proj.weight"
        // CHECK: %w_model_layers_0_input_layernorm_weight_smooth = weight
        // CHECK-SAME: "model.layers.0.input_layernorm.weight.smooth" : f32[48]
        // CHECK: "model.layers.0.self_attn.q_proj.weight.smooth" : f32[48, 48]
        // CHECK: %[[X:.*]] = aten.mul.Tensor(%w_model_layers_0_input_layernorm_weight_smooth, %{{.*}}) : f32[1, T, 48]
        // CHECK: aten.linear(%[[X]], %w_model_layers_0_self_attn_q_proj_weight_smooth) : f32[1, T, 48]
        // CHECK: aten.linear(%{{.*}}, %w_model_layers_0_mlp_gate_proj_weight) : f32[1, T, 116]
        // CHECK: aten.linear(%{{.*}}, %w_model_layers_0_mlp_up_proj_weight_smooth) : f32[1, T, 116]
        // CHECK: aten.linear(%{{.*}}, %w_model_layers_1_self_attn_q_proj_weight)
        """,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_stay_and_a_second_run_does_nothing(family: str) -> None:
    program = measured(family)
    out = lower(program, "smooth{alpha=0.8}")
    assert_equal_logits(program, out)
    assert_settled(Smooth(alpha=0.8), out)
    assert_settled(Smooth(alpha=0.1), out)


@pytest.mark.parametrize(
    ("group", "ties"),
    [
        ("model.layers.1.self_attn.q_proj+k_proj+v_proj", None),
        ("model.layers.1.mlp.down_proj", None),
        # Six query heads of eight share two KV heads.
        ("model.layers.1.self_attn.o_proj", torch.tensor([8 * (h // 3) + d for h in range(6) for d in range(8)])),
    ],
)
def test_the_factors_are_the_formula(group: str, ties: Tensor | None) -> None:
    program, data = measured("llama"), calibration(canonical("llama"), 8, 40)
    out = lower(program, "smooth{alpha=0.6}")
    x, matrices = inputs(program, group, data), weights(program, group)
    largest, heaviest = x.abs().amax(0), torch.cat(matrices).abs().amax(0)
    if ties is not None:
        both = [torch.stack([values[ties == c].amax() for c in range(16)])[ties] for values in (largest, heaviest)]
        largest, heaviest = both
    factor = largest**0.6 / heaviest**0.4
    for before, after in zip(matrices, weights(out, group), strict=True):
        # The v rows of the first group are divided afterwards, when o's turn comes.
        rows = slice(None) if before.shape[0] != 16 or ties is not None else slice(0, 0)
        torch.testing.assert_close(after[rows], (before * factor)[rows], rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(inputs(out, group, data), x / factor, rtol=1e-4, atol=1e-5 * float((x / factor).max()))


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_statistics_are_those_of_the_new_activations(family: str) -> None:
    out = lower(measured(family), "smooth")
    fresh = lower(out, "calibrate{gram=true}", calibration(canonical(family), 8, 40))
    for old, new in zip(sites(out), sites(fresh), strict=True):
        assert set(old.meta[STATISTICS]) == {"mean_square", "mean_abs", "max_abs", "tokens", "gram", "sample"}
        for kind, key in old.meta[STATISTICS].items():
            one, two = out.store.load(key).double(), fresh.store.load(new.meta[STATISTICS][kind]).double()
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4 * float(two.abs().max()))


def test_the_given_program_and_shared_weights_stay() -> None:
    program = measured("qwen2")
    before = {key: program.store.load(key).clone() for key in program.store.keys()}
    out = lower(program, "smooth")
    assert all(torch.equal(program.store.load(key), tensor) for key, tensor in before.items())
    key = "model.embed_tokens.weight"
    assert torch.equal(out.store.load(key), before[key])
    (head,) = [node for node in sites(out) if node.meta[SITE] == "lm_head"]
    assert out.weight_of(weight_of(head)) == f"{key}.smooth"


def test_what_is_left_alone_is_said() -> None:
    result = Smooth().run(measured("gpt2"), PassContext())
    left = [note for note in result.notes if "left alone" in note]
    assert len(left) == 2 and all("mlp.c_proj: left alone" in note and "also read by" in note for note in left)
    some = Smooth(sites="q_proj|down").run(measured("llama"), PassContext())
    assert "model.layers.0.self_attn.q_proj+k_proj+v_proj: left alone" in some.notes[0]
    assert "k_proj is not among the chosen ones" in some.notes[0]
    nothing = Smooth(sites="q_proj").run(measured("llama"), PassContext())
    assert not nothing.modified


NORM, A = random(40, seed=1), random(70, 40, seed=2)
SHAPES = {"half": 35}

BODIES: dict[str, tuple[Callable[..., Tensor], str | None]] = {
    "relu": (lambda x, n, a, b: linear(torch.relu(linear(x * n, a)), b), None),
    "factor of a token": (lambda x, n, a, b: linear((x * n).mean(-1, True) * linear(x * n, a), b), None),
    "half": (lambda x, n, a, b: linear(linear(x * n, a).view(1, -1, 2, 35)[:, :, 1] / 3.0, b), None),
    "silu": (
        lambda x, n, a, b: linear(silu(linear(x * n, a)), b),
        "silu (aten.silu.default) passes",
    ),
    "square": (
        lambda x, n, a, b: linear((y := linear(x * n, a)) * y, b),
        "which it comes from, is also read by mul",
    ),
    "bypass": (lambda x, n, a, b: linear(y := torch.relu(linear(x * n, a)), b) + y.mean(), "relu is also read by mean"),
    "other half": (
        lambda x, n, a, b: linear((y := linear(x * n, a)), b) + y.view(1, -1, 2, 35)[:, :, 1].mean(),
        "linear is also read by view",
    ),
    "doubled": (
        lambda x, n, a, b: linear(torch.cumsum(linear(x * n, a), -1), b),
        "cumsum (aten.cumsum.default) passes no factor on",
    ),
}


@pytest.mark.parametrize("name", BODIES)
def test_which_producers_take_factors(name: str) -> None:
    body, why = BODIES[name]

    def named(x: Tensor, n: Tensor, a__weight: Tensor, b__weight: Tensor) -> Tensor:
        return body(x, n, a__weight, b__weight)

    b = random(SMALL_VOCABULARY, SHAPES.get(name, 70), seed=3)
    given = {"embedding": random(SMALL_VOCABULARY, 40), "n": NORM, "a__weight": A, "b__weight": b}
    program = lower(program_of(named, **given), "canonicalise")
    found = find_fold(program, groups(sites(program))["b"])
    if why is not None:
        assert isinstance(found, NoMatch) and why in found.reason
        return
    assert not isinstance(found, NoMatch)
    assert found.channels.tolist() == list(range(70 - SHAPES.get(name, 70), 70))
    data = Calibration(tuple(torch.arange(start, start + 8)[None] for start in range(8)))
    assert_equal_logits(program, lower(lower(program, "calibrate", data), "smooth"))


def test_outliers_of_activations_shrink() -> None:
    program = canonical("llama").clone()
    key = "model.layers.0.input_layernorm.weight"
    norm = program.store.load(key).clone()
    norm[5] *= 100.0
    program.store.put(key, norm)
    program = lower(program, "calibrate", calibration(program, 8, 40))
    out = lower(program, "smooth")

    def spread(work: Program) -> float:
        (node, *_) = groups(sites(work))["model.layers.0.self_attn.q_proj+k_proj+v_proj"]
        largest = work.store.load(node.meta[STATISTICS]["max_abs"])
        return float(largest.max() / largest.median())

    assert spread(program) > 50 > 15 > spread(out)


def test_sensitivities_are_forgotten() -> None:
    program = lower(measured("llama"), "sensitivity")
    out = lower(program, "smooth{sites=layers.0.mlp.down_proj}")
    lost = {node.meta[SITE] for node in sites(out) if SENSITIVITY not in node.meta}
    assert lost == {"model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"}


def test_what_is_missing() -> None:
    with pytest.raises(HikuiError, match=r"has no statistics of the kind 'max_abs'; run `calibrate` first"):
        lower(canonical("llama"), "smooth")
    with pytest.raises(HikuiError, match="run it before the sites are quantised"):
        lower(canonical("llama"), "rtn,smooth")
    with pytest.raises(UsageError, match=r"alpha=1\.5; it lies between 0 and 1"):
        Smooth(alpha=1.5)
    with pytest.raises(UsageError, match="not a regular expression"):
        Smooth(sites="[")
