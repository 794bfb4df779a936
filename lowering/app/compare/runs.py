"""The runs of a comparison: which there are, doing one, and keeping what it gave."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hikui.lowering.app.notices import text_notices
from hikui.lowering.app.request import Execution, Request, available_passes, load_recipe
from hikui.lowering.app.runnable_model import open_runnable_model
from hikui.lowering.artefact import text
from hikui.lowering.artefact.manifest import MANIFEST, is_artefact, read_manifest, sha256
from hikui.lowering.engine.resume import code_version, run_key
from hikui.lowering.errors import HikuiError, UsageError
from hikui.lowering.evaluation import protocols
from hikui.lowering.evaluation import quality as evaluation
from hikui.lowering.evaluation.quality import Score
from hikui.lowering.files import write_whole
from hikui.lowering.ir.program import Program
from hikui.lowering.json_text import parse_json
from hikui.lowering.pipeline.recipe import Recipe
from hikui.models import calibration as built_in

FLOAT = "float model"
"""Label of the model as it was traced, which differences are from."""

_RUNS = "runs"


@dataclass(frozen=True)
class Reading:
    """What every run is measured on, and what its passes calibrate on.

    Attributes:
        documents: read only the first so many.
        window: tokens that are read at a time; None reads each document alone.
        stride: tokens that each window predicts.
        context: the model's context length; by default its own.
    """

    text: Path
    calibration: Path | None = None
    documents: int | None = None
    window: int | None = None
    stride: int | None = None
    context: int | None = None
    tokenizer: Path | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Run:
    """One measurement, picklable.

    Attributes:
        label: of its row.
        model: a model or an artefact.
        recipe: None for the float model and for artefacts.
        calibrates: whether the calibration text matters to it.
        seed: of the calibration windows; None where nothing is drawn.
        key: of all that the result depends on; empty where nothing is kept.
        folder: where results are kept.
    """

    label: str
    model: str
    reading: Reading
    recipe: Recipe | None = None
    calibrates: bool = False
    seed: int | None = None
    key: str = ""
    folder: Path | None = None


@dataclass(frozen=True)
class Outcome:
    """What a run gave.

    Attributes:
        notices: sentences that a user should read before the figures are believed.
    """

    label: str
    runs_as: str
    seed: int | None
    protocol: str
    block_bpw: float
    true_bpw: float
    all_bpw: float
    linear_bytes: int
    total_bytes: int
    each: tuple[Score, ...]
    notices: tuple[str, ...] = ()


def plan(
    model: str,
    reading: Reading,
    *,
    recipes: Sequence[str],
    artefacts: Sequence[str],
    seeds: Sequence[int],
    budgets: Sequence[float],
) -> list[Run]:
    """The runs, in the order of the table; only recipes and texts are read.

    Raises:
        UsageError: as `compare`.
    """
    if not recipes and not artefacts:
        raise UsageError("There is nothing to compare; give --recipes NAMES, --artefacts DIRS, or both.")
    if is_artefact(Path(model)):
        raise UsageError(f"{model} is an artefact; give the model that it was made from, and it with --artefacts.")
    if len(set(seeds)) < len(seeds) or not seeds:
        raise UsageError("The --seeds are numbers, each given once.")
    for path in (reading.text, reading.calibration):
        if path is not None:
            text.read_text(path)
    runs = [Run(FLOAT, model, reading)]
    for name in recipes:
        runs += _runs_of_recipe(name, model, reading, seeds, budgets)
    if budgets and not any(_keeps_to_a_budget(load_recipe(name)) for name in recipes):
        raise UsageError("--target-bpw has no effect: none of the recipes has a pass that keeps to a budget (assign).")
    for name in artefacts:
        read_manifest(Path(name))
        if reading.context is not None:
            raise UsageError(f"{name} is an artefact, whose context is fixed; leave out --context.")
        runs.append(Run(Path(name).resolve().name, name, reading))
    _refuse_twice([(run.label, run.seed) for run in runs])
    return runs


def _runs_of_recipe(
    name: str, model: str, reading: Reading, seeds: Sequence[int], budgets: Sequence[float]
) -> Iterator[Run]:
    """A run for each budget that the recipe has a use for, and for each seed where it calibrates."""
    recipe = load_recipe(name)
    for budget in budgets if budgets and _keeps_to_a_budget(recipe) else (None,):
        chosen = load_recipe(recipe, budget)
        label = recipe.name if budget is None else f"{recipe.name} at {budget:g} bits"
        if not any(step.calibrates for step in chosen.build(available_passes())):
            yield Run(label, model, reading, chosen)
            continue
        for seed in seeds:
            drawn = chosen.calibration.model_copy(update={"seed": seed})
            yield Run(label, model, reading, chosen.model_copy(update={"calibration": drawn}), True, seed)


def _keeps_to_a_budget(recipe: Recipe) -> bool:
    return any(step.budget for step in recipe.build(available_passes()))


def measure(run: Run) -> Outcome:
    """Does one run, and keeps its result if it has a folder."""
    reading = run.reading
    of_model = not is_artefact(Path(run.model))
    notices: list[str] = []
    runnable = open_runnable_model(
        Request(
            run.model,
            recipe=run.recipe,
            calibration=reading.calibration if run.calibrates else None,
            context=reading.context if of_model else None,
            tokenizer=reading.tokenizer,
            trust_remote_code=reading.trust_remote_code,
        ),
        Execution(warn=notices.append),
    )
    protocol, excerpts = protocols.read(
        text.read_text(reading.text), runnable.codec, context=runnable.runner.context_length,
        window=reading.window, stride=reading.stride, limit=reading.documents,
    )  # fmt: skip
    quality, _ = evaluation.measure(runnable.runner, excerpts)
    runnable.runner.close()
    outcome = Outcome(
        run.label,
        runnable.kind,
        run.seed,
        str(protocol),
        runnable.block_bpw,
        runnable.true_bpw,
        runnable.all_bpw,
        runnable.linear_bytes,
        runnable.total_bytes,
        quality.each,
        (*notices, *text_notices(excerpts)),
    )
    keep(run, outcome)
    return outcome


def _refuse_twice(labels: Sequence[tuple[str, int | None]]) -> None:
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise UsageError(f"Two things to compare are called {twice[0]}; give each once, under a name of its own.")


# ── what is kept ────────────────────────────────────────────────────────────────────────────────────────────────────


def keys(traced: Program, runs: Sequence[Run]) -> list[str]:
    """A key for each run: the model, the code, the recipe with its seed, the texts and how they are read."""
    reading = runs[0].reading
    tokenizer = "" if traced.tokenizer is None else traced.tokenizer.content()
    common = {
        "model": run_key(traced, "", ()),
        "tokenizer": hashlib.sha256(tokenizer.encode()).hexdigest(),
        "code": code_version(),
        "text": sha256(reading.text),
        "documents": reading.documents,
        "window": reading.window,
        "stride": reading.stride,
        "context": reading.context,
    }
    calibration = sha256(built_in.path() if reading.calibration is None else reading.calibration)
    known, keys = available_passes(), []
    for run in runs:
        subject = {
            "label": run.label,
            "recipe": "" if run.recipe is None else run.recipe.resolved(known),
            "passes": "" if run.recipe is None else code_version(type(step) for step in run.recipe.build(known)),
            "artefact": sha256(Path(run.model) / MANIFEST) if is_artefact(Path(run.model)) else "",
            "calibration": calibration if run.calibrates else "",
            "seed": run.seed,
        }
        digest = hashlib.sha256(json.dumps([common, subject], sort_keys=True).encode())
        keys.append(digest.hexdigest()[:32])
    return keys


def _path(run: Run) -> Path:
    assert run.folder is not None, "nothing is kept"
    return run.folder / _RUNS / f"{run.key}.json"


def keep(run: Run, outcome: Outcome) -> None:
    """Saves what a run gave, where results are kept.

    Raises:
        HikuiError: the folder cannot take it.
    """
    if run.folder is not None:
        write(_path(run), json.dumps(asdict(outcome), indent=1) + "\n")


def load(run: Run) -> Outcome | None:
    """An earlier result of the same run; what is no such is measured again."""
    if run.folder is None:
        return None
    try:
        content = parse_json(_path(run).read_text("utf-8"))
        each = tuple(Score(**score) for score in content.pop("each"))
        return Outcome(**{**content, "each": each, "notices": tuple(content.get("notices", ()))})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def claim(folder: Path) -> None:
    """Makes the folder, and refuses one that holds something else."""
    if folder.exists() and not folder.is_dir():
        raise HikuiError(f"{folder} exists and is not a folder; choose another -o.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / _RUNS).is_dir():
        raise HikuiError(f"{folder} holds something else than a comparison; choose another -o, or empty it.")
    try:
        (folder / _RUNS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HikuiError(f"{folder} cannot be written: {error.strerror}; choose another -o.") from None


def write(path: Path, content: str | bytes) -> None:
    """Writes a file that is whole or absent.

    Raises:
        HikuiError: the folder cannot take it.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        write_whole(path, lambda beside: beside.write_bytes(data))
    except OSError as error:
        raise HikuiError(
            f"{path.parent} cannot be written: {error.strerror}; make room or choose another -o."
        ) from None
