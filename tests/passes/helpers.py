"""Programs, runs and text checks that the tests of the passes share."""

import io
import operator
from collections.abc import Callable
from functools import cache

import torch
from filecheck.finput import FInput
from filecheck.matcher import Matcher
from filecheck.options import Options
from filecheck.parser import Parser, pattern_for_opts
from torch import Tensor, fx, nn

from hikui.lowering.ir.interpreter import Interpreter
from hikui.lowering.ir.packed import PackedLinear
from hikui.lowering.ir.printer import to_text
from hikui.lowering.ir.program import WEIGHT, ModelConfig, Program
from hikui.lowering.ir.store import WeightStore
from hikui.lowering.pipeline.contract import Calibration, Pass, PassContext
from hikui.lowering.pipeline.run import Pipeline, parse_pipeline
from hikui.lowering.trace import trace
from hikui.models.synthetic import tiny_model
from hikui.passes import PASSES

SMALL_CONTEXT, SMALL_VOCABULARY = 16, 24


@cache
def traced(family: str) -> Program:
    """The tiny model of a family; passes work on clones, so tests may share it."""
    return trace(tiny_model(family))


@cache
def canonical(family: str) -> Program:
    return lower(traced(family), "canonicalise")


def calibration(program: Program, chunks: int = 3, length: int = 11) -> Calibration:
    generator = torch.Generator().manual_seed(5)
    vocabulary = program.config.vocabulary
    return Calibration(
        tuple(torch.randint(0, vocabulary, (1, length), generator=generator) for _ in range(chunks)), "dice"
    )


def lower(program: Program, pipeline: str, data: Calibration | None = None) -> Program:
    return Pipeline(parse_pipeline(pipeline, PASSES)).run(program, PassContext(data))


def run(program: Program, tokens: Tensor | None = None, decode: int = 3) -> tuple[Tensor, list[Tensor]]:
    """Logits and caches after a prefill and some decode steps."""
    if tokens is None:
        generator = torch.Generator().manual_seed(7)
        tokens = torch.randint(0, SMALL_VOCABULARY, (1, 7 + decode), generator=generator)
    interpreter = Interpreter(program)
    split = tokens.shape[1] - decode
    logits, caches = interpreter.run(tokens[:, :split], 0, interpreter.new_caches())
    out = [logits]
    for at in range(split, tokens.shape[1]):
        logits, caches = interpreter.run(tokens[:, at : at + 1], at, caches)
        out.append(logits)
    return torch.cat(out, 1), caches


def assert_same(one: Program, two: Program, tolerance: float = 1e-5) -> None:
    """Logits and caches of two programs agree to a tolerance relative to the largest logit."""
    (a, caches_a), (b, caches_b) = run(one), run(two)
    assert bool(a.isfinite().all())
    assert float((a - b).abs().max()) <= tolerance * max(1.0, float(a.abs().max()))
    for left, right in zip(caches_a, caches_b, strict=True):
        assert float((left - right).abs().max()) <= tolerance * max(1.0, float(left.abs().max()))


def assert_settled(step: Pass, program: Program, data: Calibration | None = None) -> None:
    """A second run of a pass changes nothing."""
    before = to_text(program)
    result = step.run(program, PassContext(data))
    assert not result.modified
    assert result.program is program
    assert to_text(program) == before


def check(program: Program, checks: str) -> None:
    """Runs FileCheck directives over the program's text."""
    options = Options(match_filename="-")
    parser = Parser(options, io.StringIO(checks), *pattern_for_opts(options))
    text = to_text(program)
    assert Matcher(options, FInput("program", text), parser).run() == 0, text


def program_of(body: Callable[..., Tensor], **weights: Tensor) -> Program:
    """A program without caches around `body(x, **weights)`, where x [1, T, K] is an embedding; it returns logits.

    The weight called `embedding` gives K; keyword names become store keys with `__` as a dot.
    """
    names = list(weights)

    class Model(nn.Module):
        def forward(self, held: tuple[Tensor, ...], tokens: Tensor, past: Tensor) -> tuple[Tensor]:
            named = dict(zip(names, held, strict=True))
            x = nn.functional.embedding(tokens, named.pop("embedding"))
            return (body(x + 0.0 * past, **named),)

    length = torch.export.Dim("length", min=1, max=SMALL_CONTEXT)
    inputs = (tuple(weights.values()), torch.arange(5)[None], torch.tensor([0]))
    exported = torch.export.export(Model(), inputs, dynamic_shapes=(tuple(None for _ in names), {1: length}, None))
    for node, name in zip(exported.graph.find_nodes(op="placeholder"), names, strict=False):
        node.meta[WEIGHT] = name.replace("__", ".")
    vocabulary = int(exported.graph.output_node().args[0][0].meta["val"].shape[-1])
    return Program(
        fx.GraphModule(nn.Module(), exported.graph),
        WeightStore.in_memory({name.replace("__", "."): tensor for name, tensor in weights.items()}),
        ModelConfig(SMALL_CONTEXT, vocabulary, (), "small", None, ()),
    )


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def order_of(program: Program, node: fx.Node) -> Tensor | None:
    """The order of a packed site's columns, int64 [k], or None."""
    return PackedLinear.of(node).column_order(program.store)


def calls(program: Program, target: object) -> list[fx.Node]:
    return [node for node in program.graph.nodes if node.op == "call_function" and node.target is target]


def items(node: fx.Node) -> dict[int, fx.Node]:
    """The outputs of a call that gives several."""
    return {int(user.args[1]): user for user in node.users if user.target is operator.getitem}  # type: ignore[arg-type]
