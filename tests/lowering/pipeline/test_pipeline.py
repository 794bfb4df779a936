"""Textual pipelines and the loop that runs them."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from hikui.lowering.errors import HikuiError, UsageError, VerificationError
from hikui.lowering.ir.printer import to_text
from hikui.lowering.ir.program import Program
from hikui.lowering.ir.verifier import verify
from hikui.lowering.pipeline.contract import Pass, PassContext, PassResult
from hikui.lowering.pipeline.run import Pipeline, parse_pipeline
from tests.lowering import handmade


@dataclass(frozen=True)
class Negate(Pass):
    """Negates the logits, `times` times."""

    name: ClassVar[str] = "negate"
    times: int = 1
    label: str = ""
    loud: bool = False

    def requires(self, program: Program) -> None:
        if self.times < 0:
            raise HikuiError("times cannot be negative; give 0 or more.")

    def run(self, program: Program, context: PassContext) -> PassResult:
        if not self.times:
            return PassResult(program, False)
        program = program.clone()
        for _ in range(self.times):
            first, *rest = program.outputs()
            with program.graph.inserting_before(program.output_node):
                first = program.graph.call_function(torch.ops.aten.neg.default, (first,))
            program.output_node.args = ((first, *rest),)
        program.recompile()
        return PassResult(program, True, [f"negated {self.times}"])


@dataclass(frozen=True)
class Break(Pass):
    """Loses an output."""

    name: ClassVar[str] = "break"

    def run(self, program: Program, context: PassContext) -> PassResult:
        program = program.clone()
        program.output_node.args = (tuple(program.outputs()[:1]),)
        return PassResult(program, True)


AVAILABLE = (Negate, Break)


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ("negate", [Negate()]),
        ("negate{times=2}", [Negate(2)]),
        (" negate { times = 2 , loud=true } ,break", [Negate(2, loud=True), Break()]),
        ('negate{label="a,b{}=c"}', [Negate(label="a,b{}=c")]),
        ("negate{}", [Negate()]),
    ],
)
def test_parse_and_print(text: str, passes: list[Pass]) -> None:
    assert parse_pipeline(text, AVAILABLE) == passes
    assert parse_pipeline(str(Pipeline(passes)), AVAILABLE) == passes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("negat", "Pass 'negat' is not known. Did you mean 'negate'?"),
        ("negate{tims=2}", "no option 'tims'. Did you mean 'times'?"),
        ("negate{times=x}", "Option 'times' of pass 'negate' cannot be 'x'"),
        ("negate{times}", "has no value"),
        ("negate{times=2", "closing brace"),
        ("negate{times=2}break", "wants a comma"),
        ("negate,,break", "no pass name at column 8"),
        ("", "empty"),
    ],
)
def test_bad_pipelines(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_pipeline(text, AVAILABLE)
    assert message in str(caught.value)


class Recorder:
    def __init__(self) -> None:
        self.events: list[str] = []

    def before(self, step: Pass, program: Program) -> None:
        self.events.append(f"before {step}")

    def after(self, step: Pass, result: PassResult, seconds: float) -> None:
        self.events.append(f"after {step} {result.modified}")


def test_run_calls_back_and_records() -> None:
    recorder, program = Recorder(), handmade.program()
    pipeline = Pipeline([Negate(2), Negate(0)], [recorder])
    before = to_text(program)
    result = pipeline.run(program)
    verify(result)
    assert to_text(program) == before, "a pass leaves the program it was given alone"
    assert to_text(result).count("aten.neg") == 2
    assert recorder.events == [
        "before negate{times=2}",
        "after negate{times=2} True",
        "before negate{times=0}",
        "after negate{times=0} False",
    ]
    assert [(r.step, r.modified, r.notes) for r in pipeline.records] == [
        ("negate{times=2}", True, ("negated 2",)),
        ("negate{times=0}", False, ()),
    ]


def test_errors_name_the_pass() -> None:
    with pytest.raises(HikuiError, match="Pass negate: times cannot be negative"):
        Pipeline([Negate(-1)]).run(handmade.program())
    with pytest.raises(VerificationError, match="Pass break: The program must return a tuple of 3"):
        Pipeline([Break()]).run(handmade.program())
