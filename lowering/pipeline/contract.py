"""The contract of a pass.

A pass is a frozen dataclass. Its fields are its options, in a recipe, on the command line (`rtn{bits=4,group=64}`) and
in Python alike. It never changes the program it is given: it works on a clone, or returns the same program and says
`modified=False`.
"""

import json
import math
from abc import ABCMeta, abstractmethod
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from hikui.lowering.engine.jobs import Jobs
from hikui.lowering.engine.resume import Resume
from hikui.lowering.errors import UsageError
from hikui.lowering.ir.program import Program
from hikui.lowering.progress import Announce, Progress, no_announcement, no_progress


@dataclass(frozen=True)
class Calibration:
    """Text to measure a model on.

    Attributes:
        chunks: int64 [1, T] token tensors, T at most the context length.
        source: where the text came from, for the manifest.
        long: longer ones, which passes that learn read too.
    """

    chunks: tuple[Tensor, ...]
    source: str = ""
    long: tuple[Tensor, ...] = ()


@dataclass
class PassContext:
    """What a pass may use beside the program.

    Attributes:
        calibration: text to measure on, if any was given.
        scratch: folder for tensors and for activations that do not fit in memory; None: memory, the system's folder.
        resume: where finished work is kept; a pass has a scope of its own.
        workers: threads; None is as many as torch uses. Results do not depend on it.
        memory: bytes that a pass may need at its peak; None is what the machine has free.
        jobs: where independent work is done.
        announce: told what a pass is about to need.
        warn: told what may make the result worse than its user expects.
        training: text to learn from, where it is another than that to measure on.
    """

    calibration: Calibration | None = None
    scratch: Path | None = None
    progress: Progress = no_progress
    resume: Resume = field(default_factory=Resume)
    workers: int | None = None
    memory: int | None = None
    jobs: Jobs = field(default_factory=Jobs)
    announce: Announce = no_announcement
    warn: Announce = no_announcement
    training: Calibration | None = None

    @property
    def to_learn_from(self) -> Calibration | None:
        """The text of passes that learn."""
        return self.calibration if self.training is None else self.training


@dataclass
class PassResult:
    """What a pass gives back: the new program, whether it differs, and what the report should say."""

    program: Program
    modified: bool
    notes: list[str] = field(default_factory=list)


MOST = (1 << 63) - 1
"""The largest whole number that an option may have, because generators and tensors take no larger one."""


class _Checked(ABCMeta):
    """Looks at the numbers of every pass that is made, wherever its options come from."""

    def __call__(cls, *args: Any, **options: Any) -> Any:
        names = [option.name for option in fields(cls)]  # type: ignore[arg-type]  # every pass is a dataclass
        for option, value in (*zip(names, args, strict=False), *options.items()):
            _check_number(cls.name, option, value)  # type: ignore[attr-defined]  # and has a name
        return super().__call__(*args, **options)


def _check_number(name: str, option: str, value: object) -> None:
    """Raises UsageError for a number that no option can have; what else a pass asks of its options it says itself."""
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{name} cannot take {option}={value}; give a finite number.")
    least = 0 if option == "seed" else -MOST
    if isinstance(value, int) and not (least <= value <= MOST):
        raise UsageError(f"{name} cannot take {option}={_short(value)}; give a whole number from {least} to {MOST}.")


def _short(value: int) -> str:
    return str(value) if abs(value) < 10**30 else "a number of so many digits"


@dataclass(frozen=True)
class Pass(metaclass=_Checked):
    """Base of every pass, whose numbers are finite.

    Attributes:
        name: as in pipelines and recipes.
        calibrates: whether it needs `PassContext.calibration`, so that a run without any is refused before it starts.
        names_sites: whether linear sites have their names from it, which what is said of sites must come after.
        evens_columns: whether it makes the columns of activations more alike, so that rounding leaves more of each.
        budget: the option that holds a budget in bits per weight, or empty.
        size_budget: the option that holds one in megabytes of all weights, or empty.
        latency_budget: the option that holds one in milliseconds of a token's products, or empty; it has an option
            `speeds` too.
    """

    name: ClassVar[str]
    calibrates: ClassVar[bool] = False
    names_sites: ClassVar[bool] = False
    evens_columns: ClassVar[bool] = False
    budget: ClassVar[str] = ""
    size_budget: ClassVar[str] = ""
    latency_budget: ClassVar[str] = ""

    def requires(self, program: Program) -> None:
        """Checks that the program can be taken.

        Raises:
            HikuiError: something is missing, in one sentence that says which pass or input brings it.
        """

    @abstractmethod
    def run(self, program: Program, context: PassContext) -> PassResult:
        """Does the work.

        The program that comes in stays as it is. What goes out is another one and `modified`, or the same object and
        not `modified`.
        """

    def ensures(self, program: Program) -> None:
        """Checks what the pass promises of its result.

        Raises:
            VerificationError: the promise is broken.
        """

    def __str__(self) -> str:
        """The pass as a pipeline states it, with the options that differ from their defaults; it reads back."""
        options = [f"{f.name}={_literal(getattr(self, f.name))}" for f in fields(self) if not self._is_default(f)]
        return f"{self.name}{{{','.join(options)}}}" if options else self.name

    def _is_default(self, option: Field[Any]) -> bool:
        default = option.default if option.default_factory is MISSING else option.default_factory()
        return bool(getattr(self, option.name) == default)


def _literal(value: object) -> str:
    """A value as `parse_pipeline` reads it: numbers with all of their digits, text quoted where it has to be."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    text = value if isinstance(value, str) else json.dumps(value)
    if text and text == text.strip() and not set(text) & set(',{}"='):
        return text
    return '"' + text.replace('"', '""') + '"'
