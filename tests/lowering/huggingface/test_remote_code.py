"""A checkpoint's own Python files run by an explicit option only."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import hikui
from hikui.lowering.artefact.text import TextCodec
from hikui.lowering.errors import HikuiError
from hikui.lowering.huggingface.remote_code import refuse_model_code, refuse_tokenizer_code
from hikui.lowering.huggingface.tokenizer import ModelTokenizer
from tests.lowering.conftest import Command

CONFIGURATION = """
from pathlib import Path
from transformers import LlamaConfig
Path(MARK).write_text("ran")
class PlantedConfig(LlamaConfig):
    model_type = "planted"
"""
MODEL = """
from pathlib import Path
from transformers import LlamaForCausalLM
from .configuration_planted import PlantedConfig
class PlantedForCausalLM(LlamaForCausalLM):
    config_class = PlantedConfig
"""
TOKENIZER = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast
Path(MARK).write_text("ran")
class PlantedTokenizer(PreTrainedTokenizerFast):
    pass
"""


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """A file that planted code writes when it runs."""
    return tmp_path / "ran"


@pytest.fixture
def planted(tiny: Path, tmp_path: Path, mark: Path) -> Path:
    """A checkpoint whose classes exist in its own files only."""
    folder = shutil.copytree(tiny, tmp_path / "planted_model")
    (folder / "configuration_planted.py").write_text(CONFIGURATION.replace("MARK", repr(str(mark))))
    (folder / "modeling_planted.py").write_text(MODEL)
    names = {
        "AutoConfig": "configuration_planted.PlantedConfig",
        "AutoModelForCausalLM": "modeling_planted.PlantedForCausalLM",
    }
    edit(folder / "config.json", model_type="planted", auto_map=names)
    return folder


@pytest.fixture
def planted_tokenizer(tiny: Path, tmp_path: Path, mark: Path) -> Path:
    """A checkpoint of a known model with a tokenizer class of its own."""
    folder = shutil.copytree(tiny, tmp_path / "planted_tokenizer")
    (folder / "tokenization_planted.py").write_text(TOKENIZER.replace("MARK", repr(str(mark))))
    names = {"AutoTokenizer": [None, "tokenization_planted.PlantedTokenizer"]}
    edit(folder / "tokenizer_config.json", tokenizer_class="PlantedTokenizer", auto_map=names)
    edit(folder / "config.json", model_type="llama")
    return folder


@pytest.fixture(autouse=True)
def yes_to_everything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A terminal that says yes, and what it was asked; modules that are made go to a folder of the test."""
    asked: list[str] = []

    def answer(question: str = "") -> str:
        asked.append(question)
        return "y"

    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return asked


def test_model_code_is_refused_without_a_question_and_runs_by_the_option(
    hikui_command: Command,
    planted: Path,
    mark: Path,
    yes_to_everything: list[str],
) -> None:
    for command in (
        ("explain", planted), ("opt", planted), ("lower", planted, "-o", planted.parent / "out"),
        ("eval", planted, "--text", planted / "config.json"),
        ("compare", planted, "--recipes", "int8", "--text", planted / "config.json"),
    ):  # fmt: skip
        status, out, err = hikui_command(*command)
        assert (status, out) == (1, ""), command
        assert "'configuration_planted.PlantedConfig'" in err and "--trust-remote-code" in err, command
    assert yes_to_everything == [] and not mark.exists()
    status, out, err = hikui_command("explain", planted, "--trust-remote-code")
    assert (status, err) == (0, "")
    assert "PlantedForCausalLM" in out
    assert mark.read_text() == "ran"
    assert hikui.trace(planted, trust_remote_code=True).config.architecture == "PlantedForCausalLM"


def test_tokenizer_code_is_refused_without_a_question_and_runs_by_the_option(
    hikui_command: Command,
    planted_tokenizer: Path,
    tiny: Path,
    mark: Path,
    monkeypatch: pytest.MonkeyPatch,
    yes_to_everything: list[str],
) -> None:
    monkeypatch.setattr("transformers.models.auto.tokenization_auto.TOKENIZER_MAPPING_NAMES", {"gpt2": "GPT2Tokenizer"})
    for command in (("explain", planted_tokenizer), ("explain", tiny, "--tokenizer", planted_tokenizer)):
        status, out, err = hikui_command(*command)
        assert (status, out) == (1, ""), command
        assert "'tokenization_planted.PlantedTokenizer'" in err and "--trust-remote-code" in err
    with pytest.raises(HikuiError, match="--trust-remote-code"):
        TextCodec(ModelTokenizer(planted_tokenizer))
    assert yes_to_everything == [] and not mark.exists()
    codec = TextCodec(ModelTokenizer(planted_tokenizer, trust_remote_code=True))
    assert mark.read_text() == "ran"
    assert codec.encode_prompt("ab") == TextCodec(tiny).encode_prompt("ab")


def test_names_that_transformers_has_itself_are_its_own(tiny: Path, tmp_path: Path, mark: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "named")
    (folder / "modeling_x.py").write_text(CONFIGURATION.replace("MARK", repr(str(mark))))
    names = {"AutoConfig": "modeling_x.X", "AutoModelForCausalLM": "modeling_x.Y", "AutoModel": "modeling_x.Z"}
    edit(folder / "config.json", auto_map=names)
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["modeling_x.S", None]})
    refuse_model_code(folder, trusted=False)
    refuse_tokenizer_code(folder, trusted=False)
    assert hikui.trace(folder).config.architecture == "LlamaForCausalLM"
    assert TextCodec(ModelTokenizer(folder)).encode_prompt("ab") == TextCodec(tiny).encode_prompt("ab")
    assert not mark.exists()


def test_every_call_of_transformers_says_whether_code_may_run() -> None:
    """No `from_pretrained` or `from_config` of an Auto class is left to transformers' default, which asks."""
    import ast

    from tests.conftest import ROOT

    found = []
    for top in ("lowering", "passes", "backends", "models", "benchmarks", "examples"):
        for path in sorted((ROOT / top).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                    continue
                owner = node.func.value
                if node.func.attr in ("from_pretrained", "from_config") and isinstance(owner, ast.Name):
                    said = any(keyword.arg == "trust_remote_code" for keyword in node.keywords)
                    found.append((path.name, owner.id, said))
    assert len(found) > 3
    assert [call for call in found if call[1].startswith("Auto") and not call[2]] == []


CHAT = "{% for x in range(10) %}{{ cycler.__init__.__globals__.os.system('touch MARK') }}{% endfor %}"


def test_a_chat_template_is_copied_and_never_run(tiny: Path, tmp_path: Path, mark: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "templated")
    (folder / "chat_template.jinja").write_text(CHAT.replace("MARK", str(mark)))
    endless = "{% for a in range(999999999) %}{{ raise_exception('x') }}{% endfor %}"
    edit(folder / "tokenizer_config.json", chat_template=endless)
    codec: Callable[[str], list[int]] = TextCodec(ModelTokenizer(folder)).encode_prompt
    assert codec("ab") == TextCodec(tiny).encode_prompt("ab")
    assert not mark.exists()
