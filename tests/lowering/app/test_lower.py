import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import hikui
from hikui.lowering.app.assemble import Prepared, require_room
from hikui.lowering.app.lower import build, lower, make_artefact, make_backend, prepare, resume_folder, tokenizer_nbytes
from hikui.lowering.app.request import Execution, Request, load_recipe
from hikui.lowering.app.runners import open_runner
from hikui.lowering.artefact import verify as verify_artefact
from hikui.lowering.artefact.manifest import MANIFEST, Artefact, inventory
from hikui.lowering.artefact.target import resolve
from hikui.lowering.errors import HikuiError, UsageError
from hikui.lowering.formats import Packed
from hikui.lowering.ir.printer import to_text
from hikui.lowering.ir.program import Program
from hikui.lowering.pipeline.contract import PassContext, PassResult
from hikui.lowering.pipeline.recipe import CalibrationSettings
from hikui.lowering.trace import trace
from hikui.models import calibration as built_in
from hikui.passes.quantise.packer import Packer
from hikui.passes.quantise.rtn import Rtn


def lower_command(model: Path, output: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "hikui.lowering.app.cli", "lower", str(model), "-o", str(output), *options]


def test_two_runs_write_the_same_bytes(tiny: Path, built: Artefact, tmp_path: Path) -> None:
    again = lower(tiny, tmp_path / "elsewhere" / "again", recipe="rtn-4bit")
    assert inventory(again.directory) == inventory(built.directory)
    assert (again.directory / MANIFEST).read_bytes() == (built.directory / MANIFEST).read_bytes()


@pytest.mark.parametrize(
    ("recipe", "backend"),
    [
        ("float", "onnxruntime"),
        ("int8", "tvm"),
        ("mixed-5.5bit", "onnxruntime"),
        ("int4-branch", "tvm"),
        ("int4-branch", "onnxruntime"),
        ("awq-4bit", "tvm"),
        ("rotation-gptq-3bit", "onnxruntime"),
    ],
)
def test_every_shipped_recipe_gives_an_artefact_that_verifies(
    recipe: str, backend: str, tiny: Path, stories: Path, tmp_path: Path
) -> None:
    # Padding makes the tiny matrices take more than the recipe's 5.5 bits.
    budget = 7.0 if recipe == "mixed-5.5bit" else None
    artefact = lower(tiny, tmp_path / "out", recipe=recipe, calibration=stories, target_bpw=budget, backend=backend)
    check = verify_artefact.check_numbers(artefact, lambda: open_runner(artefact))
    assert check.passed
    verify_artefact.check_files(artefact)
    verify_artefact.check_libraries(artefact)
    read = yaml.safe_load((artefact.directory / "recipe.resolved.yaml").read_text())
    assert read["name"] == recipe
    calibration = artefact.manifest.provenance.calibration
    assert calibration is not None
    assert calibration["text"] == "stories.txt"


def test_the_budget_can_be_set_and_one_that_is_too_small_names_the_smallest(
    tiny: Path, stories: Path, tmp_path: Path
) -> None:
    prepared = prepare(Request(tiny, "mixed-5.5bit", calibration=stories, target_bpw=7.0))
    assert "assign{target_bpw=7.0}" in map(str, prepared.passes)
    with pytest.raises(HikuiError, match=r"smallest that can is \d\.\d+"):
        prepare(Request(tiny, "mixed-5.5bit", calibration=stories, target_bpw=1.0))


def test_without_a_text_a_recipe_measures_on_the_one_that_comes_with_hikui(tiny: Path) -> None:
    """The same windows as when the file is named, and the manifest says which file it was."""
    told: list[str] = []
    chosen = load_recipe("mixed-5.5bit").model_copy(update={"calibration": CalibrationSettings(samples=2, tokens=24)})
    silent = prepare(Request(tiny, chosen, target_bpw=7.0), Execution(announce=told.append))
    named = prepare(Request(tiny, chosen, calibration=built_in.path(), target_bpw=7.0))
    assert silent.calibration == named.calibration
    assert silent.calibration is not None
    assert silent.calibration["text"] == "english.txt"
    assert silent.calibration["tokens"] == 48
    assert to_text(silent.program) == to_text(named.program)
    assert any("measured on 48 tokens of the English prose and code" in sentence for sentence in told)


def test_without_text_and_tokenizer_tokens_are_drawn_and_that_is_a_warning(tiny: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink(missing_ok=True)
    chosen = load_recipe("mixed-5.5bit").model_copy(update={"calibration": CalibrationSettings(samples=2, tokens=24)})
    twice = [prepare(Request(folder, chosen, target_bpw=7.0)) for _ in range(2)]
    assert any("measured on 48 random tokens" in sentence for sentence in twice[0].notices)
    assert twice[0].calibration is not None
    assert twice[0].calibration["text"] == "random tokens"
    assert twice[0].calibration == twice[1].calibration
    other = chosen.model_copy(update={"calibration": CalibrationSettings(samples=2, tokens=24, seed=1)})
    third = prepare(Request(folder, other, target_bpw=7.0)).calibration
    assert third is not None and third["sha256"] != twice[0].calibration["sha256"]


def test_a_text_without_a_tokenizer_is_still_refused(tiny: Path, stories: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink(missing_ok=True)
    with pytest.raises(HikuiError, match="has no tokenizer, so .*stories.txt cannot be turned into tokens"):
        prepare(Request(folder, "mixed-5.5bit", calibration=stories))


def test_a_dump_shows_the_program_after_each_pass(tiny: Path, tmp_path: Path) -> None:
    prepared = prepare(Request(tiny, "rtn-4bit"), Execution(debug_dump=tmp_path / "dump"))
    names = sorted(path.name for path in (tmp_path / "dump").iterdir())
    assert names[0] == "00-trace.txt"
    assert [name for name in names if name.endswith(".txt")][1:] == [
        f"{number:02}-{step.name}.txt" for number, step in enumerate(prepared.passes, 1)
    ]
    events = [json.loads(line) for line in (tmp_path / "dump" / "events.jsonl").read_text().splitlines()]
    assert [event["pass"] for event in events] == [str(step) for step in prepared.passes]
    assert "hikui.linear" in (tmp_path / "dump" / "03-rtn.diff").read_text()


def test_unknown_names_are_refused_before_any_work(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no backend 'tvn'"):
        lower(tiny, tmp_path / "out", backend="tvn")
    with pytest.raises(UsageError, match="Did you mean 'raspberry-pi-4'"):
        lower(tiny, tmp_path / "out", target="raspbery-pi-4")
    with pytest.raises(UsageError, match="Did you mean 'int4'"):
        lower(tiny, tmp_path / "out", recipe="int44")
    assert list(tmp_path.iterdir()) == []


def test_a_module_can_be_lowered_and_the_public_verbs_work(tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    artefact = hikui.lower(model, tmp_path / "out", recipe="int8", tokenizer=tiny)
    assert artefact.manifest.provenance.model == "LlamaForCausalLM"
    with hikui.load(artefact.directory) as loaded:
        _, result = loaded.generate("Hi", max_new_tokens=3, ignore_eos=True)
    assert len(result.tokens) == 3
    assert hikui.trace is trace
    with pytest.raises(AttributeError, match="no attribute 'lowr'"):
        _ = hikui.lowr


def test_a_killed_run_leaves_no_half_artefact(tiny: Path, prepared: Prepared, tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = subprocess.Popen(lower_command(tiny, output), stderr=subprocess.DEVNULL)
    try:
        # Killed when the backend has begun to write.
        deadline = time.monotonic() + 120
        while not any(tmp_path.glob(".out.*.partial/content/*")):
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert not output.exists()
    artefact = build(prepared, output)
    assert verify_artefact.check_files(artefact).passed
    # Of the killed run only what it had finished is there.
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.resume", "out"]


def test_a_full_disk_leaves_nothing_and_says_so_in_one_sentence(tiny: Path, tmp_path: Path) -> None:
    def limit() -> None:
        # No file may grow beyond this, as on a full disk; the runtime library that goes into the artefact is larger.
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    done = subprocess.run(
        lower_command(tiny, tmp_path / "out"), preexec_fn=limit, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert re.match(r"hikui: .*out cannot be written: File too large; make room", done.stderr)
    assert [path.name for path in tmp_path.iterdir()] == [".out.resume"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_one_sentence(tiny: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(HikuiError, match="cannot be written: Permission denied; choose another -o"):
            lower(tiny, tmp_path / "out")
    finally:
        tmp_path.chmod(0o700)


def test_too_little_room_is_told_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(HikuiError, match=r"has room for \d+ MB, and \d+ MB are needed; make room or choose another -o"):
        require_room(tmp_path, 10**18)
    require_room(tmp_path, 1000)


def test_what_was_finished_stays_until_the_artefact_is_there(
    tiny: Path, stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, rounded = tmp_path / "artefact", 0
    request = Request(tiny, "gptq-qep-2bit", stories)
    round_site = Packer._round

    def counted(*args: Any) -> Packed:
        nonlocal rounded
        rounded += 1
        return round_site(*args)

    def fail(*_: object) -> None:
        raise HikuiError("The compiler is gone.")

    monkeypatch.setattr(Packer, "_round", counted)
    with monkeypatch.context() as broken:
        broken.setattr("hikui.lowering.app.lower.assemble", fail)
        with pytest.raises(HikuiError, match="compiler is gone"):
            make_artefact(request, output)
    first, kept = rounded, resume_folder(output)
    assert first > 10
    assert not output.exists()
    assert len(list(kept.iterdir())) == 1
    (kept / "of another run").mkdir()
    resumed = make_artefact(request, output)
    assert rounded == first
    assert not kept.exists()
    anew = make_artefact(request, tmp_path / "anew", execution=Execution(resume=False))
    assert rounded == 2 * first
    assert inventory(anew.directory) == inventory(resumed.directory)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["anew", "artefact"]


def test_memory_that_is_not_there_is_refused_before_the_work(tiny: Path, stories: Path, tmp_path: Path) -> None:
    with pytest.raises(HikuiError, match=r"It needs about .* and 0.00 GB of memory are there; use fewer"):
        lower(tiny, tmp_path / "out", recipe="awq-4bit", calibration=stories, execution=Execution(memory=1000))
    assert not (tmp_path / "out").exists()


def test_what_a_user_should_know_is_told_once_and_reported(
    tiny: Path, stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = Request.compared

    def with_caution(self: Request, **options: Any) -> Any:
        program, fidelity = compared(self, **options)
        program.cautions = ("It is not what it seems.",)
        return program, fidelity

    run = Rtn.run

    def warning(self: Rtn, program: Program, context: PassContext) -> PassResult:
        for _ in range(2):
            context.warn("A site is lost <em>.")
        return run(self, program, context)

    monkeypatch.setattr(Request, "compared", with_caution)
    monkeypatch.setattr(Rtn, "run", warning)
    told: list[str] = []
    artefact = lower(tiny, tmp_path / "out", execution=Execution(warn=told.append))
    ours = ["It is not what it seems.", "A site is lost <em>."]
    assert [sentence for sentence in told if sentence in ours] == ours
    assert json.loads((artefact.directory / "report.json").read_text())["notices"] == told
    assert "<li>A site is lost &lt;em&gt;.</li>" in (artefact.directory / "report.html").read_text()


def test_passes_that_learn_read_more_windows_than_passes_that_measure(tiny: Path, stories: Path) -> None:
    settings = CalibrationSettings(samples=2, training=9, tokens=24)
    chosen = load_recipe("gptq-4bit").model_copy(update={"calibration": settings})
    prepared = prepare(Request(tiny, chosen, calibration=stories))
    assert prepared.calibration is not None and prepared.calibration["samples"] == 9
    notes = {record.step.split("{")[0]: record.notes for record in prepared.records}
    assert any("tokens of 2 texts" in note for note in notes["guide"])
    assert any("on 2 held-out texts" in note for note in notes["distil"])


@pytest.mark.parametrize("backend", ["tvm", "onnxruntime"])
def test_an_artefact_of_the_size_asked_for(
    tiny: Path, stories: Path, tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within what is reckoned for the program, and never a byte more."""
    told: list[str] = []
    chosen = load_recipe("mixed-5.5bit").model_copy(update={"calibration": CalibrationSettings(samples=2, tokens=24)})
    smallest = Request(tiny, chosen, calibration=stories, target_size=1e-3)
    with pytest.raises(UsageError, match=r"A size of 0.001 MB leaves no room for weights: runtime, .* take [0-9.]+ MB"):
        make_artefact(smallest, tmp_path / "none", backend=backend)
    beside = make_backend(backend).nbytes_beside_weights(resolve("host")) / 1e6
    request = replace(smallest, target_size=beside + 0.12)
    artefact = make_artefact(
        request, tmp_path / "out", backend=backend, execution=Execution(warn=told.append, resume=False)
    )
    assert artefact.manifest.sizes.total_bytes <= request.target_size * 1e6  # type: ignore[operator]
    room = 0.12e6 - tokenizer_nbytes(trace(tiny))
    assert room - 4000 < artefact.manifest.sizes.weight_bytes <= room
    assert not any("more than the" in sentence for sentence in told)
    assert "target_size=" in artefact.manifest.provenance.pipeline
    kind = type(make_backend(backend))
    monkeypatch.setattr(kind, "nbytes_beside_weights", lambda *_: 0)
    make_artefact(
        replace(smallest, target_size=0.13), tmp_path / "large", backend=backend, execution=Execution(warn=told.append)
    )
    assert any("more than the 0.13 MB asked for: what is beside the chosen formats" in sentence for sentence in told)
    with pytest.raises(UsageError, match="A budget is of one thing; leave out target_bpw or target_size"):
        Request(tiny, chosen, target_bpw=5.0, target_size=60.0)
    with pytest.raises(UsageError, match="Recipe int4 has no pass assign, so a size has no effect on it"):
        Request(tiny, "int4", target_size=60.0).loaded_recipe()
    # Bits of the command line count, and not the size that the recipe has.
    (assign,) = (
        step for step in Request(tiny, "size-60mb", target_bpw=2.5).loaded_recipe().passes if step.name == "assign"
    )
    assert (assign.options["target_bpw"], assign.options["target_size"]) == (2.5, 0.0)
