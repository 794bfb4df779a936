"""learned_clip: gradients against float64, blocks against the interpreter, and what a run must leave alike."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from hikui.lowering.engine.resume import Resume
from hikui.lowering.engine.streaming import Stream
from hikui.lowering.errors import HikuiError, UsageError
from hikui.lowering.formats import KINDS, Format
from hikui.lowering.ir.interpreter import Interpreter
from hikui.lowering.ir.printer import to_text
from hikui.lowering.ir.program import BLOCK, SITE, Program
from hikui.lowering.pipeline.contract import Calibration, PassContext
from hikui.lowering.pipeline.run import Pipeline
from hikui.lowering.pipeline.text import parse_pipeline
from hikui.models.synthetic import FAMILIES
from hikui.passes import PASSES, LearnedClip
from hikui.passes.gradients.block_training import BlockSpan, Product, TrainingBlock, multiply_by, spans
from hikui.passes.graph import float_sites, sites, weight_of
from hikui.passes.quantise.learned.block_learning import BlockLearning
from hikui.passes.quantise.learned.learned_scales import START, LearnedScales
from hikui.passes.quantise.rounding import round_matrix
from tests.passes.helpers import assert_settled, calibration, canonical, check, lower, random

QUICK = "learned_clip{bits=3,group=32,epochs=2}"


def texts(program: Program) -> Calibration:
    """Three texts of one length and a shorter one."""
    *whole, last = calibration(program, 4, 24).chunks
    return Calibration((*whole, last[:, :9]), "dice")


def learned(pipeline: str = QUICK, family: str = "llama", **options: object) -> Program:
    program = canonical(family)
    context = PassContext(texts(program), **options)  # type: ignore[arg-type]
    return Pipeline(parse_pipeline(pipeline, PASSES)).run(program, context)


def assert_same_bytes(one: Program, two: Program) -> None:
    assert to_text(one) == to_text(two)
    assert one.store.keys() == two.store.keys()
    for key in one.store.keys():
        assert torch.equal(one.store.load(key), two.store.load(key)), key


def test_text() -> None:
    check(
        learned("learned_clip{bits=3,group=32,epochs=1,sites=layers.0.mlp.up}"),
        """
        // CHECK: "model.layers.0.mlp.up_proj.weight.int3-g32" : u8[8, 6, 16, 4]
        // CHECK: "model.layers.0.mlp.up_proj.weight.int3-g32.scale" : f16[8, 2, 16]
        // CHECK: aten.linear({{.*}}site=model.layers.0.mlp.gate_proj
        // CHECK: hikui.linear(%{{.*}}, %w_model_layers_0_mlp_up_proj_weight_int3_g32, {{.*}}"int3-g32", 116)
        // CHECK-SAME: site=model.layers.0.mlp.up_proj
        // CHECK: aten.linear({{.*}}site=model.layers.0.mlp.down_proj
        """,
    )


# ── one matrix ──────────────────────────────────────────────────────────────────────────────────────────────────────

FORMATS = ["sign-g32", "int2-g32", "ternary-g32", "int3-g32", "int4-g32", "nf4-g32", "int8-channel", "mixed-g32-c32"]


def of_format(name: str) -> tuple[Tensor, LearnedScales]:
    """A matrix as it is stored, float64 [6, 75], and its scales."""
    weight = random(6, 75, seed=3)
    order = torch.randperm(75, generator=torch.Generator().manual_seed(1)) if "mixed" in name else torch.arange(75)
    return weight[:, order].double(), LearnedScales(weight, Format.parse(name), order)


def kind_of(name: str, column: int) -> str:
    return name.split("-")[0] if "mixed" not in name else "int4" if column < 32 else "sign"


@pytest.mark.parametrize("name", FORMATS)
def test_the_gradient_is_that_of_the_straight_through_surrogate(name: str) -> None:
    """With what rounding adds held fixed the loss is smooth, and float64 can take its differences."""
    stored, scales = of_format(name)
    groups = torch.tensor([0 if "channel" in name else column // 32 for column in range(75)])
    scale = (scales.nearest * torch.linspace(0.5, 1.3, 6)[:, None]).half().float()
    order = scales.order
    assert order is not None
    outer = random(6, 75, seed=4)
    made, slope = scales.matrix(scale)
    found = scales.gradient(outer, slope)

    levels = [torch.tensor(KINDS[kind_of(name, column)].levels).double() for column in range(75)]
    low, high = (torch.stack([each[end] for each in levels]) for end in (0, -1))
    rounds = torch.tensor([kind_of(name, column) != "sign" for column in range(75)])
    wanted = stored / scale.double()[:, groups]
    codes = torch.stack([each[(wanted[:, [c]] - each).abs().argmin(1)] for c, each in enumerate(levels)], 1)
    added = codes - wanted.clamp(low, high) * rounds
    assert torch.equal(made[:, order].double(), codes * scale.double()[:, groups])
    assert torch.equal(scales.rounded(scale).codes.double(), codes)

    def loss(scale: Tensor) -> Tensor:
        wide = scale[:, groups]
        return (wide * ((stored / wide).clamp(low, high) * rounds + added) * outer[:, order].double()).sum(1)

    assert found.shape == scales.theta.shape
    for group in range(found.shape[1]):
        step = torch.zeros_like(scale, dtype=torch.float64)
        step[:, group] = 1e-6
        expected = (loss(scale.double() + step) - loss(scale.double() - step)) / 2e-6
        # Sums of 75 products of up to a few hundred, in float32.
        assert torch.allclose(found[:, group].double(), expected, rtol=1e-5, atol=1e-3 if "8" in name else 1e-4)


def test_the_strength_is_a_sigmoid_of_what_is_learned() -> None:
    _, scales = of_format("int3-g32")
    start = scales.scale()
    scales.theta += random(*scales.theta.shape, seed=5)
    of_scale = random(*scales.theta.shape, seed=6)
    scales.descend(of_scale)
    assert scales.theta.grad is not None
    reach = start.double() / torch.sigmoid(torch.tensor(START).logit())
    theta, step = scales.theta.double(), 1e-6
    slope = reach * (torch.sigmoid(theta + step) - torch.sigmoid(theta - step)) / (2 * step)
    # The reach is divided out of a scale that is already rounded to float16.
    assert torch.allclose(scales.theta.grad.double(), of_scale.double() * slope, rtol=1e-3)
    assert torch.allclose(scales.scale().double(), reach * torch.sigmoid(theta), rtol=2e-3)


def test_learning_starts_between_covering_and_least_error() -> None:
    weight = random(6, 75, seed=3)
    for name in ("sign-g32", "int2-g32", "int3-g32", "int4-g32"):
        fmt = Format.parse(name)
        scales = LearnedScales(weight, fmt)
        nearest = round_matrix(weight, fmt).scale.double()
        assert torch.equal(scales.nearest.double(), nearest)
        largest = F.pad(weight, (0, 96 - 75)).view(6, 3, 32).abs().amax(-1).double()
        # The largest value at the longer side's last level; signs have one scale, whatever is asked for.
        covering = nearest.abs() if name == "sign-g32" else largest / -fmt.levels[0]
        between = (nearest + covering * torch.where(nearest < 0, -1, 1)) / 2
        # Through the sigmoid and back a scale may end at the next number of float16.
        assert torch.allclose(scales.scale().double(), between, rtol=2**-10)


def test_a_matrix_of_zeros_stays_one() -> None:
    scales = LearnedScales(torch.zeros(3, 40), Format.parse("int3-g32"))
    made, slope = scales.matrix(scales.scale())
    assert not bool(made.any())
    scales.descend(scales.gradient(torch.ones(3, 40), slope))
    assert scales.theta.grad is not None
    assert not bool(scales.theta.grad.any())


# ── one block ───────────────────────────────────────────────────────────────────────────────────────────────────────


def at_blocks(
    program: Program, visit: Callable[[BlockSpan, TrainingBlock, dict[fx.Node, Tensor], Stream], None]
) -> None:
    """Brings a stream of one text to each block of a float program, and behind it."""
    (text, *_) = texts(program).chunks
    stream = Stream(program, [text])
    found = spans(program, float_sites(program))
    assert len(found) >= 2
    for span in found:
        stream.advance(span.nodes[0])
        block = TrainingBlock(program, span, {text.shape[1]})
        inputs = {node: stream.value(0, node) for node in block.inputs}
        stream.advance(span.after)
        visit(span, block, inputs, stream)


def matrices(program: Program, span: BlockSpan) -> dict[fx.Node, Tensor]:
    # Copies: the store of a cached program is shared by other tests, and gradients are asked of these.
    return {node: program.store.load(program.weight_of(weight_of(node))).clone() for node in span.sites}


def products(held: dict[fx.Node, Tensor]) -> dict[fx.Node, Product]:
    return {node: multiply_by(matrix) for node, matrix in held.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_gives_what_the_interpreter_gives(family: str) -> None:
    program = canonical(family)

    def visit(span: BlockSpan, block: TrainingBlock, inputs: dict[fx.Node, Tensor], stream: Stream) -> None:
        outputs = block.run(inputs, 24, products(matrices(program, span)))
        assert len(outputs) == len(span.outputs) == 1
        assert torch.equal(outputs[0], stream.value(0, span.outputs[0]))

    at_blocks(program, visit)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_every_matrix(family: str) -> None:
    program = canonical(family)

    def visit(span: BlockSpan, block: TrainingBlock, inputs: dict[fx.Node, Tensor], stream: Stream) -> None:
        leaves = {node: matrix.requires_grad_() for node, matrix in matrices(program, span).items()}
        outer = random(*stream.value(0, span.outputs[0]).shape, seed=8)

        def loss(held: dict[fx.Node, Tensor]) -> Tensor:
            return (block.run(inputs, 24, products(held))[0] * outer).double().sum()

        gradients = torch.autograd.grad(loss(leaves), list(leaves.values()))
        for (node, matrix), gradient in zip(leaves.items(), gradients, strict=True):
            along = gradient / gradient.norm()
            step = 1e-2 * float(matrix.detach().norm()) / matrix.numel() ** 0.5
            with torch.no_grad():
                more, less = (loss({**leaves, node: matrix + sign * step * along}) for sign in (1, -1))
            # The difference's own error is of second order in the step, and of float32's last bits over it.
            assert float(more - less) / (2 * step) == pytest.approx(float(gradient.norm()), rel=2e-2), node.name

    at_blocks(program, visit)


def test_gradients_pass_a_quantised_cache() -> None:
    exact, rounded = canonical("llama"), lower(canonical("llama"), "kv_cache{bits=8}")
    found: list[dict[str, Tensor]] = []
    for program in (exact, rounded):
        gathered: dict[str, Tensor] = {}

        def visit(
            span: BlockSpan,
            block: TrainingBlock,
            inputs: dict[fx.Node, Tensor],
            stream: Stream,
            program: Program = program,
            gathered: dict[str, Tensor] = gathered,
        ) -> None:
            leaves = {node: matrix.requires_grad_() for node, matrix in matrices(program, span).items()}
            loss = block.run(inputs, 24, products(leaves))[0].square().sum()
            gradients = torch.autograd.grad(loss, list(leaves.values()))
            gathered |= {node.meta[SITE]: each for node, each in zip(leaves, gradients, strict=True)}

        at_blocks(program, visit)
        found.append(gathered)
    for site, gradient in found[0].items():
        # Eight bits of a cache change activations by less than one in a hundred.
        assert float((gradient - found[1][site]).norm()) <= 0.1 * float(gradient.norm()), site


# ── the pass ────────────────────────────────────────────────────────────────────────────────────────────────────────


def block_errors(program: Program, original: Program) -> list[float]:
    """The mean square error of what each block hands on, from runs of the interpreter."""
    outputs = [span.outputs[0].name for span in spans(original, float_sites(original))]
    totals = dict.fromkeys(outputs, 0.0)
    count = 0
    for text in texts(original).chunks:
        seen: list[dict[str, Tensor]] = []
        for each in (original, program):
            values: dict[str, Tensor] = {}

            def observe(
                node: fx.Node, args: tuple[object, ...], result: object, values: dict[str, Tensor] = values
            ) -> None:
                if node.name in totals:
                    assert isinstance(result, Tensor)
                    values[node.name] = result.double()

            interpreter = Interpreter(each, observe=observe)
            interpreter.run(text, 0, interpreter.new_caches())
            seen.append(values)
        for name in outputs:
            totals[name] += float((seen[0][name] - seen[1][name]).square().sum())
        count += seen[0][outputs[0]].numel()
    return [totals[name] / count for name in outputs]


def notes_of(pipeline: str, family: str) -> tuple[Program, list[tuple[float, float]]]:
    """The program, and the errors before and after that the pass notes of each block."""
    program = canonical(family)
    *before, step = parse_pipeline(pipeline, PASSES)
    context = PassContext(texts(program))
    result = step.run(Pipeline(before).run(program, context), context)
    found = [re.match(r"block \d+: .* output (\S+), (\S+) with", note) for note in result.notes]
    return result.program, [(float(each[2]), float(each[1])) for each in found if each]


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", "bits=2,group=32"),
        ("opt", "bits=3,group=32,batch=2"),
        ("bloom", "bits=1,group=32"),
        ("gpt2", "format=nf4-g32"),
        ("qwen2", "format=mixed-g32-c32"),
    ],
)
def test_block_errors_fall(family: str, options: str) -> None:
    program = canonical(family)
    before = "calibrate," if "mixed" in options else ""
    out, noted = notes_of(f"{before}learned_clip{{{options},epochs=10}}", family)
    measured = block_errors(out, program)
    assert len(noted) == len(measured)
    for (first, last), error in zip(noted, measured, strict=True):
        assert last < 0.97 * first
        assert error == pytest.approx(last, rel=1e-3)
    # In the first block the streams are still the same, so what it starts from is what rtn gives.
    rounding = options.split(",batch")[0]
    rounded = lower(program, f"{before}rtn{{{rounding}}}", texts(program))
    assert noted[0][0] == pytest.approx(block_errors(rounded, program)[0], rel=1e-3)


def test_steps_that_lead_astray_are_not_taken() -> None:
    program = canonical("llama")
    _, noted = notes_of("learned_clip{bits=2,group=32,epochs=1,lr=1e9}", "llama")
    start = block_errors(lower(program, "rtn{bits=2,group=32}"), program)[0]
    assert noted[0][0] == pytest.approx(start, rel=1e-3)
    assert all(last <= first for first, last in noted)


def test_other_sites_are_rounded_to_the_least_weight_error() -> None:
    out = learned('override{sites="v_proj$",format=float16},learned_clip{bits=3,group=32,epochs=6}')
    formats = {node.meta[SITE]: node.meta["hikui.format"] for node in sites(out)}
    assert formats["model.layers.1.self_attn.v_proj"] == "float16"
    assert formats["model.layers.1.self_attn.k_proj"] == "int3-g32"
    rounded = lower(canonical("llama"), "rtn{bits=3,group=32}")
    for key in ("lm_head.weight.int3-g32", "lm_head.weight.int3-g32.scale"):
        assert torch.equal(out.store.load(key), rounded.store.load(key))
    key = "model.layers.0.mlp.up_proj.weight.int3-g32.scale"
    assert not torch.equal(out.store.load(key), rounded.store.load(key))


def test_a_second_run_changes_nothing() -> None:
    program = learned("learned_clip{bits=3,group=32,epochs=1,sites=layers.1.mlp}")
    assert_settled(LearnedClip(sites="layers.1.mlp"), program, texts(program))


def test_same_bytes_again_and_with_more_workers() -> None:
    pipeline = "learned_clip{bits=2,group=32,epochs=2,batch=2}"
    one = learned(pipeline, workers=1)
    assert_same_bytes(one, learned(pipeline, workers=1))
    assert_same_bytes(one, learned(pipeline, workers=2))


def test_the_seed_orders_the_texts() -> None:
    key = "model.layers.0.mlp.up_proj.weight.int3-g32.scale"
    one, two = (learned(f"learned_clip{{bits=3,group=32,epochs=6,sites=layers.0.mlp,seed={seed}}}") for seed in (0, 1))
    assert not torch.equal(one.store.load(key), two.store.load(key))


class Killed(BaseException):
    """Stands for SIGKILL."""


@pytest.mark.parametrize("pipeline", [QUICK, "calibrate,learned_clip{format=mixed-g32-c32,epochs=1}"])
def test_a_run_that_stopped_goes_on_to_the_same_bytes(
    pipeline: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, learn, lessons = learned(pipeline), BlockLearning.learn, 0

    def dying(self: BlockLearning, *args: object) -> object:
        nonlocal lessons
        lessons += 1
        if lessons == fatal:
            raise Killed
        return learn(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(BlockLearning, "learn", dying)
    # The second block's lesson is cut short; then the third's, which is the second of that run; then none.
    fatal = 2
    for _ in range(2):
        lessons = 0
        with pytest.raises(Killed):
            learned(pipeline, resume=Resume(tmp_path))
    fatal, lessons = -1, 0
    out = learned(pipeline, resume=Resume(tmp_path))
    assert lessons == 1
    assert_same_bytes(out, whole)
    lessons = 0
    assert_same_bytes(learned(pipeline, resume=Resume(tmp_path)), whole)
    assert lessons == 0


# ── what is refused ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("options", ["epochs=0", "batch=0", "lr=0.0", "bits=5", "group=33"])
def test_options_out_of_range(options: str) -> None:
    with pytest.raises(UsageError, match="learned_clip cannot"):
        parse_pipeline(f"learned_clip{{{options}}}", PASSES)


def test_what_cannot_be_learned_is_refused() -> None:
    program = canonical("llama")
    data = texts(program)
    with pytest.raises(HikuiError, match="marked by `qep`"):
        lower(program, f"qep,{QUICK}", data)
    with pytest.raises(HikuiError, match=r"Block 0 holds hikui.quantize_activation.*before `activation`"):
        lower(program, f'rtn{{bits=8,sites="q_proj"}},activation{{bits=8}},{QUICK}', data)
    with pytest.raises(HikuiError, match="none was given"):
        LearnedClip().run(program, PassContext())
    with pytest.raises(HikuiError, match="of memory are there"):
        LearnedClip().run(program, PassContext(data, memory=1000))


def test_activations_that_are_no_numbers_are_named() -> None:
    program = canonical("llama").clone()
    weight = next(node for node in program.weight_nodes() if "layers.1.input_layernorm" in program.weight_of(node))
    broken = program.add_weight("broken", torch.full((48,), torch.nan))
    weight.replace_all_uses_with(broken)
    assert any(node.meta.get(BLOCK) == 1 for node in broken.users)
    with pytest.raises(HikuiError, match="Block 1 gives NaN"):
        LearnedClip(epochs=1).run(program, PassContext(texts(program)))
