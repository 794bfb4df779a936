"""What a user is told on stderr and in the report before numbers are believed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hikui.lowering.app.lower import make_artefact, prepare
from hikui.lowering.app.request import Execution, Request
from hikui.lowering.app.runners import load
from hikui.lowering.artefact.manifest import Artefact
from hikui.lowering.errors import HikuiError
from tests.lowering.conftest import Command
from tests.lowering.made_tokenizers import byte_level, save, with_word_ends


def said(request: Request) -> list[str]:
    """What is told of a model that is lowered, and stands in the report's notices."""
    told: list[str] = []
    prepared = prepare(request, Execution(warn=told.append))
    assert list(prepared.notices) == told
    return told


@pytest.fixture
def changed(tiny: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the tiny checkpoint with other settings."""

    def call(file: str = "config.json", **settings: Any) -> Path:
        folder = tmp_path / "changed"
        if not folder.exists():
            shutil.copytree(tiny, folder)
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
        return folder

    return call


def test_nothing_is_said_of_a_model_that_is_right(tiny: Path, reference: Path) -> None:
    assert said(Request(tiny, "float")) == []
    assert said(Request(reference, "float")) == []


def test_a_config_and_a_tokenizer_that_disagree(changed: Callable[..., Path]) -> None:
    folder = changed(bos_token_id=2)
    changed("generation_config.json", bos_token_id=2)
    (only,) = said(Request(folder, "float"))
    assert "names 2 as the token that begins a text, but the tokenizer puts 0 there" in only
    changed(bos_token_id=None)
    changed("generation_config.json", bos_token_id=None)
    (only,) = said(Request(folder, "float"))
    assert "names no token that begins a text, but the tokenizer puts 0 there" in only
    changed(bos_token_id=0)
    changed("generation_config.json", bos_token_id=0)
    save(byte_level(""), folder)
    (only,) = said(Request(folder, "float"))
    assert "names 0 as the token that begins a text, but the tokenizer puts no token there" in only


def test_a_generation_config_that_greedy_text_does_not_follow(changed: Callable[..., Path]) -> None:
    folder = changed("generation_config.json", repetition_penalty=1.3, suppress_tokens=[5], top_k=50, min_length=0)
    (only,) = said(Request(folder, "float"))
    assert "sets repetition_penalty 1.3, suppress_tokens [5], which hikui does not do" in only


def test_a_special_token_beyond_the_embedding(
    changed: Callable[..., Path], tmp_path: Path, hikui_command: Command
) -> None:
    folder = changed()
    tokenizer = byte_level()
    tokenizer.add_special_tokens(["<extra>"])
    save(tokenizer, folder)
    (only,) = said(Request(folder, "float"))
    assert "has 1 token(s) from id 131 on that the model, with a vocabulary of 131, does not have" in only
    text = tmp_path / "text.txt"
    text.write_text("abc <extra> def")
    status, _, err = hikui_command("eval", folder, "--text", text)
    assert status == 1
    assert "Token 131 is outside the model's vocabulary of 131" in err
    with pytest.raises(HikuiError, match="Token 131 is outside"):
        prepare(Request(folder, "mixed-5.5bit", calibration=text), Execution(warn=lambda sentence: None))
    tokenizer = byte_level("<s> $A")
    tokenizer.add_special_tokens(["<extra>"])
    content = json.loads(tokenizer.to_str())
    content["post_processor"] = json.loads(byte_level("<s> $A").to_str())["post_processor"]
    content["post_processor"]["single"][0]["SpecialToken"]["id"] = "<extra>"
    content["post_processor"]["special_tokens"] = {"<extra>": {"id": "<extra>", "ids": [131], "tokens": ["<extra>"]}}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(HikuiError, match="Token 131 is outside"):
        prepare(Request(folder, "float"))


def test_too_little_calibration_text(tiny: Path, tmp_path: Path, hikui_command: Command) -> None:
    text = tmp_path / "hi.txt"
    text.write_text("Hi")
    status, _, err = hikui_command("eval", tiny, "--recipe", "gptq-4bit", "--calibration", text, "--text", text)
    assert status == 0
    assert "The calibration text hi.txt is too short: it gives 1 window(s) with 3 tokens in all" in err
    assert err.startswith("hikui: warning: ")


def test_the_text_that_comes_with_hikui_is_not_called_too_short(tiny: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "greedy.yaml"
    head = "schema: 1\nname: greedy\ncalibration: {samples: 100000, tokens: 64}\npasses: [canonicalise, "
    recipe.write_text(head + "calibrate, dead_code]\n")
    assert not any("too short" in sentence for sentence in said(Request(tiny, recipe)))
    recipe.write_text(head.replace("tokens", "training: 200000, tokens") + "calibrate, dead_code]\n")
    (sentence,) = (sentence for sentence in said(Request(tiny, recipe)) if "too short" in sentence)
    assert "the recipe asks for 200000 of 64" in sentence and "what learns from so little learns less" in sentence
    recipe.write_text(
        head.replace("samples: 100000", "samples: 2, training: 4, long: 900000") + "calibrate, dead_code]\n"
    )
    (sentence,) = (sentence for sentence in said(Request(tiny, recipe)) if "too few long documents" in sentence)
    assert "the recipe asks for 900000; give longer documents." in sentence
    recipe.write_text(head + "calibrate, dead_code]\n")
    text = tmp_path / "hi.txt"
    text.write_text("Hi")
    assert any("too short" in sentence for sentence in said(Request(tiny, recipe, calibration=text)))


def test_unknown_characters_are_said(tiny: Path, tmp_path: Path, hikui_command: Command) -> None:
    text = tmp_path / "text.txt"
    text.write_text("日本語 and more")
    status, out, err = hikui_command("eval", tiny, "--text", text, "--json")
    report = json.loads(out)
    assert status == 0
    assert report["unknown_tokens"] == 9
    assert "9 of 18 tokens stand for characters that the tokenizer does not know" in err
    assert report["characters"] == len("日本語 and more")


def test_compare_says_it_once(tiny: Path, tmp_path: Path, hikui_command: Command) -> None:
    text, short = tmp_path / "text.txt", tmp_path / "hi.txt"
    text.write_text("日本語 and more")
    short.write_text("Hi")
    command = ("compare", tiny, "--recipes", "int8,gptq-4bit", "--text", text, "--calibration", short)
    for _ in range(2):  # the second time from what the first has kept
        status, _, err = hikui_command(*command, "-o", tmp_path / "out")
        assert status == 0
        assert err.count("9 of 18 tokens stand for characters that the tokenizer does not know") == 1
        assert err.count("The calibration text hi.txt is too short") == 1


def test_a_model_without_a_tokenizer_is_said_and_run_names_the_option(tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    told: list[str] = []
    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    artefact = make_artefact(Request(model, "float"), tmp_path / "out", execution=Execution(warn=told.append))
    assert [sentence for sentence in told if "comes without a tokenizer" in sentence and "--tokenizer" in sentence]
    assert json.loads((artefact.directory / "report.json").read_text())["notices"] == told
    assert "comes without a tokenizer" in (artefact.directory / "report.html").read_text()
    with pytest.raises(HikuiError, match="lowered without a tokenizer.*--tokenizer FOLDER"):
        load(artefact.directory)


def test_a_decoder_that_the_board_cannot_follow_is_said(tiny: Path, tmp_path: Path) -> None:
    told: list[str] = []
    tokenizer = with_word_ends()
    from tokenizers import decoders

    tokenizer.decoder = decoders.CTC()
    request = Request(tiny, "float", tokenizer=save(tokenizer, tmp_path / "t"))
    artefact = make_artefact(request, tmp_path / "out", execution=Execution(warn=told.append))
    assert "prints token ids and no text" in told[-1]
    assert not (artefact.directory / "model.tokens").exists()
    assert json.loads((artefact.directory / "report.json").read_text())["notices"] == told


def test_a_full_cache_is_said(built: Artefact, hikui_command: Command) -> None:
    context = built.manifest.model.context_length
    command = ("run", built.directory, "--prompt", "x" * (context - 4), "--ignore-eos", "--max-new-tokens")
    status, _, err = hikui_command(*command, 50)
    assert status == 0
    assert f"The text ends after 4 tokens because the cache is full: it holds {context}" in err
    status, _, err = hikui_command(*command, 4)
    assert (status, err) == (0, "")


def test_an_argument_that_is_not_utf8_is_a_wrong_request(built: Artefact, hikui_command: Command) -> None:
    wrong = b"ab\xff".decode(errors="surrogateescape")
    for command in (
        ("run", built.directory, "--prompt", wrong), ("lower", wrong, "-o", "out"), ("lower", "reference", "-o", wrong),
        ("eval", "reference", "--text", wrong),
    ):  # fmt: skip
        status, out, err = hikui_command(*command)
        assert (status, out) == (2, "")
        assert r"the argument 'ab\udcff' is not UTF-8 at character 3" in err
