"""Textual pipelines and the loop that runs them.

pipeline := pass (',' pass)*        pass := name [ '{' option (',' option)* '}' ]        option := key '=' value
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from hikui.lowering.errors import HikuiError, UsageError, VerificationError, did_you_mean
from hikui.lowering.ir.program import Program
from hikui.lowering.ir.verifier import verify
from hikui.lowering.memory import give_back
from hikui.lowering.pipeline.contract import Pass, PassContext, PassResult


class Callback(Protocol):
    """What happens around each pass: dump, diff, timing."""

    def before(self, step: Pass, program: Program) -> None: ...

    def after(self, step: Pass, result: PassResult, seconds: float) -> None: ...


@dataclass(frozen=True)
class StepRecord:
    """One pass as it was run."""

    step: str
    modified: bool
    seconds: float
    notes: tuple[str, ...]


def make_pass(name: str, options: Mapping[str, object], available: Iterable[type[Pass]], where: str = "") -> Pass:
    """A pass from its name and options.

    Args:
        name: as in a pipeline.
        options: values as text or already typed.
        available: the passes that may be named.
        where: prefix of error sentences, such as a file and a line.

    Raises:
        UsageError: unknown pass or option (with the nearest name), or a value of the wrong type.
    """
    known = {cls.name: cls for cls in available}
    if name not in known:
        raise UsageError(f"{where}Pass '{name}' is not known.{did_you_mean(name, known)}")
    cls = known[name]
    hints = get_type_hints(cls)
    names = [f.name for f in fields(cls)]
    values: dict[str, object] = {}
    for key, value in options.items():
        if key not in names:
            takes = f" It takes {', '.join(names)}." if names else " It takes none."
            raise UsageError(f"{where}Pass '{name}' has no option '{key}'.{did_you_mean(key, names) or takes}")
        try:
            adapter: TypeAdapter[object] = TypeAdapter(hints[key], config=ConfigDict(str_strip_whitespace=True))
            values[key] = adapter.validate_python(value)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise UsageError(f"{where}Option '{key}' of pass '{name}' cannot be {value!r}: {reason}.") from error
    return cls(**values)


def parse_pipeline(text: str, available: Iterable[type[Pass]]) -> list[Pass]:
    """Reads a pipeline such as `canonicalise,rtn{bits=4,group=64}`.

    Raises:
        UsageError: the text is not a pipeline, or names what does not exist.
    """
    available = list(available)
    return [make_pass(name, options, available) for name, options in _split(text)]


def _split(text: str) -> list[tuple[str, dict[str, str]]]:
    steps: list[tuple[str, dict[str, str]]] = []
    at = 0
    while at < len(text):
        end = at
        while end < len(text) and text[end] not in ",{":
            end += 1
        name, options = text[at:end].strip(), dict[str, str]()
        if not name:
            raise UsageError(f"Pipeline '{text}' has no pass name at column {at + 1}.")
        if end < len(text) and text[end] == "{":
            options, end = _options(text, end + 1)
        while end < len(text) and text[end].isspace():
            end += 1
        if end < len(text) and text[end] != ",":
            raise UsageError(f"Pipeline '{text}' wants a comma at column {end + 1}.")
        steps.append((name, options))
        at = end + 1
    if not steps:
        raise UsageError("The pipeline is empty; name at least one pass.")
    return steps


def _options(text: str, at: int) -> tuple[dict[str, str], int]:
    options: dict[str, str] = {}
    key, value, quoted, in_value = "", "", False, False
    for column in range(at, len(text)):
        char = text[column]
        if char == '"':
            quoted = not quoted
        elif quoted:
            value += char
        elif char == "=" and not in_value:
            in_value = True
        elif char in ",}":
            if key.strip() and not in_value:
                raise UsageError(f"Option '{key.strip()}' in pipeline '{text}' has no value; write it as KEY=VALUE.")
            if key.strip():
                options[key.strip()] = value.strip()
            key, value, in_value = "", "", False
            if char == "}":
                return options, column + 1
        elif in_value:
            value += char
        else:
            key += char
    raise UsageError(f"Pipeline '{text}' lacks a closing brace.")


class Pipeline:
    """Runs passes in order, the verifier before and after each."""

    def __init__(self, passes: Sequence[Pass], callbacks: Sequence[Callback] = ()) -> None:
        self.passes = tuple(passes)
        self.callbacks = tuple(callbacks)
        self.records: list[StepRecord] = []

    def __str__(self) -> str:
        return ",".join(map(str, self.passes))

    def run(self, program: Program, context: PassContext | None = None) -> Program:
        """The program after all passes; `records` then tells what each did.

        Raises:
            HikuiError: a pass cannot take the program; the sentence names the pass.
            VerificationError: a pass broke an invariant.
        """
        context = context or PassContext()
        self.records = []
        verify(program)
        for index, step in enumerate(self.passes):
            own = replace(context, resume=context.resume.scope(f"{index}-{step.name}"))
            for callback in self.callbacks:
                callback.before(step, program)
            start = time.perf_counter()
            try:
                step.requires(program)
                result = step.run(program, own)
                verify(result.program)
                step.ensures(result.program)
            except VerificationError as error:
                raise VerificationError(f"Pass {step.name}: {error}") from error
            except HikuiError as error:
                raise type(error)(f"Pass {step.name}: {error}") from error
            give_back()
            seconds = time.perf_counter() - start
            self.records.append(StepRecord(str(step), result.modified, seconds, tuple(result.notes)))
            for callback in self.callbacks:
                callback.after(step, result, seconds)
            program = result.program
        return program
