"""distil: gradients against differences, the whole against the interpreter, and what a run must leave alike."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from hikui.lowering.engine.resume import Resume
from hikui.lowering.engine.streaming import Stream
from hikui.lowering.errors import HikuiError, UsageError
from hikui.lowering.formats import quantize_activation
from hikui.lowering.ir.interpreter import Interpreter
from hikui.lowering.ir.packed import PackedLinear
from hikui.lowering.ir.printer import to_text
from hikui.lowering.ir.program import SITE, Program
from hikui.lowering.ir.reader import from_text
from hikui.lowering.pipeline.contract import Calibration, PassContext
from hikui.lowering.pipeline.run import Pipeline
from hikui.lowering.pipeline.text import parse_pipeline
from hikui.models.synthetic import FAMILIES
from hikui.passes import PASSES, Distil
from hikui.passes.gradients import chain
from hikui.passes.gradients.chain import Learned, sections
from hikui.passes.quantise.learned.end_to_end import EndToEnd
from hikui.passes.quantise.learned.scaled_product import ScaledProduct
from tests.passes.helpers import calibration, canonical, lower, random

FORMATS = ["sign-g32", "int2-g32", "ternary-g64", "int3-g64", "int4-g64", "nf4-g32", "int8-channel", "mixed"]
ROUND = "rtn{bits=3,group=32}"
HEADLESS = """program small context=16 vocabulary=24 T=1..16
  %e = weight "embed.weight" : f32[24, 32]
  %w = weight "a.weight" : f32[24, 32]
  %tokens = input : i64[1, T]
  %past = input : i64[1]
  %x = aten.embedding(%e, %tokens) : f32[1, T, 32]
  %a = aten.linear(%x, %w) : f32[1, T, 24]  // site=a group=a block=0
  return %a
"""
CROSSED = """program small context=48 vocabulary=24 T=1..48
  %e = weight "embed.weight" : f32[24, 32]
  %f = weight "second.weight" : f32[24, 32]
  %u = weight "a.weight" : f32[32, 32]
  %v = weight "b.weight" : f32[32, 32]
  %w = weight "head.weight" : f32[24, 32]
  %tokens = input : i64[1, T]
  %past = input : i64[1]
  %x = aten.embedding(%e, %tokens) : f32[1, T, 32]
  %g = aten.neg(%x) : f32[1, T, 32]
  %a = aten.linear(%x, %u) : f32[1, T, 32]  // site=a group=a block=0
  %s = aten.silu(%a) : f32[1, T, 32]  // block=0
  %y = aten.embedding(%f, %tokens) : f32[1, T, 32]  // block=1
  %z = aten.mul.Tensor(%s, %y) : f32[1, T, 32]  // block=1
  %b = aten.linear(%z, %v) : f32[1, T, 32]  // site=b group=b block=1
  %c = aten.mul.Tensor(%b, %g) : f32[1, T, 32]  // block=1
  %d = aten.add.Tensor(%c, %g) : f32[1, T, 32]
  %l = aten.linear(%d, %w) : f32[1, T, 24]  // site=head group=head
  return %l
"""
"""A later block looks tokens up, and it and the head read what is before the first block, which itself does not."""
QUICK = "distil{epochs=4,lr=0.01,batch=2}"


def texts(program: Program, count: int = 9) -> Calibration:
    """Texts of one length and a shorter one."""
    *whole, last = calibration(program, count, 24).chunks
    return Calibration((*whole, last[:, :9]), "dice")


def rounded(family: str = "llama", pipeline: str = ROUND) -> Program:
    return lower(canonical(family), pipeline)


def distilled(program: Program, pipeline: str = QUICK, **options: object) -> Program:
    context = PassContext(texts(program), **options)  # type: ignore[arg-type]
    return Pipeline(parse_pipeline(pipeline, PASSES)).run(program, context)


def learned_sites(program: Program) -> list[fx.Node]:
    return Distil().chosen(program)


def packed_site(name: str) -> tuple[Program, fx.Node]:
    """A program with a site of some format, and that site."""
    exact = canonical("llama")
    how = "calibrate,mixed{group=32},rtn" if name == "mixed" else f"rtn{{format={name}}}"
    program = lower(exact, how, texts(exact))
    found = [site for site in learned_sites(program) if str(PackedLinear.of(site).format).startswith(name)]
    return program, found[0]


# ── one site ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("bits", [0, 4, 8])
@pytest.mark.parametrize("name", FORMATS)
def test_a_product_and_its_gradients(name: str, bits: int) -> None:
    program, site = packed_site(name)
    packed = PackedLinear.of(site)
    product = ScaledProduct(program, packed, bits)
    n, k, fmt = packed.rows, packed.columns, packed.format
    matrix = packed.dense(program.store).double()
    assert torch.equal(product.matrix(product.scale).double(), matrix)

    x, outer = random(2, 5, k, seed=3), random(2, 5, n, seed=4)
    read = x.double()
    if bits:
        codes, steps, _ = quantize_activation(x, bits)
        read = codes[..., :k].double() * steps.double().unsqueeze(-1)
    leaf, scale = x.clone().requires_grad_(), product.scale.clone().requires_grad_()
    bias = random(n, seed=5)
    y = product.at(scale)(leaf, bias)
    assert torch.allclose(y.double(), F.linear(read, matrix, bias.double()), rtol=1e-5, atol=1e-5)
    of_x, of_scale = torch.autograd.grad((y * outer).sum(), (leaf, scale))
    assert torch.allclose(of_x.double(), outer.double() @ matrix, rtol=1e-5, atol=1e-5)
    # y is linear in each scale, so its own column sums are the gradient.
    codes = matrix / product.scale.double().repeat_interleave(fmt.group_size(k), 1)[:, :k]
    of_matrix = outer.double().flatten(0, 1).t() @ read.flatten(0, 1)
    terms = F.pad(of_matrix * codes, (0, product.scale.shape[1] * fmt.group_size(k) - k))
    expected = terms.view(n, -1, fmt.group_size(k)).sum(-1)
    assert torch.allclose(of_scale.double(), expected, rtol=1e-4, atol=1e-4)


# ── the whole ───────────────────────────────────────────────────────────────────────────────────────────────────────


def whole(program: Program, text: Tensor) -> tuple[EndToEnd, dict[fx.Node, Tensor], dict[fx.Node, Tensor], Learned]:
    """What is evaluated, its inputs and targets for a text, and the program's own scales and vectors."""
    parts = sections(program, learned_sites(program))
    products = {site: ScaledProduct(program, PackedLinear.of(site), 0) for site in learned_sites(program)}
    held = EndToEnd(program, parts, {text.shape[1]}, {site: product.at for site, product in products.items()})
    found = []
    for span, read, as_float in ((parts.blocks[0], held.inputs, False), (parts.head, held.head_inputs, True)):
        with Stream(program, [text], as_float=as_float) as stream:
            stream.advance(span.nodes[0])
            found.append({node: stream.value(0, node) for node in read})
    scales = {site: product.scale for site, product in products.items()}
    vectors = {vector: program.store.load(program.weight_of(vector)) for vector in held.vectors}
    return held, found[0], found[1], Learned(scales, vectors)


def log_probabilities(program: Program, text: Tensor) -> Tensor:
    interpreter = Interpreter(program)
    return interpreter.run(text, 0, interpreter.new_caches())[0].double().log_softmax(-1)


@pytest.mark.parametrize("family", [*FAMILIES, "crossed"])
def test_the_divergence_is_that_of_the_interpreter(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # A text of several parts for the head, and a remainder.
    monkeypatch.setattr(chain, "_TOKENS", 16)
    exact = from_text(CROSSED, source="crossed", seed=0) if family == "crossed" else canonical(family)
    program = lower(exact, ROUND)
    (text,) = calibration(program, 1, 37).chunks
    wanted, given = log_probabilities(exact, text), log_probabilities(program, text)
    expected = float((wanted.exp() * (wanted - given)).sum())
    held, inputs, targets, now = whole(program, text)
    assert float(held.divergence(inputs, targets, now)) == pytest.approx(expected, rel=1e-3)
    assert float(held.gradients(inputs, targets, now)[0]) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_kept_for_the_way_back_changes_no_bit(family: str) -> None:
    program = rounded(family)
    (text,) = calibration(program, 1, 24).chunks
    held, inputs, targets, now = whole(program, text)
    loss, found = held.gradients(inputs, targets, now)
    held.keep(True)
    again, kept = held.gradients(inputs, targets, now)
    assert float(loss) == float(again)
    for one, two in ((found.sites, kept.sites), (found.vectors, kept.vectors)):
        assert one.keys() == two.keys()
        for node, gradient in one.items():
            other = two[node]
            assert isinstance(gradient, Tensor) and isinstance(other, Tensor) and torch.equal(gradient, other)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_every_scale_and_vector(family: str) -> None:
    program = rounded(family)
    (text,) = calibration(program, 1, 24).chunks
    held, inputs, targets, now = whole(program, text)
    _, found = held.gradients(inputs, targets, now)
    assert found.sites.keys() == now.sites.keys() == set(learned_sites(program))
    assert found.vectors.keys() == now.vectors.keys()
    for kind in (0, 1):
        for node, gradient in found[kind].items():
            value = now[kind][node]
            assert isinstance(value, Tensor) and isinstance(gradient, Tensor)
            assert gradient.shape == value.shape
            # A bias of keys moves all scores of a query alike, and so nothing.
            if float(gradient.norm()) < 1e-4:
                assert "k_proj" in node.name or "query_key_value" in node.name or "attn" in node.name, node.name
                continue
            along = gradient / gradient.norm()
            step = 1e-2 * float(value.norm()) / value.numel() ** 0.5
            ends = []
            for sign in (1, -1):
                changed = {**now[kind], node: value + sign * step * along}
                moved = Learned(changed, now.vectors) if kind == 0 else Learned(now.sites, changed)
                ends.append(float(held.divergence(inputs, targets, moved)))
            # Of second order in the step, and of float32's last bits over it.
            slope = (ends[0] - ends[1]) / (2 * step)
            assert slope == pytest.approx(float(gradient.norm()), rel=5e-2, abs=2e-3), node.name


# ── a run ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", FAMILIES)
def test_it_comes_nearer_to_the_float_model(family: str) -> None:
    exact, before = canonical(family), rounded(family)
    data = Calibration(calibration(exact, 36, 24).chunks[:33])
    after = Pipeline(parse_pipeline("distil{epochs=4,lr=0.005,batch=4}", PASSES)).run(before, PassContext(data))
    fresh = calibration(exact, 36, 24).chunks[33:]

    def divergence(program: Program) -> float:
        total = 0.0
        for text in fresh:
            wanted, given = log_probabilities(exact, text), log_probabilities(program, text)
            total += float((wanted.exp() * (wanted - given)).sum())
        return total

    assert divergence(after) < 0.97 * divergence(before)
    kinds = {node.meta.get(SITE): str(node.target) for node in before.graph.nodes if SITE in node.meta}
    assert kinds == {node.meta.get(SITE): str(node.target) for node in after.graph.nodes if SITE in node.meta}


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_that_are_too_long_are_taken_back_in_part(family: str) -> None:
    exact, before = canonical(family), rounded(family)
    data = Calibration(calibration(exact, 36, 24).chunks[:33])
    result = Distil(epochs=2, lr=0.1, batch=2).run(before, PassContext(data))
    (note,) = result.notes
    found = re.fullmatch(r"KL .* texts: (\S+) nats a token, (\S+) before; (0.25|0.5) of the way that was gone", note)
    assert found is not None, note
    assert float(found[1]) < 0.95 * float(found[2])
    # What is said is what was kept.
    total = tokens = 0.0
    for text in data.chunks[::8]:
        wanted, given = log_probabilities(exact, text), log_probabilities(result.program, text)
        total, tokens = total + float((wanted.exp() * (wanted - given)).sum()), tokens + text.shape[1]
    assert total / tokens == pytest.approx(float(found[1]), rel=5e-3)


def test_text() -> None:
    text = to_text(distilled(rounded()))
    assert '"model.layers.0.mlp.up_proj.weight.int3-g32.scale.distilled" : f16[8, 2, 16]' in text
    assert '"model.layers.0.mlp.up_proj.weight.int3-g32" : u8[8, 6, 16, 4]' in text
    assert '"model.norm.weight.distilled"' in text
    assert '.scale" : f16' not in text.replace('lm_head.weight.int3-g32.scale"', "")


def test_vectors_stay_where_they_are_not_to_be_learned() -> None:
    before = rounded()
    after = distilled(before, "distil{epochs=4,lr=0.01,batch=2,vectors=false,skip=mlp}")
    assert "norm.weight.distilled" not in to_text(after)
    for node in learned_sites(after):
        key = after.weight_of(PackedLinear.of(node).scale)  # type: ignore[arg-type]
        assert key.endswith(".distilled") == ("mlp" not in node.meta[SITE])


def test_nothing_is_changed_where_nothing_is_quantised_or_better() -> None:
    exact = canonical("llama")
    result = Distil().run(exact, PassContext(texts(exact)))
    assert not result.modified and result.program is exact
    before = rounded()
    result = Distil(lr=100.0).run(before, PassContext(texts(before)))
    assert not result.modified and result.program is before
    assert "nothing was learned that is better" in result.notes[0]


@pytest.mark.parametrize("pipeline", ["guide,calibrate{gram=true}", f"{ROUND},{QUICK}"])
def test_passes_take_what_later_blocks_read_from_before_the_first(pipeline: str) -> None:
    program, said = from_text(CROSSED, source="crossed", seed=0), list[str]()
    context = PassContext(texts(program), warn=said.append)
    found = Pipeline(parse_pipeline(pipeline, PASSES)).run(program, context)
    assert to_text(found) != to_text(program)
    assert not said


def test_a_single_window_teaches_nothing() -> None:
    before, said = rounded(), list[str]()
    result = Distil().run(before, PassContext(Calibration(texts(before).chunks[:1]), warn=said.append))
    assert not result.modified and result.program is before
    (only,) = said
    assert only.startswith("The calibration text gives one window, and distil learns from some")


def test_logits_that_a_block_makes_teach_nothing() -> None:
    headless, said = lower(from_text(HEADLESS, source="headless", seed=0), "rtn{group=32}"), list[str]()
    (step,) = parse_pipeline("distil", PASSES)
    step.requires(headless)
    result = step.run(headless, PassContext(calibration(headless), warn=said.append))
    assert not result.modified and result.program is headless
    (only,) = said
    assert only.startswith(
        "The logits are made inside of block 0, and distil takes a model with a head behind its blocks"
    )


def test_workers_do_not_matter_and_runs_are_alike() -> None:
    before = rounded()
    one, two = distilled(before, workers=1), distilled(before, workers=2)
    assert to_text(one) == to_text(two)
    for key in one.store.keys():
        assert torch.equal(one.store.load(key), two.store.load(key)), key


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    class KilledError(Exception):
        pass

    def until(last: int) -> object:
        def progress(name: str, done: int, total: int) -> None:
            if done == last:
                raise KilledError

        return progress

    before, pipeline = rounded(), "distil{epochs=6,lr=0.01,batch=2}"
    whole_run = distilled(before, pipeline)
    resume = Resume(tmp_path)
    with pytest.raises(KilledError):
        distilled(before, pipeline, resume=resume, progress=until(20))
    seen: list[int] = []
    again = distilled(before, pipeline, resume=resume, progress=lambda name, done, total: seen.append(done))
    assert min(seen) == 16
    assert to_text(whole_run) == to_text(again)
    for key in whole_run.store.keys():
        assert torch.equal(whole_run.store.load(key), again.store.load(key)), key


def test_what_later_passes_make_of_it() -> None:
    before = rounded()
    after = distilled(before, f"{QUICK},pack{{format=float32}},activation{{bits=8}},fuse,dead_code")
    (text,) = calibration(after, 1, 24).chunks
    learned, lowered = log_probabilities(distilled(before), text), log_probabilities(after, text)
    # Int8 activations alone move the logits.
    assert float((lowered - learned).norm() / learned.norm()) < 0.02


def test_rounded_activations_are_seen() -> None:
    before = rounded()
    notes = Distil(activation_bits=4).run(before, PassContext(texts(before))).notes
    exact = Distil().run(before, PassContext(texts(before))).notes
    assert notes != exact


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"epochs": 0}, "epochs=0; give 1 or more"),
        ({"batch": 0}, "batch=0; give 1 or more"),
        ({"lr": 0.0}, "lr is above 0"),
        ({"activation_bits": 5}, "give 0, 4 or 8"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        Distil(**options)  # type: ignore[arg-type]


def test_refusals() -> None:
    before = rounded()
    with pytest.raises(
        HikuiError, match="It learns from text and none was given; give some with --calibration TEXT_FILE"
    ):
        Distil().run(before, PassContext())
    with pytest.raises(HikuiError, match=r"of memory are there; use a smaller batch, fewer or shorter"):
        Distil().run(before, PassContext(texts(before), memory=1000))
    with pytest.raises(HikuiError, match="there is no float model to learn from"):
        Distil().requires(lower(before, "dead_code"))
    partly = lower(canonical("llama"), "rtn{sites=mlp},activation,rtn")
    with pytest.raises(HikuiError, match="which gradients cannot pass; run distil before"):
        Distil().requires(partly)


def test_infinite_numbers_are_refused() -> None:
    before = rounded().clone()
    key = next(key for key in before.store.keys() if key.endswith("norm.weight"))
    before.store.put(key, before.store.load(key) * float("inf"))
    with pytest.raises(
        HikuiError, match="The quantised model gives NaN or infinite values on the calibration text, so"
    ):
        Distil().run(before, PassContext(texts(before)))
