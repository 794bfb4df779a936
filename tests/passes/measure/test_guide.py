"""guide: token weights against the model's own gradients, and what sums make of them."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from hikui.lowering.engine.resume import Resume
from hikui.lowering.errors import HikuiError, UsageError, VerificationError
from hikui.lowering.ir.interpreter import Interpreter
from hikui.lowering.ir.printer import to_text
from hikui.lowering.ir.program import BLOCK, GROUP, SITE, STATISTICS, Program
from hikui.lowering.ir.reader import from_text
from hikui.lowering.pipeline.contract import Calibration, PassContext
from hikui.lowering.pipeline.run import Pipeline
from hikui.lowering.pipeline.text import parse_pipeline
from hikui.models.synthetic import FAMILIES, tiny_model
from hikui.passes import PASSES, Awq, Calibrate, Gptq, Guide, Sensitivity
from hikui.passes.gradients import chain
from hikui.passes.graph import float_sites, groups
from hikui.passes.measure import guide
from hikui.passes.measure.evidence import Sample, weights_of_sample
from hikui.passes.transform import awq
from tests.passes.helpers import assert_settled, calibration, canonical, lower
from tests.passes.quantise.test_distil import HEADLESS


def weights(program: Program) -> dict[str, Tensor]:
    """By the first site of each group."""
    found = {}
    for node in float_sites(program):
        if BLOCK in node.meta:
            found[node.meta[SITE]] = program.store.load(node.meta[STATISTICS]["token_weight"])
    return found


def squared_gradients(family: str, texts: tuple[Tensor, ...], seed: int) -> dict[str, Tensor]:
    """Of each linear module's output, summed over its width: float64 [tokens of all texts], by torch on the model."""
    model, found = tiny_model(family), dict[str, list[Tensor]]()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for number, text in enumerate(texts):
        outputs: dict[str, Tensor] = {}
        handles = []
        for name, module in model.named_modules():
            if getattr(module, "weight", None) is not None and module.weight.dim() == 2:

                def keep(
                    _: object, __: object, out: Tensor, name: str = name, outputs: dict[str, Tensor] = outputs
                ) -> Tensor:
                    outputs[name] = out if out.requires_grad else out.requires_grad_()
                    return out

                handles.append(module.register_forward_hook(keep))
        said = model(text).logits[0].log_softmax(-1)
        generator = torch.Generator().manual_seed(seed * (1 << 20) + number)
        labels = torch.multinomial(said.detach().exp(), 1, generator=generator)
        loss = -said.gather(-1, labels).sum()
        names = list(outputs)
        gradients = torch.autograd.grad(loss, [outputs[name] for name in names], allow_unused=True)
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is not None:
                found.setdefault(name, []).append(gradient.double().square().sum(-1).flatten())
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


@pytest.mark.parametrize("power", [1.0, 0.5])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_the_models_squared_gradients(family: str, power: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guide, "_STORED", torch.float32)
    program = canonical(family)
    data = Calibration((*calibration(program, 3, 24).chunks, torch.tensor([[1, 2, 3]])))
    out = lower(program, f"guide{{power={power},seed=2}}", data)
    squares = squared_gradients(family, data.chunks, seed=2)
    found = weights(out)
    for members in groups([node for node in float_sites(out) if BLOCK in node.meta]).values():
        names = [node.meta[SITE] for node in members]
        own = torch.stack([squares[name] for name in names]).sum(0)
        want = (own / own.mean()) ** power
        for name in names:
            got = found[name]
            assert got.dtype == torch.float32 and got.shape == (75,)
            assert float(got.double().mean()) == pytest.approx(1, rel=1e-5)
            torch.testing.assert_close(got.double(), want / want.mean(), rtol=1e-3, atol=1e-5)


def test_two_bytes_a_weight_tell_which_tokens_count(monkeypatch: pytest.MonkeyPatch) -> None:
    program = canonical("qwen2")
    coarse = weights(lower(program, "guide", calibration(program, 3, 24)))
    monkeypatch.setattr(guide, "_STORED", torch.float32)
    for name, held in weights(lower(program, "guide", calibration(program, 3, 24))).items():
        assert float((coarse[name] - held).norm() / held.norm()) < 0.1


def test_how_many_tokens_the_head_looks_at_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    program = canonical("llama")
    whole = weights(lower(program, "guide", calibration(program, 3, 24)))
    monkeypatch.setattr(chain, "_TOKENS", 7)
    for name, held in weights(lower(program, "guide", calibration(program, 3, 24))).items():
        torch.testing.assert_close(held, whole[name], rtol=1e-4, atol=1e-5)


def test_sums_of_outer_products_are_weighed() -> None:
    program = canonical("llama")
    data = calibration(program, 3, 24)
    out = lower(program, "guide{power=1},calibrate{gram=true}", data)
    plain = lower(program, "calibrate{gram=true}", data)
    inputs: dict[str, list[Tensor]] = {}

    def observe(node: torch.fx.Node, args: tuple[object, ...], _: object) -> None:
        if SITE in node.meta:
            assert isinstance(args[0], Tensor)
            inputs.setdefault(node.meta[SITE], []).append(args[0][0].double())

    for chunk in data.chunks:
        interpreter = Interpreter(program, observe=observe)
        interpreter.run(chunk, 0, interpreter.new_caches())
    unweighted = {node.meta[SITE]: node.meta[STATISTICS] for node in float_sites(plain)}
    for node in float_sites(out):
        x, keys = torch.cat(inputs[node.meta[SITE]]), node.meta[STATISTICS]
        w = out.store.load(keys["token_weight"]).double() if BLOCK in node.meta else torch.ones(len(x)).double()
        want = (x * w[:, None]).t() @ x / len(x)
        tolerance = 1e-5 * float(want.diagonal().max())
        torch.testing.assert_close(out.store.load(keys["gram"]).double(), want, rtol=1e-4, atol=tolerance)
        for kind in ("mean_square", "max_abs", "mean_abs", "sample", "tokens"):
            assert torch.equal(out.store.load(keys[kind]), plain.store.load(unweighted[node.meta[SITE]][kind]))


@pytest.mark.parametrize("pipeline", ["gptq{bits=3,group=32}", "qep,gptq{bits=3,group=32}", "qep,rtn{bits=3,group=32}"])
def test_what_is_rounded_depends_on_them(pipeline: str) -> None:
    program = canonical("llama")
    data = calibration(program, 3, 24)

    def codes(steps: str) -> list[Tensor]:
        out = lower(program, steps, data)
        return [out.store.load(key) for key in sorted(out.store.keys()) if key.endswith("int3-g32")]

    alike, weighed = codes(pipeline), codes(f"guide,{pipeline}")
    assert any(not torch.equal(one, other) for one, other in zip(alike, weighed, strict=True))


def test_a_scaling_of_columns_leaves_weights_alone() -> None:
    program = canonical("llama")
    data = calibration(program, 3, 24)
    before = weights(lower(program, "guide", data))
    after = weights(lower(program, "guide,calibrate{gram=true},awq{bits=3,group=32}", data))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_second_time_nothing_is_new_and_the_graph_stays() -> None:
    program = canonical("llama")
    data = calibration(program, 3, 24)
    assert_settled(Guide(), lower(program, "guide", data), data)
    out = lower(program, "guide", data)
    assert [node.name for node in out.graph.nodes] == [node.name for node in program.graph.nodes]
    for node in float_sites(out):
        if BLOCK in node.meta:
            assert node.meta[STATISTICS]["token_weight"] == f"statistics/{node.meta[GROUP]}/token_weight"


def test_nothing_depends_on_a_token_of_a_model_that_says_nothing() -> None:
    program = canonical("llama").clone()
    for key in program.store.keys():
        if key in ("lm_head.weight", "model.norm.weight"):
            program.store.put(key, torch.zeros_like(program.store.load(key)))
    for held in weights(lower(program, "guide", calibration(program, 2, 8))).values():
        assert torch.equal(held, torch.ones(16))


def test_workers_do_not_matter() -> None:
    program = canonical("llama")
    data = calibration(program, 5, 24)

    def with_workers(count: int) -> dict[str, Tensor]:
        return weights(Guide().run(program, PassContext(data, workers=count)).program)

    one, two = with_workers(1), with_workers(2)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    class KilledError(Exception):
        pass

    def killed(name: str, done: int, total: int) -> None:
        if done == 32:
            raise KilledError

    program = canonical("llama")
    data = calibration(program, 40, 8)
    whole = weights(Guide().run(program, PassContext(data)).program)
    resume = Resume(tmp_path)
    with pytest.raises(KilledError):
        Guide().run(program, PassContext(data, resume=resume, progress=killed))
    held = resume.load("texts-16")
    assert held is not None
    # What was kept is what is used.
    resume.save("texts-16", {name: 4 * squares for name, squares in held.items()})
    again = weights(Guide(power=1).run(program, PassContext(data, resume=resume)).program)
    plain = weights(Guide(power=1).run(program, PassContext(data)).program)
    for name, found in again.items():
        ratio = (found / plain[name])[128:256] / (found / plain[name])[:128].mean()
        torch.testing.assert_close(ratio, torch.full((128,), 4.0), rtol=1e-4, atol=0)
    resume.save("texts-16", held)
    again = weights(Guide().run(program, PassContext(data, resume=resume)).program)
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_logits_that_a_block_makes_leave_all_tokens_alike() -> None:
    headless, said = from_text(HEADLESS, source="headless", seed=0), list[str]()
    result = Guide().run(headless, PassContext(calibration(headless), warn=said.append))
    assert not result.modified and result.program is headless
    (only,) = said
    assert only.startswith("The logits are made inside of block 0, and guide takes a model with a head behind its")


@pytest.mark.parametrize("power", [0.0, -1.0, 1.5])
def test_powers_that_make_no_sense(power: float) -> None:
    with pytest.raises(UsageError, match="give above 0 and at most 1"):
        Guide(power=power)


def test_refusals() -> None:
    program = canonical("llama")
    data = calibration(program, 3, 24)
    with pytest.raises(HikuiError, match="It follows real text through the model and none was given; give"):
        Guide().run(program, PassContext())
    with pytest.raises(HikuiError, match=r"of memory are there; leave `guide` out of the recipe"):
        Guide().run(program, PassContext(data, memory=1000))
    with pytest.raises(HikuiError, match="There is no unpacked linear site to weigh"):
        Guide().requires(lower(program, "rtn"))
    with pytest.raises(HikuiError, match="which gradients cannot pass; run guide before"):
        Guide().requires(lower(program, "rtn{sites=mlp},activation"))
    with pytest.raises(HikuiError, match="What is behind the blocks holds .*which gradients cannot pass"):
        Guide().requires(lower(program, "rtn{sites=lm_head},activation"))
    weighed = lower(program, "guide", data)
    with pytest.raises(HikuiError, match="has weights for 72 tokens, and the calibration text has 8; run `guide` on"):
        Gptq(bits=3).run(weighed, PassContext(calibration(program, 1, 8)))
    with pytest.raises(HikuiError, match="has no statistics; run `calibrate` first"):
        Sensitivity().requires(weighed)
    with pytest.raises(VerificationError, match="was not measured"):
        Calibrate().ensures(weighed)
    partly = weighed.clone()
    del float_sites(partly)[0].meta[STATISTICS]
    with pytest.raises(VerificationError, match="Some sites have weights of tokens and others have none"):
        Guide().ensures(partly)


def test_infinite_numbers_are_refused() -> None:
    program = canonical("llama").clone()
    key = next(key for key in program.store.keys() if key.endswith("norm.weight"))
    program.store.put(key, program.store.load(key) * float("inf"))
    with pytest.raises(HikuiError, match="The float model gives NaN on the calibration text"):
        Guide().run(program, PassContext(calibration(program, 2, 8)))


def test_reads_back() -> None:
    program = canonical("llama")
    out = Pipeline(parse_pipeline("guide", PASSES)).run(program, PassContext(calibration(program, 2, 8)))
    text = to_text(out)
    assert '"statistics/model.layers.0.mlp.down_proj/token_weight" : f32[16]' in text
    assert to_text(from_text(text, out.store)) == text


BLOCKLESS = """program small context=16 vocabulary=24 T=1..16
  %e = weight "embed.weight" : f32[24, 64]
  %w = weight "a.weight" : f32[32, 32]
  %v = weight "b.weight" : f32[24, 64]
  %tokens = input : i64[1, T]
  %past = input : i64[1]
  %x = aten.embedding(%e, %tokens) : f32[1, T, 64]
  %r = aten.reshape(%x, [1, -1, 2, 32]) : f32[1, T, 2, 32]
  %a = aten.linear(%r, %w) : f32[1, T, 2, 32]  // site=a group=a
  %s = aten.reshape(%a, [1, -1, 64]) : f32[1, T, 64]
  %b = aten.linear(%s, %v) : f32[1, T, 24]  // site=b group=b
  return %b
"""


def test_a_model_without_blocks_counts_all_tokens_alike() -> None:
    program, said = from_text(BLOCKLESS, source="blockless", seed=0), list[str]()
    data = calibration(program)
    (step,) = parse_pipeline("guide", PASSES)
    step.requires(program)
    result = step.run(program, PassContext(data, warn=said.append))
    assert not result.modified and said == [
        "The model has no blocks, and guide goes through blocks, so all tokens count alike."
    ]
    lower(program, "guide,calibrate{gram=true},gptq{bits=3,group=32}", data)


def test_a_site_of_several_rows_a_token_counts_them_alike() -> None:
    text = BLOCKLESS.replace("site=a group=a", "site=a group=a block=0").replace(
        "%s = aten.reshape(%a, [1, -1, 64]) : f32[1, T, 64]",
        "%s = aten.reshape(%a, [1, -1, 64]) : f32[1, T, 64]  // block=0",
    )
    program = from_text(text, source="rows", seed=0)
    data = calibration(program)
    assert not Guide().run(program, PassContext(data, warn=lambda _: None)).modified
    lower(program, "guide,calibrate{gram=true},gptq{bits=3,group=32}", data)


@pytest.mark.parametrize("rounded", ["lm_head", "mlp"])
def test_what_is_rounded_already_is_as_it_was(rounded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guide, "_STORED", torch.float32)
    program = canonical("llama")
    data = calibration(program, 3, 24)
    plain = weights(lower(program, "guide", data))
    later = weights(lower(program, f"rtn{{sites={rounded},bits=2,group=32}},guide", data))
    assert later.keys() == {name for name in plain if rounded not in name}
    for name, held in later.items():
        torch.testing.assert_close(held, plain[name], rtol=1e-4, atol=1e-5)


def test_what_was_summed_before_is_not_kept() -> None:
    program = canonical("llama")
    data = calibration(program, 3, 24)
    out = lower(program, "calibrate{gram=true},guide", data)
    for node in float_sites(out):
        assert ("gram" in node.meta[STATISTICS]) == (BLOCK not in node.meta)
        assert "mean_square" in node.meta[STATISTICS]


def test_the_weights_of_a_sample_are_those_of_its_tokens() -> None:
    tokens = 20000
    held = Sample()
    for start in range(0, tokens, 123):
        held.add(torch.arange(start, min(start + 123, tokens)).float().unsqueeze(-1))
    assert torch.equal(weights_of_sample(torch.arange(tokens).float()), held.tokens().flatten())


def test_noise_of_activations_is_weighed_as_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    program = canonical("llama")
    data = calibration(program, 3, 24)
    before = lower(program, "guide{power=1},calibrate{gram=true}", data)

    def notes() -> list[str]:
        return Awq(bits=3, group=32, activation_bits=4).run(before, PassContext(data)).notes

    weighed = notes()
    monkeypatch.setattr(awq, "weights_of_sample", lambda weights: torch.ones(len(weights_of_sample(weights))))
    assert notes() != weighed


def test_the_largest_seed_is_one() -> None:
    program = canonical("llama")
    lower(program, f"guide{{seed={(1 << 63) - 1}}}", calibration(program, 2, 8))
