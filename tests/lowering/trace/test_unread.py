"""Tensors of a checkpoint that no parameter takes."""

from pathlib import Path

import pytest
import torch

from hikui.lowering.trace import trace
from hikui.models.synthetic import tiny_checkpoint

from .test_checkpoint import QUERY, refusal, rewrite

OWNER = QUERY.removesuffix(".weight")


def with_tensor(folder: Path, key: str, value: torch.Tensor) -> None:
    rewrite(folder, lambda tensors: tensors.update({key: value}))


def test_a_bias_that_the_config_does_not_have_is_refused(checkpoint: Path) -> None:
    with_tensor(checkpoint, f"{OWNER}.bias", torch.full((32,), 0.5))
    message = refusal(checkpoint)
    assert f"'{OWNER}.bias', which is not zero" in message
    assert "config" in message


def test_a_bias_of_zeros_is_told(checkpoint: Path) -> None:
    with_tensor(checkpoint, f"{OWNER}.bias", torch.zeros(32))
    assert trace(checkpoint).cautions == (
        f"No part of the model takes '{OWNER}.bias' of the checkpoint; what they say is left out.",
    )


SCALES = ["weight_scale", "weight_scale_inv", "scales", "weight.absmax", "weight.quant_state.x"]


@pytest.mark.parametrize("name", SCALES)
def test_a_scale_beside_weights_is_refused(checkpoint: Path, name: str) -> None:
    with_tensor(checkpoint, f"{OWNER}.{name}", torch.zeros(1))
    assert f"'{OWNER}.{name}', by which weights are to be multiplied" in refusal(checkpoint)


def test_what_belongs_to_no_layer_is_told_by_name(checkpoint: Path) -> None:
    for index in range(5):
        with_tensor(checkpoint, f"visual.blocks.{index}.weight", torch.ones(2))
    (sentence,) = trace(checkpoint).cautions
    assert "'visual.blocks.0.weight', 'visual.blocks.1.weight', 'visual.blocks.2.weight' and 2 more" in sentence


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_a_checkpoint_as_it_was_saved_leaves_nothing(family: str, tmp_path: Path) -> None:
    tiny_checkpoint(family, tmp_path / family)
    assert trace(tmp_path / family).cautions == ()


def test_tables_that_older_checkpoints_hold_are_passed_over(checkpoint: Path) -> None:
    with_tensor(checkpoint, "model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(4))
    assert trace(checkpoint).cautions == ()


def test_integers_where_floats_are_due_are_refused(checkpoint: Path) -> None:
    rewrite(checkpoint, lambda tensors: tensors.update({QUERY: tensors[QUERY].to(torch.int8)}))
    assert f"The tensor '{QUERY}'" in (message := refusal(checkpoint))
    assert "has dtype int8" in message
