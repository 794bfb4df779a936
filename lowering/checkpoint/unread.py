"""Tensors of a checkpoint that no parameter takes: some may be left out, some change what the others mean."""

import re
from collections.abc import Collection, Iterator

from torch import nn

from hikui.lowering.checkpoint.folder import Checkpoint, pieces
from hikui.lowering.errors import HikuiError

_SCALE = re.compile(r"(?:^|[._])(?:scales?|scale_inv|absmax|zero_points?|zeros|qzeros|quant_state|quant_map)(?:[._]|$)")
"""The last part of a name that says how other numbers are to be read."""

_MADE_BY_THE_MODEL = (r"(?:^|\.)rotary_emb\.inv_freq$", r"\.attn\.(?:attention\.)?(?:masked_)?bias$", r"\.attn\.rope\.")
"""Tables that older checkpoints hold and every model of theirs works out itself."""

_NAMED = 3


def look_for_unread(checkpoint: Checkpoint, module: nn.Module, read: Collection[str], prefix: str) -> tuple[str, ...]:
    """Looks at what is left of a checkpoint when the model has taken its parameters.

    Args:
        checkpoint: the folder.
        module: the model.
        read: the keys that were taken.
        prefix: name of the base model inside the causal language model.

    Returns:
        A sentence where some tensors have no use, or nothing.

    Raises:
        HikuiError: one of them is a scale, or belongs to a layer of the model and is not zero: without it the model
            would be another.
    """
    taken = {id(checkpoint.tensors[key]) for key in read}
    ignored = _ignored(module)
    left = [
        key
        for key, tensor in sorted(checkpoint.tensors.items())
        if id(tensor) not in taken and not any(pattern.search(key) for pattern in ignored)
    ]
    names = {name for name, _ in module.named_buffers()} | {
        name for name, _ in module.named_parameters(remove_duplicate=False)
    }
    unread = [key for key in left if not any(name in names for name in _spellings(key, prefix))]
    for key in unread:
        _refuse_what_counts(checkpoint, module, key, prefix)
    if not unread:
        return ()
    named = ", ".join(f"'{key}'" for key in unread[:_NAMED])
    more = f" and {len(unread) - _NAMED} more" if len(unread) > _NAMED else ""
    return (f"No part of the model takes {named}{more} of the checkpoint; what they say is left out.",)


def _ignored(module: nn.Module) -> list[re.Pattern[str]]:
    own = getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()
    return [re.compile(pattern) for pattern in (*own, *_MADE_BY_THE_MODEL)]


def _spellings(key: str, prefix: str) -> Iterator[str]:
    """What the module may call a checkpoint's key: with the name of the base model, or without."""
    yield from (key, key.removeprefix(prefix + "."), f"{prefix}.{key}")


def _refuse_what_counts(checkpoint: Checkpoint, module: nn.Module, key: str, prefix: str) -> None:
    parts = key.split(".")
    # A packed matrix's own parts hang below its name: `….weight.absmax`.
    ends = [end for end in range(1, len(parts)) if _is_layer(module, ".".join(parts[:end]), prefix)]
    if not ends:
        return
    rest = parts[ends[-1] :]
    if _SCALE.search(".".join(rest)):
        raise HikuiError(
            f"The checkpoint {checkpoint.folder} holds '{key}', by which weights are to be multiplied, and the model "
            "by its config.json takes no such tensor; give the float checkpoint, or one whose config says how it is "
            "quantised."
        )
    if len(rest) == 1 and any(bool(piece.count_nonzero()) for piece in pieces(checkpoint.tensors[key])):
        raise HikuiError(
            f"The checkpoint {checkpoint.folder} holds '{key}', which is not zero, and the model by its config.json "
            "has no such parameter; config and weights belong to different models, or the config lacks a setting."
        )


def _is_layer(module: nn.Module, key: str, prefix: str) -> bool:
    """Whether a module of that name has parameters of its own."""
    for name in _spellings(key, prefix):
        try:
            found = module.get_submodule(name)
        except AttributeError:
            continue
        if next(found.parameters(recurse=False), None) is not None:
            return True
    return False
