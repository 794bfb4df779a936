"""compare: the table against runs done one by one, and what is kept between calls."""

import json
import math
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hikui.lowering.app.compare import runs as comparison_runs
from hikui.lowering.app.compare.report import PICTURES, RESULTS, TABLE, draw, markdown, save
from hikui.lowering.app.compare.runs import FLOAT, Outcome, Reading, Run
from hikui.lowering.app.compare.table import Comparison, as_json, compare
from hikui.lowering.app.request import Request, load_recipe
from hikui.lowering.app.runnable_model import open_runnable_model
from hikui.lowering.artefact.manifest import Artefact
from hikui.lowering.artefact.text import read_text
from hikui.lowering.errors import HikuiError, UsageError
from hikui.lowering.evaluation import protocols
from hikui.lowering.evaluation import quality as evaluation
from hikui.lowering.ir.program import Program
from hikui.lowering.trace import trace
from hikui.models.synthetic import tiny_checkpoint

CALIBRATED = """
schema: 1
name: calibrated
calibration: {samples: 2, tokens: 16}
passes:
  - canonicalise
  - calibrate
  - sensitivity: {metric: weight, formats: int2-g32|int3-g32}
  - assign: {target_bpw: 5.0, formats: int2-g32|int3-g32}
  - rtn: {weighted: true}
  - pack: {format: float32}
"""


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("recipes") / "calibrated.yaml"
    path.write_text(CALIBRATED)
    return str(path)


@pytest.fixture(scope="module")
def reading(stories: Path) -> Reading:
    return Reading(stories, calibration=stories, documents=4)


@pytest.fixture(scope="module")
def found(tiny: Path, reading: Reading, calibrated: str) -> Comparison:
    return compare(str(tiny), reading, recipes=["int8", calibrated], seeds=[0, 1])


@pytest.fixture(scope="module")
def traced(tiny: Path) -> Program:
    return trace(tiny)


@pytest.fixture
def measured(traced: Program, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Labels of the runs that are really done, each at once with a made-up result that is kept."""
    # Tracing is most of the time of a comparison that measures nothing.
    monkeypatch.setattr(Request, "traced", lambda *_, **__: traced)
    labels: list[str] = []

    def measure(run: Run) -> Outcome:
        labels.append(run.label)
        scores = tuple(evaluation.Score(10, 40, 20.0 + i + 0.1 * len(run.label)) for i in range(3))
        outcome = Outcome(run.label, "made up", run.seed, "words", 3.5, 4.0, 4.5, 100, 200, scores)
        comparison_runs.keep(run, outcome)
        return outcome

    monkeypatch.setattr(comparison_runs, "measure", measure)
    return labels


@pytest.fixture(scope="module")
def alone(tiny: Path, reading: Reading, calibrated: str) -> dict[int, tuple[tuple[evaluation.Score, ...], float]]:
    """The calibrating recipe's runs, by seed, through the functions of `hikui eval`: scores and true bits."""
    recipe, out = load_recipe(calibrated), {}
    for seed in (0, 1):
        settings = recipe.calibration.model_copy(update={"seed": seed})
        subject = open_runnable_model(
            Request(tiny, recipe=recipe.model_copy(update={"calibration": settings}), calibration=reading.calibration)
        )
        _, excerpts = protocols.read(read_text(reading.text), subject.codec, context=64, limit=4)
        out[seed] = evaluation.measure(subject.runner, excerpts)[0].each, subject.true_bpw
    return out


def test_the_table_is_that_of_runs_done_one_by_one(
    found: Comparison, alone: dict[int, tuple[tuple[evaluation.Score, ...], float]]
) -> None:
    base, int8, row = found.rows
    assert [r.label for r in found.rows] == [FLOAT, "int8", "calibrated"]
    assert (found.parts, found.unit, base.seeds, int8.seeds, row.seeds) == (4, "document", (), (), (0, 1))
    assert base.difference.bits_per_char == 0
    assert base.true_bpw == 32
    bits = [sum(s.nats for s in each) / math.log(2) / sum(s.characters for s in each) for each, _ in alone.values()]
    assert bits[0] != bits[1]
    assert row.bits_per_char == pytest.approx(np.mean(bits))
    assert row.spread == pytest.approx(np.std(bits, ddof=1))
    assert int8.spread is None
    assert row.true_bpw == pytest.approx(np.mean([bpw for _, bpw in alone.values()]))
    assert row.difference.bits_per_char == pytest.approx(row.bits_per_char - base.bits_per_char)
    assert row.difference.error is not None
    assert int8.difference.error is not None
    # The same documents in both: surer than either figure alone.
    unpaired = evaluation.Quality(alone[0][0]).bits_per_char_error
    assert unpaired is not None
    assert int8.difference.error < unpaired


def test_a_run_can_be_sent_to_another_process(
    tiny: Path,
    reading: Reading,
    calibrated: str,
    alone: dict[int, tuple[tuple[evaluation.Score, ...], float]],
) -> None:
    _, run = comparison_runs.plan(str(tiny), reading, recipes=[calibrated], artefacts=(), seeds=[1], budgets=())
    copy = pickle.loads(pickle.dumps(run))
    assert copy == run
    assert pickle.loads(pickle.dumps(comparison_runs.measure(copy))).each == alone[1][0]


def test_an_artefact_is_compared_with_the_model_it_was_made_from(
    tiny: Path, built: Artefact, stories: Path, tmp_path: Path
) -> None:
    table = compare(str(tiny), Reading(stories, documents=3), recipes=["rtn-4bit"], artefacts=[str(built.directory)])
    _, recipe, artefact = table.rows
    assert artefact.runs_as.startswith("artefact, tvm")
    assert artefact.true_bpw == pytest.approx(recipe.true_bpw)
    assert artefact.bits_per_char == pytest.approx(recipe.bits_per_char, rel=1e-3)
    other = tiny_checkpoint("qwen2", tmp_path / "qwen2")
    with pytest.raises(UsageError, match="was made from files with other hashes"):
        compare(str(other), Reading(stories), artefacts=[str(built.directory)])


def test_finished_runs_are_taken_up(
    tiny: Path, reading: Reading, calibrated: str, tmp_path: Path, measured: list[str]
) -> None:
    output = tmp_path / "out"

    def call(**changes: object) -> Comparison:
        options = {"recipes": ["int8", calibrated], "seeds": [0, 1], "output": output, **changes}
        return compare(str(tiny), changes.pop("reading", reading), **{**options, **changes})  # type: ignore[arg-type]

    first = call()
    assert measured == [FLOAT, "int8", "calibrated", "calibrated"]
    measured.clear()
    assert call() == first
    assert measured == []
    assert call(seeds=[0, 1, 2]).rows[2].seeds == (0, 1, 2)
    assert measured == ["calibrated"]
    measured.clear()
    call(recipes=["rtn-4bit"])
    assert measured == ["rtn-4bit"]
    measured.clear()
    call(resume=False)
    assert len(measured) == 4


def test_what_a_result_depends_on_is_in_its_key(
    tiny: Path, traced: Program, reading: Reading, calibrated: str, tmp_path: Path, stories: Path
) -> None:
    changed = tmp_path / "changed.txt"
    changed.write_text(stories.read_text() + " The end.")

    def keys(reading: Reading = reading, seeds: tuple[int, ...] = (0,)) -> list[str]:
        runs = comparison_runs.plan(
            str(tiny), reading, recipes=["int8", calibrated], artefacts=(), seeds=seeds, budgets=()
        )  # fmt: skip
        return comparison_runs.keys(traced, runs)

    base = keys()
    assert len(set(base)) == 3
    assert keys() == base
    others = keys(replace(reading, calibration=changed))
    # Another calibration text matters to what calibrates, and to nothing else.
    assert [a == b for a, b in zip(base, others, strict=True)] == [True, True, False]
    assert [a == b for a, b in zip(base, keys(seeds=(3,)), strict=True)] == [True, True, False]
    for other in (
        replace(reading, text=changed),
        replace(reading, documents=3),
        replace(reading, window=20, stride=10),
        replace(reading, window=20, stride=20),
    ):
        assert not set(keys(other)) & set(base)


def test_a_comparison_that_died_keeps_what_had_ended(
    tiny: Path, reading: Reading, tmp_path: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inner: Callable[[Run], Outcome] = comparison_runs.measure

    def dies(run: Run) -> Outcome:
        if run.label == "rtn-4bit":
            raise KeyboardInterrupt
        return inner(run)

    monkeypatch.setattr(comparison_runs, "measure", dies)
    with pytest.raises(KeyboardInterrupt):
        compare(str(tiny), reading, recipes=["int8", "rtn-4bit"], output=tmp_path / "out")
    assert measured == [FLOAT, "int8"]
    monkeypatch.setattr(comparison_runs, "measure", inner)
    # A file that was cut off, as a disk without journal may leave it, counts as no result.
    cut = sorted((tmp_path / "out" / "runs").iterdir())[0]
    cut.write_bytes(cut.read_bytes()[:-20])
    compare(str(tiny), reading, recipes=["int8", "rtn-4bit"], output=tmp_path / "out")
    assert len(measured) == 4
    assert measured[-1] == "rtn-4bit"


def test_the_same_comparison_gives_the_same_bytes(found: Comparison, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (the extra `plot`)")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        assert save(found, tmp_path / name)
    names = sorted(os.listdir(tmp_path / "one"))
    assert names == sorted((RESULTS, TABLE, *PICTURES))
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert json.loads((tmp_path / "one" / RESULTS).read_text()) == json.loads(json.dumps(as_json(found)))
    picture = draw(found, "svg").decode()
    assert all(row.label in picture for row in found.rows)
    assert "<dc:date>" not in picture
    assert draw(found, "png").startswith(b"\x89PNG")


def test_the_table_for_people_holds_every_row(found: Comparison) -> None:
    text = markdown(found)
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(lines) == 2 + len(found.rows)
    assert f"{found.rows[2].bits_per_char:.4f}" in lines[4]
    assert "±" in lines[3]
    assert "±" not in lines[2]
    assert "paired over documents" in text


def test_budgets_make_a_row_each(tiny: Path, reading: Reading, calibrated: str) -> None:
    def labels(recipes: list[str], budgets: list[float]) -> list[str]:
        runs = comparison_runs.plan(str(tiny), reading, recipes=recipes, artefacts=(), seeds=[0], budgets=budgets)
        return [run.label for run in runs]

    assert labels(["int8", calibrated], [5.0, 6.5]) == [FLOAT, "int8", "calibrated at 5 bits", "calibrated at 6.5 bits"]
    with pytest.raises(UsageError, match="none of the recipes has a pass that keeps to a budget"):
        labels(["int8"], [5.0])


def test_a_wrong_request_is_refused_before_anything_runs(
    tiny: Path, stories: Path, reading: Reading, calibrated: str, tmp_path: Path, measured: list[str], built: Artefact
) -> None:
    plain = Reading(stories)
    for words, options in (
        ("nothing to compare", {}),
        ("Did you mean 'int4'", {"recipes": ["int44"]}),
        ("each given once", {"recipes": ["int8"], "seeds": [1, 1]}),
        ("Two things to compare are called int8", {"recipes": ["int8", "int8"]}),
        ("longer than the context of 64", {"reading": Reading(stories, window=65), "recipes": ["int8"]}),
        ("No such file", {"reading": Reading(tmp_path / "none"), "recipes": ["int8"]}),
        ("is not an artefact", {"artefacts": [str(tmp_path)]}),
        ("whose context is fixed", {"reading": Reading(stories, context=32), "artefacts": [str(built.directory)]}),
    ):
        chosen = dict(options)
        with pytest.raises(HikuiError, match=words):
            compare(str(tiny), chosen.pop("reading", reading), **chosen)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="give the model that it was made from"):
        compare(str(built.directory), plain, recipes=["int8"])
    (tmp_path / "mine.txt").write_text("something else")
    with pytest.raises(HikuiError, match="holds something else than a comparison"):
        compare(str(tiny), plain, recipes=["int8"], output=tmp_path)
    with pytest.raises(HikuiError, match="is not a folder"):
        compare(str(tiny), plain, recipes=["int8"], output=tmp_path / "mine.txt")
    assert measured == []
