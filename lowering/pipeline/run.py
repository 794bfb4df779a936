"""The loop that runs passes, the verifier before and after each."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Protocol

from hikui.lowering.errors import VerificationError
from hikui.lowering.ir.printer import to_text
from hikui.lowering.ir.program import Program
from hikui.lowering.ir.verifier import verify
from hikui.lowering.memory import give_back
from hikui.lowering.pipeline.contract import Pass, PassContext, PassResult
from hikui.lowering.pipeline.text import pipeline_text


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


class InputUnchanged:
    """A callback that holds passes to leaving the program alone that they are given; it prints programs, so it costs.

    Raises:
        VerificationError: the text of the program changed.
    """

    def before(self, step: Pass, program: Program) -> None:
        """Remembers the program as it comes in."""
        self._program, self._text = program, to_text(program)

    def after(self, step: Pass, result: PassResult, seconds: float) -> None:
        """Compares."""
        if to_text(self._program) != self._text:
            raise VerificationError(f"Pass {step.name} changed the program that it was given.")


class Pipeline:
    """Runs passes in order, the verifier before and after each."""

    def __init__(self, passes: Sequence[Pass], callbacks: Sequence[Callback] = ()) -> None:
        self.passes = tuple(passes)
        self.callbacks = tuple(callbacks)
        self.records: list[StepRecord] = []

    def __str__(self) -> str:
        return pipeline_text(self.passes)

    def scopes(self) -> list[str]:
        """The name of what is kept of each pass, which depends on all passes up to it and on none behind."""
        digests = [sha256(pipeline_text(self.passes[: index + 1]).encode()) for index in range(len(self.passes))]
        return [
            f"{index}-{step.name}-{digest.hexdigest()[:16]}"
            for index, (step, digest) in enumerate(zip(self.passes, digests, strict=True))
        ]

    def run(self, program: Program, context: PassContext | None = None) -> Program:
        """The program after all passes; `records` then tells what each did.

        Raises:
            HikuiError: a pass cannot take the program.
            VerificationError: a pass broke an invariant.

        Whatever a pass raises has a note with its name.
        """
        context = context or PassContext()
        self.records = []
        verify(program)
        for step, scope in zip(self.passes, self.scopes(), strict=True):
            own = replace(context, resume=context.resume.scope(scope))
            for callback in self.callbacks:
                callback.before(step, program)
            start = time.perf_counter()
            try:
                step.requires(program)
                result = step.run(program, own)
                if result.modified == (result.program is program):
                    said = "a change and gives back" if result.modified else "no change and gives back not"
                    raise VerificationError(f"It says that there is {said} the program that it was given.")
                verify(result.program)
                step.ensures(result.program)
            except Exception as error:
                error.add_note(f"Pass {step.name}")
                raise
            give_back()
            seconds = time.perf_counter() - start
            self.records.append(StepRecord(str(step), result.modified, seconds, tuple(result.notes)))
            for callback in self.callbacks:
                callback.after(step, result, seconds)
            program = result.program
        return program
