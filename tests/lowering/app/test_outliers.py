"""Columns of activations so large that the others round to nothing are told."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from hikui.lowering.app.assemble import reference_numbers
from hikui.lowering.app.lower import lower, prepare
from hikui.lowering.app.outliers import OutlierWatch
from hikui.lowering.app.request import Execution, Request
from hikui.models.synthetic import tiny_model


def with_outlier(factor: float) -> nn.Module:
    """The same function: a column of the second feed-forward norm larger, what it meets as much smaller."""
    model = tiny_model("llama")
    with torch.no_grad():
        layers: Any = model.get_submodule("model.layers")
        layers[1].post_attention_layernorm.weight[3] *= factor
        for matrix in (layers[1].mlp.gate_proj, layers[1].mlp.up_proj):
            matrix.weight[:, 3] /= factor
    return model


def sentence(model: nn.Module, recipe: str) -> str | None:
    watch = OutlierWatch()
    reference_numbers(prepare(Request(model, recipe)).program, watch)
    return watch.sentence(has_remedy=False)


def test_a_column_a_thousand_times_larger_is_told_with_its_sites() -> None:
    assert sentence(with_outlier(1), "rtn-4bit") is None
    watch = OutlierWatch()
    reference_numbers(prepare(Request(with_outlier(1000), "rtn-4bit")).program, watch)
    told = watch.sentence(has_remedy=False)
    assert told is not None
    assert "activation with skip" in str(watch.sentence(has_remedy=True))
    assert "model.layers.1.mlp.gate_proj, model.layers.1.mlp.up_proj read(s)" in told
    assert "layers.0" not in told
    assert "smooth or awq" in told


def test_weights_that_stay_weight_only_are_looked_at_too(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("schema: 1\nname: weights\npasses:\n- canonicalise\n- rtn\n- pack: {format: float32}\n")
    assert "model.layers.1.mlp.gate_proj" in str(sentence(with_outlier(1000), str(recipe)))


def test_a_float_program_has_nothing_to_lose() -> None:
    assert sentence(with_outlier(1000), "float") is None


def test_lower_tells_and_reports_it(tmp_path: Path) -> None:
    told: list[str] = []
    artefact = lower(with_outlier(1000), tmp_path / "out", recipe="rtn-4bit", execution=Execution(warn=told.append))
    (found,) = [notice for notice in told if "half a step" in notice]
    assert found in (artefact.directory / "report.json").read_text()
