"""Configs that are refused before anything is built from them."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

import hikui
from hikui.lowering.app.lower import prepare
from hikui.lowering.app.request import Request
from hikui.lowering.errors import HikuiError
from tests.lowering.conftest import Command


def changed(folder: Path, destination: Path, **changes: Any) -> Path:
    shutil.copytree(folder, destination)
    path = destination / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return destination


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", ["rms_norm_eps", "attention_dropout", "initializer_range"])
def test_a_number_that_is_not_finite_is_refused(tiny: Path, tmp_path: Path, key: str, value: float) -> None:
    folder = changed(tiny, tmp_path / "m", **{key: value})
    with pytest.raises(HikuiError, match=rf"config\.json sets {key} to {value}, which is no finite number"):
        hikui.trace(folder)


def test_a_nested_number_that_is_not_finite_is_refused(tiny: Path, tmp_path: Path) -> None:
    folder = changed(tiny, tmp_path / "m", rope_parameters={"rope_type": "default", "rope_theta": float("inf")})
    with pytest.raises(HikuiError, match=r"sets rope_parameters\.rope_theta to inf"):
        hikui.trace(folder)


def test_a_config_with_too_many_layers_is_refused_at_once(tiny: Path, tmp_path: Path) -> None:
    folder = changed(tiny, tmp_path / "m", num_hidden_layers=100_000)
    start = time.perf_counter()
    with pytest.raises(
        HikuiError, match=r"sets num_hidden_layers to 100000, but the checkpoint has \d+ tensors in all"
    ):
        hikui.trace(folder)
    assert time.perf_counter() - start < 1


def test_an_adapter_is_not_ignored(tiny: Path, tmp_path: Path, hikui_command: Command) -> None:
    folder = shutil.copytree(tiny, tmp_path / "m")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8}))
    status, out, err = hikui_command("lower", folder, "-o", tmp_path / "out")
    assert (status, out) == (1, "")
    assert "holds an adapter (adapter_config.json) beside the weights" in err and "merge_and_unload" in err
    (folder / "config.json").unlink()
    with pytest.raises(HikuiError, match="holds an adapter .* and not the model that it is for"):
        hikui.trace(folder)


@pytest.mark.parametrize("key", ["bos_token_id", "eos_token_id"])
@pytest.mark.parametrize("value", [-1, 131, 10**12, [1, -1], [1, 500], "1", 1.5, True, [None]])
def test_tokens_that_the_model_does_not_have_are_refused(tiny: Path, tmp_path: Path, key: str, value: Any) -> None:
    if key == "bos_token_id" and isinstance(value, list) and len(value) == 2:
        value = value[::-1]
    folder = changed(tiny, tmp_path / "m", **{key: value})
    path = folder / "generation_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key}))
    with pytest.raises(HikuiError, match=key):
        prepare(Request(folder, "float"))
