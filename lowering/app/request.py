"""What a user asks for, in one object, and how the work on it is to be done, in another."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypedDict

from hikui.lowering.app.speeds import read_speeds
from hikui.lowering.engine.jobs import Jobs
from hikui.lowering.errors import UsageError
from hikui.lowering.ir.program import Program
from hikui.lowering.pipeline import recipe as recipes
from hikui.lowering.pipeline.contract import Pass
from hikui.lowering.pipeline.recipe import Recipe
from hikui.lowering.progress import Announce, Progress, log_warning, no_announcement, no_progress
from hikui.lowering.trace import Fidelity, trace, trace_and_compare

if TYPE_CHECKING:
    from torch import nn

REFERENCE_MODEL = "reference"

Model: TypeAlias = "str | Path | nn.Module"


class RequestOptions(TypedDict, total=False):
    """The fields of a `Request` beside the model, as keywords; see there."""

    recipe: str | Path | Recipe | None
    calibration: str | Path | None
    context: int | None
    target_bpw: float | None
    target_size: float | None
    target_latency: float | None
    speeds: str | Path | None
    tokenizer: str | Path | None
    trust_remote_code: bool


@dataclass(frozen=True)
class Request:
    """A model, and what is to become of it.

    Attributes:
        model: a Hugging Face folder or id, a GGUF file, a transformers model, `reference` for the model that comes with
            hikui, or `smollm2` for the one that `hikui fetch smollm2` brings.
        recipe: a shipped recipe's name, a recipe file, or a recipe; None is the float model as it is.
        calibration: text that calibrating passes read, documents separated by `<|endoftext|>`; by default the one that
            comes with hikui.
        context: context length; by default the model's own, at most 2048.
        target_bpw: budget in bits per weight for the pass of the recipe that keeps to one.
        target_size: budget in megabytes (10⁶ bytes) of the whole artefact, for the same pass.
        target_latency: budget in milliseconds that the products of a token take on one thread, for the same pass.
        speeds: what `hikui bench --json` has written on the machine that `target_latency`, or a prediction, is for.
        tokenizer: folder with a tokenizer, instead of the model's own.
        trust_remote_code: run Python files that come with the model, the tokenizer or a task; otherwise what needs them
            is refused.
    """

    model: Model
    recipe: str | Path | Recipe | None = "int4"
    calibration: str | Path | None = None
    context: int | None = None
    target_bpw: float | None = None
    tokenizer: str | Path | None = None
    trust_remote_code: bool = False
    target_size: float | None = None
    target_latency: float | None = None
    speeds: str | Path | None = None

    def __post_init__(self) -> None:
        budgets = ("target_bpw", "target_size", "target_latency")
        given = [name for name in budgets if getattr(self, name) is not None]
        if len(given) > 1:
            raise UsageError(f"A budget is of one thing; leave out {' or '.join(given)}.")
        if self.target_latency is not None and self.speeds is None:
            raise UsageError(
                "A budget in milliseconds needs the machine's speeds; run `hikui bench --json` on it and give the file "
                "with --speeds."
            )

    @property
    def name(self) -> str:
        """The model's, for reports."""
        if not isinstance(self.model, str | Path):
            return type(self.model).__name__
        path = Path(self.model)
        return path.resolve().name if path.exists() else str(self.model)

    @property
    def source(self) -> Model:
        """What `trace` takes: the folder of `reference`, the file of a fetched model, else what was given.

        Raises:
            HikuiError: the model is one that `hikui fetch` brings, and it was not.
        """
        if self.model == REFERENCE_MODEL and not Path(REFERENCE_MODEL).exists():
            from hikui.models import reference

            return reference.path()
        if isinstance(self.model, str) and not Path(self.model).exists():
            from hikui.models.fetched import FETCHED

            if self.model in FETCHED:
                return FETCHED[self.model].require()
        return self.model

    def traced(self, *, scratch: Path | None = None, finite: bool = True) -> Program:
        """The model's program before any pass.

        Args:
            scratch: folder for tensors that passes make later; None keeps them in memory.
            finite: read the weights, and refuse those that are not finite.

        Raises:
            HikuiError: the model cannot be opened or traced.
        """
        return trace(
            self.source,
            context=self.context,
            scratch=scratch,
            tokenizer=self.tokenizer,
            finite=finite,
            trust_remote_code=self.trust_remote_code,
        )

    def compared(self, *, scratch: Path | None = None) -> tuple[Program, Fidelity]:
        """As `traced`, the program held to the logits of the model itself, and how far it was.

        Raises:
            HikuiError: the model cannot be opened or traced, or the trace is not the model.
        """
        return trace_and_compare(
            self.source,
            context=self.context,
            scratch=scratch,
            tokenizer=self.tokenizer,
            trust_remote_code=self.trust_remote_code,
        )

    def loaded_recipe(self, beside: int = 0) -> Recipe:
        """The recipe, its budget set to the one that is asked for; see `load_recipe`.

        Args:
            beside: bytes of the artefact that are no weights.
        """
        if self.recipe is None:
            raise UsageError(f"{self.name} is to be lowered, and no recipe says how; name one.")
        chosen = load_recipe(self.recipe, self.target_bpw)
        if self.target_latency is not None and self.speeds is not None:
            return chosen.with_latency(self.target_latency, str(read_speeds(self.speeds)), available_passes())
        if self.target_size is None:
            return chosen
        left = self.target_size - beside / 1e6
        if left <= 0:
            raise UsageError(
                f"A size of {self.target_size:g} MB leaves no room for weights: runtime, program and tokenizer take "
                f"{beside / 1e6:.1f} MB; raise it."
            )
        return chosen.with_size(left, available_passes())


@dataclass(frozen=True)
class Execution:
    """How work is done; nothing of this changes what comes out.

    Attributes:
        resume: keep what is finished in a hidden folder beside the output until all is, and go on from there after a
            kill; what another model, recipe, text or version of hikui has left there is not used.
        memory: bytes that passes may take; by default what the machine has free. A pass that needs more refuses.
        jobs: how independent work is spread.
        debug_dump: folder for the program's text and its diff after each pass.
        check_inputs: hold every pass to leaving the program alone that it was given.
        progress: called with what is being done.
        announce: told what passes are about to need.
        warn: told what a user should know before the numbers are believed.
    """

    resume: bool = True
    memory: int | None = None
    jobs: Jobs = field(default_factory=Jobs)
    debug_dump: Path | None = None
    check_inputs: bool = False
    progress: Progress = no_progress
    announce: Announce = no_announcement
    warn: Announce = log_warning


def available_passes() -> dict[str, type[Pass]]:
    """The passes of hikui and of installed third parties (entry points of the group `hikui.passes`), by name."""
    from hikui.passes import available

    return {kind.name: kind for kind in available()}


def load_recipe(recipe: str | Path | Recipe, target_bpw: float | None = None) -> Recipe:
    """A recipe by name, from a file, or as it is; with another budget in bits per weight where one is given.

    Raises:
        UsageError: it cannot be read, or has no use for the budget.
    """
    known = available_passes()
    chosen = recipe if isinstance(recipe, Recipe) else recipes.load(recipe, known)
    return chosen if target_bpw is None else chosen.with_budget(target_bpw, known)
