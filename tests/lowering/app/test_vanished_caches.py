"""A quantised cache that holds nothing is refused before the artefact is written."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hikui.lowering.app.assemble import reference_numbers
from hikui.lowering.app.lower import prepare
from hikui.lowering.app.request import Request
from hikui.lowering.errors import HikuiError
from hikui.models.synthetic import tiny_model


def shrunk(exponent: int) -> nn.Module:
    """The same function, its values a power of two smaller and the output projection as much larger."""
    model = tiny_model("llama")
    with torch.no_grad():
        layers: Any = model.get_submodule("model.layers")
        for layer in layers:
            layer.self_attn.v_proj.weight *= 2.0**-exponent
            layer.self_attn.o_proj.weight *= 2.0**exponent
    return model


@pytest.mark.parametrize("bits", [8, 4])
def test_values_below_half_precision_are_refused(bits: int, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"schema: 1\nname: cached\npasses:\n- canonicalise\n- kv_cache: {{bits: {bits}}}\n- pack: {{format: float32}}\n"
    )
    reference_numbers(prepare(Request(shrunk(8), recipe)).program)
    with pytest.raises(HikuiError, match=r"The values of layer 0 are so small .* hold 0 % of them; lower without kv_"):
        reference_numbers(prepare(Request(shrunk(24), recipe)).program)
