"""The table of single matrices, on small made ones."""

from pathlib import Path

import pytest
import torch
from benchmarks import matrices
from safetensors.torch import save_file

from hikui.lowering.formats import Format

WIDTH = 64


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> matrices.Layer:
    generator = torch.Generator().manual_seed(3)
    made = {
        f"decoder1.att.{name}.w": torch.randn(WIDTH, WIDTH, generator=generator) / 8
        for name in ("query", "key", "value", "proj")
    }
    made |= {f"decoder1.att.norm.{name}": torch.rand(WIDTH, generator=generator) + 0.1 for name in "wb"}
    made["decoder1.att.value.b"] = torch.randn(WIDTH, generator=generator) / 8
    path: Path = tmp_path_factory.mktemp("tensors") / "made.safetensors"
    save_file(made, path)
    (found,) = matrices.layers(path)
    return found


@pytest.mark.parametrize("name", sorted(matrices.methods(Format.parse("int8-g32"))))
def test_every_method_rounds_the_matrix_that_it_was_given(layer: matrices.Layer, name: str) -> None:
    rows = {
        str(row["matrix"]): row for row in matrices.measure(layer, matrices.methods(Format.parse("int8-g32"))[name])
    }
    assert set(rows) == {
        *(f"decoder1.{matrix}" for matrix in ("query", "key", "value", "proj")),
        "decoder1.proj behind value",
        "decoder1.proj behind value, QEP",
    }
    # 8 bits: half a step of 1/127 of a group's largest value, so a rotation or scale not undone would stand out.
    assert all(float(str(row["output"])) < 1e-3 for row in rows.values())
    assert all(float(str(row["weight"])) < 1e-3 for row in rows.values() if "weight" in row)


def test_correction_helps_where_values_were_rounded(layer: matrices.Layer) -> None:
    fmt = Format.parse("int2-g32")
    rows = matrices.measure(layer, matrices.methods(fmt)["gptq, mse, act order"])
    errors = {str(row["matrix"]): float(str(row["output"])) for row in rows}
    plain, corrected = errors["decoder1.proj behind value"], errors["decoder1.proj behind value, QEP"]
    assert errors["decoder1.proj"] < corrected < plain
    assert matrices.table(rows).count("|") == 3
