"""Textual pipelines and the loop that runs them."""

from dataclasses import dataclass, fields
from typing import ClassVar, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hikui.lowering.errors import HikuiError, UsageError, VerificationError
from hikui.lowering.ir.printer import to_text
from hikui.lowering.ir.program import SITE, Program
from hikui.lowering.ir.verifier import verify
from hikui.lowering.pipeline.contract import Pass, PassContext, PassResult
from hikui.lowering.pipeline.run import InputUnchanged, Pipeline
from hikui.lowering.pipeline.text import parse_pipeline
from hikui.passes import PASSES
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


@dataclass(frozen=True)
class Divide(Pass):
    """Fails as no pass should."""

    name: ClassVar[str] = "divide"

    def run(self, program: Program, context: PassContext) -> PassResult:
        raise ZeroDivisionError


@dataclass(frozen=True)
class Liar(Pass):
    """Says the opposite of what it does."""

    name: ClassVar[str] = "liar"
    modified: bool = True

    def run(self, program: Program, context: PassContext) -> PassResult:
        return PassResult(program if self.modified else program.clone(), self.modified)


@dataclass(frozen=True)
class Meddler(Pass):
    """Changes the program that it is given, and gives back another."""

    name: ClassVar[str] = "meddler"

    def run(self, program: Program, context: PassContext) -> PassResult:
        node = next(iter(program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)))
        node.meta[SITE] = f"{node.meta.get(SITE, '')}x"
        return PassResult(program.clone(), True)


@dataclass(frozen=True)
class Everything(Pass):
    """Has an option of every type."""

    name: ClassVar[str] = "a"
    a: str = "x"
    b: float = 0.5
    aa: tuple[int, ...] = (1, 2)
    bb: int = 1

    def run(self, program: Program, context: PassContext) -> PassResult:
        return PassResult(program, False)


AVAILABLE = (Negate, Break)


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ("negate", [Negate()]),
        ("negate{times=2}", [Negate(2)]),
        (" negate { times = 2 , loud=true } ,break", [Negate(2, loud=True), Break()]),
        ('negate{label="a,b{}=c"}', [Negate(label="a,b{}=c")]),
        ('negate{label=" two ""quotes"" "}', [Negate(label=' two "quotes" ')]),
        (r'negate{label="q\.k"},negate{label=q\.k}', [Negate(label=r"q\.k"), Negate(label=r"q\.k")]),
        ('negate{label=""}', [Negate(label="")]),
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
        ('negate{label=a"b}', "quote out of place at column 15"),
        ('negate{label="a"b}', "quote out of place"),
        ('negate{label="a}', "quote out of place"),
        ("negate{times=1,times=2}", "'times' in pipeline 'negate{times=1,times=2}' is given twice"),
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


def test_errors_keep_their_type_and_name_the_pass() -> None:
    with pytest.raises(HikuiError, match="times cannot be negative") as refused:
        Pipeline([Negate(-1)]).run(handmade.program())
    assert refused.value.__notes__ == ["Pass negate"]
    with pytest.raises(VerificationError, match="The program must return a tuple of 3") as broken:
        Pipeline([Break()]).run(handmade.program())
    assert broken.value.__notes__ == ["Pass break"]
    with pytest.raises(ZeroDivisionError) as defect:
        Pipeline([Divide()]).run(handmade.program())
    assert defect.value.__notes__ == ["Pass divide"]
    assert (HikuiError.exit_code, UsageError.exit_code, VerificationError.exit_code) == (1, 2, 3)


@pytest.mark.parametrize("modified", [True, False])
def test_a_pass_that_lies_about_its_change_is_found(modified: bool) -> None:
    with pytest.raises(VerificationError, match="change and gives back"):
        Pipeline([Liar(modified)]).run(handmade.program())


def test_a_pass_that_changes_its_input_is_found() -> None:
    program = handmade.program()
    Pipeline([Meddler()]).run(program)
    with pytest.raises(VerificationError, match="Pass meddler changed the program that it was given"):
        Pipeline([Meddler()], [InputUnchanged()]).run(program)
    Pipeline([Negate()], [InputUnchanged()]).run(program)


# ── round trips ─────────────────────────────────────────────────────────────────────────────────────────────────────

TEXT = st.text() | st.sampled_from(
    ["", " ", '"', '""', "a,b", "{}", "k=v", r"layers\.\d+", ' "x" ', "true", "4", "a\nb"]
)
NUMBERS = {
    int: st.integers(-(2**70), 2**70) | st.sampled_from([0, 1, 2, 3, 4, 8, 16, 32, 64, 128]),
    float: st.floats(allow_nan=False) | st.sampled_from([1 / 3, 0.1, 1e-9, 0.05, 2.0]),
}


def options(kind: type[Pass]) -> st.SearchStrategy[Pass]:
    """Passes of a kind with any options that it takes."""
    hints = get_type_hints(kind)
    values = {}
    for field in fields(kind):
        hint = hints[field.name]
        if get_origin(hint) is Literal:
            drawn: st.SearchStrategy[object] = st.sampled_from(get_args(hint))
        elif hint is bool:
            drawn = st.booleans()
        elif hint is str:
            drawn = TEXT | st.sampled_from(["int4-g64", "ternary-g128", "nf4-g32|int8-g64"])
        elif hint in NUMBERS:
            drawn = NUMBERS[hint]
        else:
            drawn = st.lists(st.integers()).map(tuple)
        values[field.name] = st.just(field.default) | drawn

    def make(chosen: dict[str, object]) -> Pass | None:
        try:
            return kind(**chosen)
        except UsageError:
            return None

    return st.fixed_dictionaries(values).map(make).filter(lambda made: made is not None)  # type: ignore[return-value]


@pytest.mark.parametrize("kind", [*PASSES, Negate, Everything], ids=lambda kind: kind.name)
@settings(max_examples=60, suppress_health_check=list(HealthCheck), deadline=None)
@given(data=st.data())
def test_every_pass_reads_back_from_its_text(kind: type[Pass], data: st.DataObject) -> None:
    steps = data.draw(st.lists(options(kind), min_size=1, max_size=2))
    text = str(Pipeline(steps))
    assert parse_pipeline(text, [kind]) == steps
    assert str(Pipeline(parse_pipeline(text, [kind]))) == text


@given(text=st.text(alphabet='ab{}=,"\\ 1'))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        steps = parse_pipeline(text, [Everything, Negate])
    except UsageError:
        return
    assert parse_pipeline(str(Pipeline(steps)), [Everything, Negate]) == steps
