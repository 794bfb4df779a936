"""What a checkpoint's config may not say, found before transformers builds anything from it."""

import math
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from hikui.lowering.errors import HikuiError

ADAPTER = "adapter_config.json"

_BOUNDS = re.compile(r"(^|\.)time_step_limit(\[|$)")
"""Keys whose infinity is an open bound and no number that is computed with."""

_LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


def refuse_adapter(folder: Path) -> None:
    """Refuses a folder with an adapter, which transformers would apply to the weights beside it.

    Raises:
        HikuiError: says how to merge it.
    """
    if not (folder / ADAPTER).is_file():
        return
    if not (folder / "config.json").is_file():
        raise HikuiError(
            f"{folder} holds an adapter ({ADAPTER}) and not the model that it is for; merge the two (PEFT's "
            "merge_and_unload, then save_pretrained) and give the merged folder."
        )
    raise HikuiError(
        f"{folder} holds an adapter ({ADAPTER}) beside the weights, which hikui would not apply; merge it (PEFT's "
        f"merge_and_unload, then save_pretrained), or take {ADAPTER} away to lower the weights without it."
    )


def refuse_non_finite(config: Mapping[str, Any], where: str) -> None:
    """Refuses a config with NaN or infinity in it, which would reach the program as a constant.

    Raises:
        HikuiError: names the key.
    """
    for key, value in _numbers(config, ""):
        if not math.isfinite(value) and not _BOUNDS.search(key):
            raise HikuiError(
                f"{where} sets {key} to {value}, which is no finite number; put the model's own value there."
            )


def _numbers(value: object, key: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, float):
        yield key, value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _numbers(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _numbers(inner, f"{key}[{index}]")


def refuse_more_layers(config: Mapping[str, Any], tensors: Collection[str], where: str) -> None:
    """Refuses a config with more layers than the checkpoint has tensors, before they are all built.

    Raises:
        HikuiError: names the key and both numbers.
    """
    for key in _LAYER_KEYS:
        layers = config.get(key)
        if isinstance(layers, int) and layers > len(tensors):
            raise HikuiError(
                f"{where} sets {key} to {layers}, but the checkpoint has {len(tensors)} tensors in all, and every "
                "layer has at least one; give the config.json that was saved with these weights."
            )


def token_ids(value: object, name: str) -> tuple[int, ...]:
    """The token ids that a config names under `bos_token_id` or `eos_token_id`: none, one or a list.

    Raises:
        HikuiError: it is something else.
    """
    if value is None:
        return ()
    ids = value if isinstance(value, list | tuple) else [value]
    for token in ids:
        if type(token) is not int:
            raise HikuiError(f"The model's config sets {name} to {value!r}; it is a token id, a list of them, or null.")
    return tuple(ids)


def refuse_outside(ids: Collection[int], name: str, vocabulary: int) -> None:
    """Refuses token ids of a config that are none of the model's.

    Raises:
        HikuiError: names the key and the id.
    """
    for token in ids:
        if not 0 <= token < vocabulary:
            raise HikuiError(
                f"The model's config (config.json or generation_config.json) sets {name} to {token}, but its tokens go "
                f"from 0 to {vocabulary - 1}; put the tokenizer's id there, or null where there is none."
            )
