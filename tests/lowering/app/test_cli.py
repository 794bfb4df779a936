import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import hikui
from hikui.backends.kernels.fields import SEGMENTS
from hikui.backends.kernels.isa import ISAS
from hikui.lowering.app.assemble import Prepared
from hikui.lowering.app.cli import run
from hikui.lowering.app.cli.evaluating import _show
from hikui.lowering.artefact.generate import generate
from hikui.lowering.artefact.manifest import MANIFEST, Artefact
from hikui.lowering.artefact.target import TARGETS
from hikui.lowering.errors import HikuiError
from hikui.lowering.ir.interpreter import ReferenceRunner
from tests.lowering.conftest import Command


def test_help_lists_the_commands_and_imports_nothing_heavy() -> None:
    program = (
        "import sys; from hikui.lowering.app.cli import run; status = run(['--help'])\n"
        "print(sorted({'torch', 'tvm', 'transformers', 'onnxruntime', 'scipy', 'numpy'} & set(sys.modules)), status)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    *text, last = done.stdout.splitlines()
    assert last == "[] 0"
    names = "lower run eval compare verify inspect opt explain passes sensitivity targets doctor"
    for name in names.split():
        assert any(name in line.split() for line in text)


def test_inspecting_an_artefact_needs_no_torch(built: Artefact) -> None:
    program = (
        "import sys; from hikui.lowering.app.cli import run\n"
        f"status = run(['inspect', {str(built.directory)!r}])\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules, status)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False False 0"


def test_version(hikui_command: Command) -> None:
    assert hikui_command("--version") == (0, f"hikui {hikui.__version__}\n", "")


@pytest.mark.parametrize(
    "arguments",
    [
        ("lowr",),
        ("lower", "reference"),
        ("run", "somewhere", "--max-new-tokens", "0"),
        ("run", "somewhere", "--max-new-token", "3"),
    ],
)
def test_a_wrong_request_is_status_two(hikui_command: Command, arguments: tuple[str, ...]) -> None:
    status, out, err = hikui_command(*arguments)
    assert status == 2
    assert out == ""
    assert "Error" in err


def test_an_error_is_one_sentence_on_stderr_and_its_status(hikui_command: Command, tmp_path: Path) -> None:
    for arguments, expected, words in (
        (("lower", "reference", "-o", tmp_path / "a", "--recipe", "int44"), 2, "Did you mean 'int4'?"),
        (("lower", "reference", "-o", tmp_path / "a", "--target", "raspberry-pi-6"), 2, "raspberry-pi"),
        (("lower", "reference", "-o", tmp_path / "a", "--calibration", tmp_path / "no"), 2, "No such file"),
        (("lower", tmp_path / "no-model", "-o", tmp_path / "a"), 1, "does not exist"),
        (("opt", "reference", "--pipeline", "canonicalize"), 2, "Did you mean 'canonicalise'?"),
        (("opt", "reference", "--pipeline", "rtn{bits=4"), 2, "closing brace"),
        (("opt", "reference", "--pipeline", "canonicalise", "--print-ir-after", "fuse"), 2, "has no such pass"),
        (("run", tmp_path, "--prompt", "Hi"), 1, "is not an artefact"),
        (("eval", "reference", "--text", tmp_path / "no"), 2, "No such file"),
        (("verify", tmp_path), 1, "is not an artefact"),
    ):
        status, out, err = hikui_command(*arguments)
        assert (status, out) == (expected, ""), arguments
        assert err.startswith("hikui: "), arguments
        assert err.count("\n") == 1, arguments
        assert words in err, arguments
    assert not (tmp_path / "a").exists()


def test_debug_lets_the_error_through(tmp_path: Path) -> None:
    with pytest.raises(HikuiError, match="is not an artefact"):
        run(["inspect", str(tmp_path), "--debug"])


def test_run_gives_the_interpreters_greedy_tokens(hikui_command: Command, built: Artefact, prepared: Prepared) -> None:
    options = ("--prompt", "Once", "--max-new-tokens", 8, "--ignore-eos")
    status, out, err = hikui_command("run", built.directory, *options, "--json")
    assert (status, err) == (0, "")
    answer = json.loads(out)
    assert set(answer) == {"prompt", "tokens", "text", "cache_full", "first_token_seconds", "tokens_per_second"}
    expected = generate(ReferenceRunner(prepared.program), built.encode_prompt("Once"), max_new_tokens=8)
    assert answer["tokens"] == expected.tokens
    assert answer["first_token_seconds"] > 0
    status, out, _ = hikui_command("run", built.directory, *options)
    assert out == f"Once{answer['text']}\n"


def test_a_prompt_longer_than_the_cache_is_refused(hikui_command: Command, built: Artefact) -> None:
    status, out, err = hikui_command("run", built.directory, "--prompt", "long " * 50)
    assert (status, out) == (1, "")
    assert "the cache holds 64; shorten the prompt or lower the model with a larger --context." in err


def test_eval_of_an_artefact_against_its_float_model(
    hikui_command: Command, built: Artefact, tiny: Path, stories: Path
) -> None:
    command = ("eval", built.directory, "--text", stories, "--documents", 2, "--against", tiny, "--json")
    status, out, err = hikui_command(*command)
    assert (status, err) == (0, "")
    answer = json.loads(out)
    assert {
        "perplexity", "bits_per_char", "block_bpw", "true_bpw", "all_bpw", "linear_bytes", "total_bytes",
        "peak_memory_bytes", "tokens_per_second", "first_token_seconds", "protocol",
    } <= set(answer)  # fmt: skip
    assert answer["documents"] == 2
    for name in ("block_bpw", "true_bpw", "all_bpw"):
        assert answer[name] == getattr(built.manifest.sizes, name)
        assert answer["against"][name] == pytest.approx(32, rel=1e-3)
    assert answer["total_bytes"] == built.manifest.sizes.total_bytes
    assert answer["against"]["true_bpw"] == 32
    assert answer["against"]["divergence"] > 0
    assert answer["bits_per_char"] == pytest.approx(answer["against"]["bits_per_char"], rel=0.05)
    assert answer["tokens_per_second"] > 0


def test_eval_through_a_recipe_is_eval_of_the_artefact(
    hikui_command: Command, built: Artefact, tiny: Path, stories: Path
) -> None:
    options = ("--text", stories, "--documents", 2, "--json")
    answers = [
        json.loads(hikui_command("eval", *subject, *options)[1])
        for subject in ((built.directory,), (tiny, "--recipe", "rtn-4bit"))
    ]
    assert answers[0]["runs_as"] != answers[1]["runs_as"]
    for key in ("block_bpw", "true_bpw", "all_bpw", "linear_bytes", "tokens", "characters"):
        assert answers[0][key] == answers[1][key]
    assert answers[0]["bits_per_char"] == pytest.approx(answers[1]["bits_per_char"], rel=1e-3)
    status, _, err = hikui_command("eval", built.directory, "--recipe", "rtn-4bit", *options)
    assert status == 2
    assert "is an artefact, whose recipe and context are fixed" in err


def test_eval_over_windows_names_its_protocol_and_pairs_with_the_float_model(
    hikui_command: Command, capsys: pytest.CaptureFixture[str], tiny: Path, stories: Path
) -> None:
    options = ("--text", stories, "--documents", 3, "--window", 40, "--stride", 20, "--against", tiny, "--layers")
    status, out, err = hikui_command("eval", tiny, "--recipe", "rtn-4bit", *options, "--json")
    assert (status, err) == (0, "")
    answer = json.loads(out)
    assert answer["protocol_fields"] == {
        "unit": "window", "context": 40, "stride": 20, "prefix": [0], "joined_with": "<|endoftext|>",
    }  # fmt: skip
    assert len(answer["each"]) == answer["windows"] == len(answer["against"]["each"])
    assert sum(part["tokens"] for part in answer["each"]) == answer["tokens"]
    difference = answer["bits_per_char"] - answer["against"]["bits_per_char"]
    assert answer["against"]["difference"] == pytest.approx(difference)
    assert answer["against"]["difference_error"] < answer["bits_per_char_error"]
    layers = answer["layers"]
    assert {site["format"] for site in layers["sites"]} == {"int4-g128", "int8-g64"}
    assert layers["sites"][-1]["cumulative"] == pytest.approx(layers["logits"])
    assert layers["divergence"] > 0
    _show(answer)
    shown = capsys.readouterr().out
    assert any(line.split()[:2] == ["lm_head", "int8-g64"] for line in shown.splitlines())
    assert "every token predicted once" in shown
    assert "protocol_fields" not in shown


def test_eval_of_tasks(hikui_command: Command, tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (the extra `eval`)")
    task = tmp_path / "ends.jsonl"
    rows = [{"context": "The fox", "choices": ["ran.", "sang."], "label": label} for label in (0, 1, 0)]
    task.write_text("\n".join(map(json.dumps, rows)))
    status, out, err = hikui_command("eval", tiny, "--tasks", task, "--limit", 2, "--json")
    assert (status, err) == (0, "")
    (score,) = json.loads(out)["tasks"]["scores"]
    # The same question with either answer right: one of the two is.
    assert (score["task"], score["documents"], score["acc"], score["acc_error"]) == ("ends", 2, 0.5, 0.5)
    task.write_text('{"question": "The fox"}')
    status, out, err = hikui_command("eval", tiny, "--tasks", task)
    assert (status, out) == (2, "")
    assert "ends.jsonl:1: this row has 'question'" in err


def test_eval_lets_a_model_go_on_by_itself(hikui_command: Command, tiny: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The fox\nOnce\n")
    status, out, err = hikui_command("eval", tiny, "--samples", 6, "--prompts", prompts, "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)["samples"]
    assert [text["prompt"] for text in found["texts"]] == ["The fox", "Once"]
    assert all(text["tokens"] <= 6 for text in found["texts"])
    assert found["loops"] == sum(text["loop_from"] is not None for text in found["texts"])
    status, out, _ = hikui_command("eval", tiny, "--samples", 6, "--prompts", prompts)
    assert status == 0 and "repeated 0." in out and "\nThe fox" in out


def test_eval_refuses_what_would_have_no_effect(hikui_command: Command, tiny: Path, stories: Path) -> None:
    text = ("--text", stories)
    for options, words in (
        ((), "There is nothing to measure"),
        ((*text, "--stride", 4), "--stride has no effect without --window"),
        ((*text, "--prompts", stories), "--prompts has no effect without --samples"),
        ((*text, "--limit", 4), "--limit has no effect without --tasks"),
        ((*text, "--layers"), "--layers has no effect without --recipe"),
        ((*text, "--window", 9, "--stride", 10), "would skip tokens"),
        ((*text, "--window", 65), "longer than the context of 64"),
        ((*text, "--window", 65, "--recipe", "int2"), "longer than the context of 64"),
        ((*text, "--tasks", "nowhere.jsonl"), "There is no task nowhere.jsonl"),
    ):
        status, out, err = hikui_command("eval", tiny, *options)
        assert (status, out) == (2, ""), options
        assert words in err, options
        assert err.count("\n") == 1, options


def test_compare_writes_a_folder_and_takes_it_up(
    hikui_command: Command, tiny: Path, stories: Path, tmp_path: Path
) -> None:
    command = (
        "compare",
        tiny,
        "--recipes",
        "int8,rtn-4bit",
        "--text",
        stories,
        "--documents",
        2,
        "-o",
        tmp_path / "out",
    )
    status, out, err = hikui_command(*command, "--json")
    assert (status, err) == (0, "")
    answer = json.loads(out)
    assert [row["label"] for row in answer["rows"]] == ["float model", "int8", "rtn-4bit"]
    assert answer == json.loads((tmp_path / "out" / "compare.json").read_text())
    runs = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "runs").iterdir()}
    assert len(runs) == 3
    status, out, _ = hikui_command(*command)
    assert status == 0
    assert out.startswith(" ")
    assert "true bits" in out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "runs").iterdir()} == runs
    for options, words in (
        (("--recipes", "int8", "--seeds", "0,x"), "give numbers separated by commas"),
        (("--recipes", "int8", "--seeds", "1.5"), "seeds are whole numbers"),
        (("--recipes", "int8", "--stride", "3"), "--stride has no effect without --window"),
        ((), "There is nothing to compare"),
    ):
        status, out, err = hikui_command("compare", tiny, "--text", stories, *options)
        assert (status, out) == (2, ""), options
        assert words in err, options


def test_verify_says_what_it_checked_and_fails_on_damage(hikui_command: Command, artefact: Artefact) -> None:
    status, out, _ = hikui_command("verify", artefact.directory, "--json")
    assert status == 0
    assert {check["check"]: check["passed"] for check in json.loads(out)} == {
        "files": True,
        "libraries": True,
        "numbers": True,
        "modes": True,
        "runner": True,
    }
    (artefact.directory / "report.html").write_bytes(b"x" * artefact.manifest.files["report.html"].bytes)
    status, out, err = hikui_command("verify", artefact.directory)
    assert (status, out) == (1, "")
    assert "report.html is damaged" in err


def test_inspect_shows_the_manifest(hikui_command: Command, built: Artefact) -> None:
    assert json.loads(hikui_command("inspect", built.directory, "--json")[1]) == json.loads(
        (built.directory / MANIFEST).read_text()
    )
    out = hikui_command("inspect", built.directory)[1]
    assert all(name in out for name in built.manifest.sites)
    assert "key-value cache of 24.6 kB in float32\n" in out


def test_opt_prints_the_program_and_what_the_passes_did(hikui_command: Command, tiny: Path) -> None:
    pipeline = "canonicalise,rtn{bits=8,group=32}"
    status, out, _ = hikui_command("opt", tiny, "--pipeline", pipeline, "--print-ir", "--timing")
    assert status == 0
    assert out.startswith("program LlamaForCausalLM context=64")
    assert '"int8-g32"' in out
    assert "rtn{bits=8,group=32}" in out
    status, out, _ = hikui_command("opt", tiny, "--pipeline", pipeline, "--print-ir-after", "canonicalise")
    assert out.startswith("// after canonicalise\nprogram ")
    assert "hikui.linear" not in out


def test_opt_reads_back_what_it_printed(hikui_command: Command, tiny: Path, tmp_path: Path) -> None:
    text, weights = tmp_path / "program.ir", tmp_path / "weights.safetensors"
    first, second = "canonicalise,rtn{bits=8,group=32}", "activation,kv_cache,fuse"
    status, out, err = hikui_command(
        "opt", tiny, "--pipeline", first, "--print-ir", "--timing", "--save-weights", weights
    )
    assert (status, err) == (0, "")
    text.write_text(out, "utf-8")
    whole = hikui_command("opt", tiny, "--pipeline", f"{first},{second}", "--print-ir")[1]
    assert hikui_command("opt", text, "--weights", weights, "--pipeline", second, "--print-ir") == (0, whole, "")
    # Without weights the passes run as well; what they do to the graph does not depend on them here.
    assert hikui_command("opt", text, "--seed", 3, "--pipeline", second, "--print-ir") == (0, whole, "")
    unnamed = tmp_path / "pasted.txt"
    unnamed.write_text(f"// after a mail\n\n{out}", "utf-8")
    assert hikui_command("opt", unnamed, "--print-ir")[1] == "".join(
        line for line in out.splitlines(keepends=True) if not line.startswith("//")
    )


def test_the_weights_that_opt_saves_are_those_that_the_text_names(
    hikui_command: Command, tiny: Path, tmp_path: Path
) -> None:
    text, weights, again = (tmp_path / name for name in ("p.ir", "w.safetensors", "again.safetensors"))
    text.write_text(hikui_command("opt", tiny, "--print-ir", "--save-weights", weights)[1], "utf-8")
    assert hikui_command("opt", text, "--weights", weights, "--save-weights", again)[0] == 0
    assert again.read_bytes() == weights.read_bytes()
    # A checkpoint has what the model's code computes under no name.
    status, out, err = hikui_command("opt", text, "--weights", tiny, "--save-weights", again)
    assert (status, out) == (1, "")
    assert "the weights given have no 'model.rotary_emb.inv_freq'." in err and "--save-weights wrote" in err
    assert hikui_command("opt", text, "--weights", tiny, "--seed", 0, "--save-weights", again)[0] == 0
    assert again.read_bytes() != weights.read_bytes()


def test_saved_weights_with_the_old_codes_are_refused(hikui_command: Command, tiny: Path, tmp_path: Path) -> None:
    text, weights = tmp_path / "p.ir", tmp_path / "w.safetensors"
    pipeline = "canonicalise,rtn{bits=3,group=32}"
    out = hikui_command("opt", tiny, "--pipeline", pipeline, "--print-ir", "--save-weights", weights)[1]
    text.write_text(out, "utf-8")
    assert hikui_command("opt", text, "--weights", weights)[0] == 0
    save_file(load_file(weights), weights)
    status, out, err = hikui_command("opt", text, "--weights", weights)
    assert (status, out) == (1, "")
    assert f"{weights} does not say which codes" in err and "(int3-g32) has" in err and "--save-weights" in err


def test_opt_on_a_text_calibrates_with_a_tokenizer(
    hikui_command: Command, tiny: Path, stories: Path, tmp_path: Path
) -> None:
    text = tmp_path / "p.ir"
    text.write_text(hikui_command("opt", tiny, "--pipeline", "canonicalise", "--print-ir")[1], "utf-8")
    command = ("opt", text, "--calibration", stories, "--pipeline", "calibrate", "--print-ir")
    status, out, err = hikui_command(*command)
    assert (status, out) == (1, "")
    assert "give one with --tokenizer" in err
    status, out, err = hikui_command(*command, "--tokenizer", tiny)
    assert status == 0
    assert err.startswith("hikui: warning: The calibration text stories.txt is too short")
    assert "statistics={" in out


def test_opt_says_what_is_wrong_with_a_text(hikui_command: Command, tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "p.ir"
    printed = hikui_command("opt", tiny, "--print-ir")[1]
    text.write_text(printed, "utf-8")
    (tmp_path / "cut.ir").write_text(printed[: len(printed) // 2], "utf-8")
    (tmp_path / "unknown.ir").write_text(printed.replace("aten.embedding(", "aten.embeding("), "utf-8")
    (tmp_path / "bytes.ir").write_bytes(b"\xff\xfe program")
    (tmp_path / "bad.safetensors").write_bytes(b"none")
    for arguments, expected, words in (
        ((tmp_path / "cut.ir",), 2, "cut.ir:"),
        ((tmp_path / "unknown.ir",), 2, "Did you mean 'aten.embedding'?"),
        ((tmp_path / "bytes.ir",), 2, "is no text"),
        ((tmp_path / "absent.ir",), 2, "cannot be read: No such file"),
        ((text, "--context", "9"), 2, "--context has no effect"),
        ((text, "--weights", tmp_path / "bad.safetensors"), 1, "is truncated"),
        ((text, "--save-weights", text / "w.safetensors"), 1, "cannot be written"),
        ((tiny, "--seed", "1"), 2, "--seed has no effect"),
        ((tiny, "--weights", tiny), 2, "--weights has no effect"),
    ):
        status, out, err = hikui_command("opt", *arguments)
        assert (status, out) == (expected, ""), arguments
        assert err.startswith("hikui: ") and err.count("\n") == 1, arguments
        assert words in err, arguments


def test_explain_lists_sites_and_what_was_fused(hikui_command: Command, tiny: Path) -> None:
    answer = json.loads(hikui_command("explain", tiny, "--json")[1])
    assert {"site": "lm_head", "group": "lm_head", "block": None, "shape": [131, 48]} in answer["sites"]
    assert answer["findings"] == []
    assert any("norm" in note for step in answer["passes"] for note in step["notes"])
    assert "lm_head" in hikui_command("explain", tiny)[1]


def test_passes_targets_and_doctor(hikui_command: Command) -> None:
    listed = {row["name"]: row["options"] for row in json.loads(hikui_command("passes", "--json")[1])}
    assert listed["rtn"]["group"] == 64
    assert "canonicalise" in hikui_command("passes")[1]
    targets = json.loads(hikui_command("targets", "--json")[1])
    assert [target["name"] for target in targets] == list(TARGETS)
    assert sum(target["host"] for target in targets) <= 1
    assert hikui_command("targets")[1].count("\n") == len(TARGETS)
    kernels = json.loads(hikui_command("targets", "--kernels", "--json")[1])
    assert len(kernels) == (len(ISAS) + 1) * len(SEGMENTS) * 5 * 3
    plain = {row["isa"] for row in kernels if row["fallback"] and row["activations"] == "int8"}
    assert plain == {"portable"}
    assert "vnni in place" in hikui_command("targets", "--kernels")[1]
    status, out, _ = hikui_command("doctor", "--json")
    assert status == 0
    found = {row["name"]: row["found"] for row in json.loads(out)}
    assert found["torch"] is not None


def test_inspect_tells_what_every_bit_is_for(hikui_command: Command, built: Artefact, tmp_path: Path) -> None:
    status, out, _ = hikui_command("inspect", built.directory, "--bits", "--json")
    found = json.loads(out)
    assert status == 0
    assert sum(found["kinds"].values()) == built.manifest.sizes.weight_bytes
    assert found["rivals"]["BiLLM"] > 2.8
    status, out, _ = hikui_command("inspect", built.directory, "--bits")
    assert status == 0
    assert "codes of linear sites, padding counted" in out and "llama.cpp IQ1_S" in out
    older = json.loads((built.directory / MANIFEST).read_text("utf-8"))
    del older["sizes"]["kinds"]
    (tmp_path / MANIFEST).write_text(json.dumps(older), "utf-8")
    status, _, err = hikui_command("inspect", str(tmp_path), "--bits")
    assert (status, err) == (1, "hikui: The artefact is older than this count; lower the model again.\n")
