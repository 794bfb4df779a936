"""Zero-shot tasks through lm-eval (EleutherAI's lm-evaluation-harness), from local files alone.

A task is a file of JSON lines, or one of lm-eval's own YAML configurations that names local data. Nothing is fetched.
"""

import contextlib
import functools
import importlib.util
import io
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hikui.lowering.artefact.generate import Runner
from hikui.lowering.artefact.text import TextCodec
from hikui.lowering.errors import HikuiError, UsageError, first_line
from hikui.lowering.evaluation.quality import Progress
from hikui.lowering.json_text import not_utf8, parse_json
from hikui.lowering.progress import no_progress
from hikui.lowering.yaml_text import compose

BOOTSTRAP = 1000
"""Draws for the standard error of what has no closed form, such as a perplexity."""

_OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1", "DISABLE_MULTIPROC": "1"}
_FORMS = "'context', 'choices' and 'label', or 'context' and 'target', or 'text', whose last word is the target"


@dataclass(frozen=True)
class TaskFile:
    """A task as it lies on disk.

    Attributes:
        rows: of a JSON-lines file, in one form; None for a YAML configuration, which lm-eval reads itself.
        choices: whether the rows offer choices, rather than one target to predict.
    """

    path: Path
    rows: tuple[dict[str, Any], ...] | None = None
    choices: bool = False


@dataclass(frozen=True)
class Figure:
    """A metric with its standard error, as lm-eval gives them; None where it gives none."""

    value: float
    error: float | None


@dataclass(frozen=True)
class TaskScore:
    """A task's metrics by name, over so many documents."""

    name: str
    documents: int
    figures: dict[str, Figure]


@dataclass(frozen=True)
class HarnessReport:
    """What the tasks gave.

    Attributes:
        prefix: what stood before each request, in words.
        truncated: requests that lost tokens on their left, to fit the context.
    """

    tasks: tuple[TaskScore, ...]
    prefix: str
    truncated: int


def read_tasks(names: Sequence[str]) -> list[TaskFile]:
    """The tasks of files and folders; a folder stands for its .jsonl and .yaml files.

    Raises:
        UsageError: a file is missing or is no task, or two tasks have one name; the sentence names the file and line.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError("Tasks need lm-eval; install hikui[eval].")
    files: list[TaskFile] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            found = sorted(entry for entry in path.iterdir() if entry.suffix in (".jsonl", ".yaml"))
            if not found:
                raise UsageError(f"The folder {path} holds no task; tasks are .jsonl and .yaml files.")
            files += [_read(entry) for entry in found]
        elif path.is_file():
            files.append(_read(path))
        else:
            raise UsageError(f"There is no task {path}; give a .jsonl or .yaml file, or a folder of them.")
    stems = [file.path.stem for file in files]
    twice = next((stem for stem in stems if stems.count(stem) > 1), None)
    if twice is not None:
        raise UsageError(f"Two tasks are called {twice}; rename one of the files.")
    return files


def _read(path: Path) -> TaskFile:
    if path.suffix == ".yaml":
        _check_configuration(path, frozenset())
        return TaskFile(path)
    if path.suffix != ".jsonl":
        raise UsageError(f"{path} is no task: tasks are .jsonl and .yaml files.")
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The task {path} cannot be read: {error}.") from None
    rows = [_row(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise UsageError(f"The task {path} is empty; a row has {_FORMS}.")
    choices = "choices" in rows[0]
    other = next((index for index, row in enumerate(rows) if ("choices" in row) != choices), None)
    if other is not None:
        raise UsageError(f"The task {path} mixes rows with choices and rows with a target; make two files of it.")
    return TaskFile(path, tuple(rows), choices)


def _check_configuration(path: Path, above: frozenset[Path]) -> None:
    """Refuses a configuration, or one that it includes, that is no YAML or too much of it."""
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The task {path} cannot be read: {error}.") from None
    node = compose(text, str(path), tags=("!function",))
    if node is None:
        raise UsageError(f"{path}:1: a task's configuration is a mapping, as lm-eval's are.")
    for key, value in node.value:
        if key.value == "include":
            for part in value.value if isinstance(value.value, list) else [value]:
                included = path.parent / str(part.value)
                if included.is_file() and included.resolve() not in above:
                    _check_configuration(included, above | {path.resolve()})


def _row(line: str, where: str) -> dict[str, Any]:
    """One row in the form that the task's configuration reads."""
    try:
        row = parse_json(line)
    except ValueError as error:
        raise UsageError(f"{where}: this is not JSON: {error}.") from None
    if not_utf8(json.dumps(row, ensure_ascii=False)) is not None:
        raise UsageError(f"{where}: this row holds half of a surrogate pair (\\ud800 to \\udfff), which is no text.")
    fields = row if isinstance(row, dict) else {}
    context, choices, label, target = (fields.get(key) for key in ("context", "choices", "label", "target"))
    if context is None and choices is None and isinstance(fields.get("text"), str):
        context, _, last = fields["text"].rstrip().rpartition(" ")
        target = f" {last}"
    if isinstance(context, str) and isinstance(choices, list):
        if len(choices) < 2 or not all(isinstance(choice, str) and choice for choice in choices):
            raise UsageError(f"{where}: 'choices' is a list of two texts or more.")
        if type(label) is not int or not 0 <= label < len(choices):
            raise UsageError(f"{where}: 'label' is the position of the right choice, 0 to {len(choices) - 1}.")
        spaced = any(choice[0].isspace() for choice in choices)
        return {"context": _spaced(context, spaced), "choices": choices, "label": label}
    if isinstance(context, str) and isinstance(target, str) and target.strip():
        return {"context": _spaced(context, target[0].isspace()), "target": target}
    known = ", ".join(map(repr, fields)) or "no fields"
    raise UsageError(f"{where}: this row has {known}; a task's row has {_FORMS}.")


def _spaced(context: str, already: bool) -> str:
    """A context with the space that parts it from what follows, where there is a context and none stands there yet."""
    return context if already or not context or context[-1].isspace() else f"{context} "


def run_tasks(
    runner: Runner,
    codec: TextCodec,
    files: Sequence[TaskFile],
    *,
    eos: Sequence[int],
    limit: int | None = None,
    trust_remote_code: bool = False,
    progress: Progress = no_progress,
) -> HarnessReport:
    """Runs tasks without examples in the context, as `num_fewshot: 0` does; a YAML configuration may say otherwise.

    Args:
        runner: the model.
        codec: its tokenizer.
        files: as `read_tasks` gives them.
        eos: tokens that end a text.
        limit: only the first so many documents of each task.
        trust_remote_code: run Python that a configuration names with `!function`, or a metric that is a script.
        progress: called with how many requests are done.

    Raises:
        UsageError: a YAML configuration is not one, names data that is not local or code that is not trusted, or has a
            template that fails.
        HikuiError: a request does not fit the model's context, or logits are not finite.
    """
    with _offline() as cache, _quiet(), _guarded(trust_remote_code) as refused:
        import datasets
        from lm_eval.api.task import ConfigurableTask
        from lm_eval.evaluator import evaluate

        from hikui.lowering.evaluation.harness_model import HarnessModel

        # Read from the environment when it was first imported, which may be long ago.
        datasets.config.HF_DATASETS_CACHE = cache
        datasets.config.HF_DATASETS_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        tasks: dict[str, Any] = {}
        for file in files:
            found = _configured(file) if file.rows is None else [ConfigurableTask(config=_configuration(file))]
            for task in found:
                if task.get_config("num_fewshot") is None:
                    task.set_config("num_fewshot", 0)
                task.set_fewshot_seed(seed=0)
                tasks[task.task_name] = task
        refused.check()
        model = HarnessModel(runner, codec, eos=eos, progress=progress)
        try:
            results = evaluate(model, {"tasks": tasks}, limit=limit, bootstrap_iters=BOOTSTRAP, log_samples=False)
        except (jinja2.TemplateError, OverflowError) as error:
            names = ", ".join(str(file.path) for file in files if file.rows is None)
            raise UsageError(f"A template of the task {names} cannot be rendered: {error}.") from None
        refused.check()
    scores = tuple(_score(name, found) for name, found in results["results"].items())
    return HarnessReport(scores, model.prefix, model.truncated)


def _configuration(file: TaskFile) -> dict[str, Any]:
    """lm-eval's configuration of a JSON-lines file; the rows hold their own spaces."""
    from datasets import Dataset

    common = {
        "task": file.path.stem,
        "custom_dataset": lambda **_: {"test": Dataset.from_list(list(file.rows or ()))},
        "test_split": "test",
        "doc_to_text": "context",
        "target_delimiter": "",
        "num_fewshot": 0,
    }
    if file.choices:
        return {
            **common,
            "output_type": "multiple_choice",
            "doc_to_choice": "choices",
            "doc_to_target": "label",
            "metric_list": [_metric("acc"), _metric("acc_norm")],
        }
    return {
        **common,
        "output_type": "loglikelihood",
        "doc_to_target": "target",
        "metric_list": [_metric("acc"), {**_metric("perplexity", "perplexity"), "higher_is_better": False}],
    }


def _metric(name: str, aggregation: str = "mean") -> dict[str, object]:
    return {"metric": name, "aggregation": aggregation, "higher_is_better": True}


def _configured(file: TaskFile) -> list[Any]:
    """The tasks of a YAML configuration; paths of its data count from its folder."""
    from lm_eval.tasks import TaskManager

    path = file.path.resolve()
    try:
        with contextlib.chdir(path.parent):
            manager = TaskManager(include_path=str(path.parent), include_defaults=False)
            return list(manager.load([str(path)])["tasks"].values())
    except HikuiError:
        raise
    except (jinja2.TemplateError, OverflowError) as error:
        raise UsageError(f"A template of the task {file.path} cannot be rendered: {error}.") from None
    except Exception as error:  # the library and its data loaders share no base class
        reason = first_line(error)
        raise UsageError(
            f"{file.path} is no task that can be run from local files: {reason}; give one of lm-eval's configurations "
            "with `dataset_path: json` and `data_files` that lie beside it."
        ) from None


def _score(name: str, found: dict[str, Any]) -> TaskScore:
    figures: dict[str, Figure] = {}
    for key, value in found.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = found.get(f"{metric}_stderr,{filtered}")
        shown = metric if filtered == "none" else f"{metric} ({filtered})"
        figures[shown] = Figure(float(value), float(error) if isinstance(error, int | float) else None)
    return TaskScore(name, int(found["sample_len"]), figures)


@contextlib.contextmanager
def _offline() -> Iterator[Path]:
    """Nothing is fetched, and what the libraries put by goes to a folder that is then removed."""
    before = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="hikui-tasks-") as folder:
        os.environ.update(_OFFLINE, HF_DATASETS_CACHE=folder)
        try:
            yield Path(folder)
        finally:
            os.environ.clear()
            os.environ.update(before)


class _Refused:
    """Stands in for what would run Python that a task names."""

    def __init__(self) -> None:
        self._name: str | None = None

    def __call__(self, name: str, *args: object, **options: object) -> None:
        self._name = str(name)
        self.check()

    def check(self) -> None:
        """Says it again where the library has swallowed it."""
        if self._name is not None:
            raise UsageError(
                f"A task asks for '{self._name}', which is Python code beside it and is not run; read that code, and "
                "give --trust-remote-code (trust_remote_code=True) if you trust it."
            )


@contextlib.contextmanager
def _guarded(trusted: bool) -> Iterator[_Refused]:
    """Templates run in a sandbox, and Python that a task names only where it is trusted."""
    from lm_eval import utils
    from lm_eval.tasks import _yaml_loader

    sandbox = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    sandbox.filters.update(utils.env.filters)
    refused = _Refused()
    replaced: list[tuple[Any, str, Any]] = [(utils, "env", sandbox)]
    if not trusted:
        replaced += [(_yaml_loader, name, refused) for name in ("_import_func_in_yml", "_import_fun_from_str")]
        if importlib.util.find_spec("evaluate") is not None:
            replaced.append((importlib.import_module("evaluate"), "load", refused))
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    for owner, name, value in replaced:
        setattr(owner, name, value)
    try:
        yield refused
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the harness's bars, prints and warnings away from ours, and from JSON on stdout."""
    from tqdm import tqdm

    logger = logging.getLogger("lm_eval")
    level, start = logger.level, tqdm.__init__
    logger.setLevel(logging.ERROR)
    # It has no option for its bars.
    setattr(tqdm, "__init__", functools.partialmethod(start, disable=True))  # noqa: B010
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        setattr(tqdm, "__init__", start)  # noqa: B010
        logger.setLevel(level)
