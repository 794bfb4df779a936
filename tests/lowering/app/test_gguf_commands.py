"""Commands that take a MODEL take a GGUF file."""

import json
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Kind

from tests.lowering.checkpoint.gguf_files import write_gguf
from tests.lowering.conftest import Command

STORED = "hikui: warning: The weights are stored as F32 5 tensors, Q4_0 16 tensors: "


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    write_gguf(path, kind=Kind.Q4_0)
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("Once upon a time there was a house at the edge of a wood.")
    return path


def test_explain(hikui_command: Command, file: Path) -> None:
    status, out, err = hikui_command("explain", file, "--recipe", "adopt")
    assert status == 0
    assert STORED in err
    assert "model.layers.0.self_attn.q_proj: int4-g32, as Q4_0 of the GGUF left it" in out


def test_eval(hikui_command: Command, file: Path, text: Path) -> None:
    numbers = []
    for options in ((), ("--tokenizer", file)):
        status, out, err = hikui_command("eval", file, "--text", text, "--json", *options)
        assert status == 0
        assert STORED in err
        answer = json.loads(out)
        numbers.append((answer["tokens"], answer["bits_per_char"]))
    assert numbers[0] == numbers[1]


def test_compare(hikui_command: Command, file: Path, text: Path) -> None:
    status, out, err = hikui_command("compare", file, "--text", text, "--recipes", "adopt", "--json")
    assert status == 0, err
    assert "adopt" in out


def test_opt_takes_its_weights_from_elsewhere(hikui_command: Command, file: Path, tmp_path: Path) -> None:
    status, out, _ = hikui_command("opt", file, "--print-ir")
    assert status == 0
    (tmp_path / "p.ir").write_text(out)
    for weights in (file, file.parent):
        status, _, err = hikui_command("opt", tmp_path / "p.ir", "--weights", weights, "--print-ir")
        assert status == 2
        assert f"{weights} is a GGUF, whose tensors have other names than a program's text; give" in err
