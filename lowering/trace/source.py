"""Opens a checkpoint folder, a GGUF, a hub id or a module as a model without weights, plus where the weights lie."""

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hikui.lowering.checkpoint.folder import Checkpoint, Float32Tensor
from hikui.lowering.checkpoint.gguf_model import by_parameter
from hikui.lowering.checkpoint.gguf_tensor import GgufTensor
from hikui.lowering.checkpoint.quantised import CONFIG_KEY
from hikui.lowering.checkpoint.unread import look_for_unread
from hikui.lowering.errors import HikuiError, UsageError, first_line
from hikui.lowering.huggingface.config import refuse_adapter, refuse_more_layers, refuse_non_finite, token_ids
from hikui.lowering.huggingface.gguf_file import FLOAT_KINDS
from hikui.lowering.huggingface.remote_code import refuse_model_code
from hikui.lowering.ir.store import MemoryTensor, TensorSource

DEFAULT_CONTEXT = 2048

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_BOS, _EOS = "bos_token_id", "eos_token_id"
_HUB_FILES = ("*.json", "*.safetensors", "tokenizer.model", "vocab.txt", "merges.txt")


@dataclass(frozen=True)
class OpenModel:
    """A model ready to be traced.

    Attributes:
        module: Its parameters are fake float32 tensors of `mode`; its buffers are real.
        mode: The fake mode.
        sources: Where the true values lie, by parameter name.
        architecture: Name of the model's class, for reports.
        positions: The longest context that the model admits; None where nothing bounds it.
        bos_token_id: From the generation config, else the config.
        eos_token_ids: Likewise.
        tokenizer: Folder with the tokenizer, or GGUF file, if any.
        cautions: What a user should know of how it was read, a sentence each.
    """

    module: nn.Module
    mode: FakeTensorMode
    sources: Mapping[str, TensorSource]
    architecture: str
    positions: int | None
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    tokenizer: Path | None
    cautions: tuple[str, ...] = ()

    def context(self, wanted: int | None) -> int:
        """The context length to trace at.

        Raises:
            UsageError: The wanted one is longer than the model's positions, or too short to be one.
        """
        if wanted is None:
            return min(self.positions or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
        if wanted < 2:
            raise UsageError(f"A context of {wanted} tokens is too short; give at least 2.")
        if self.positions is not None and wanted > self.positions:
            raise UsageError(f"A context of {wanted} tokens is longer than the model's {self.positions} positions.")
        return wanted


def open_model(model: str | Path | nn.Module, mode: FakeTensorMode, *, trust_remote_code: bool = False) -> OpenModel:
    """Opens a model; `mode` makes the fake parameters, and Python files of the checkpoint run only where trusted.

    Raises:
        HikuiError: The checkpoint is missing, damaged, quantised in a way that is not read, no causal language model,
            or one that needs code of its own.
    """
    if isinstance(model, nn.Module):
        return _open_module(model, mode)
    folder = Path(model)
    if not folder.exists() and isinstance(model, str) and _HUB_ID.fullmatch(model):
        folder = _download(model, trust_remote_code)
    return _open_folder(folder, mode, trust_remote_code)


def _download(name: str, trusted: bool) -> Path:
    from huggingface_hub import snapshot_download

    try:
        patterns = [*_HUB_FILES, *(("*.py",) if trusted else ())]
        folder = Path(snapshot_download(name, allow_patterns=patterns))
        if not any(folder.glob("*.safetensors")):  # older repositories hold pickles only
            snapshot_download(name, allow_patterns=["pytorch_model*.bin"])
        return folder
    except Exception as error:  # network, authentication and validation errors share no base class
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise HikuiError(f"There is no folder {name}, and the hub did not give it: {reason}.") from error


def _open_folder(folder: Path, mode: FakeTensorMode, trusted: bool) -> OpenModel:
    refuse_adapter(folder)
    checkpoint = Checkpoint.open(folder)
    refuse_model_code(folder, trusted=trusted)
    where = str(folder / "config.json" if checkpoint.has_config else folder)
    refuse_non_finite(checkpoint.config, where)
    refuse_more_layers(checkpoint.config, checkpoint.tensors, where)
    module = _empty_model(checkpoint, trusted)
    checkpoint = _named_as_parameters(module, checkpoint)
    sources, cautions = _checkpoint_sources(module, checkpoint)
    cautions = (*cautions, *_stored_as(checkpoint))
    generation = checkpoint.generation_config()
    return OpenModel(
        module=_with_fake_weights(module, mode),
        mode=mode,
        sources=sources,
        architecture=type(module).__name__,
        positions=_positions(module),
        bos_token_id=_first(generation.get(_BOS, checkpoint.config.get(_BOS))),
        eos_token_ids=token_ids(generation.get(_EOS, checkpoint.config.get(_EOS)), _EOS),
        tokenizer=checkpoint.tokenizer_folder(),
        cautions=cautions,
    )


def _open_module(module: nn.Module, mode: FakeTensorMode) -> OpenModel:
    config: Any = getattr(module, "config", None)
    if config is None or not hasattr(config, "_attn_implementation"):
        raise HikuiError(
            f"{type(module).__name__} is not a Hugging Face causal language model (it has no config), so hikui does "
            "not know how to call it; give a transformers model or a checkpoint folder."
        )
    _refuse_encoders(config)
    refuse_non_finite(config.to_dict(), f"The config of {type(module).__name__}")
    generation = getattr(module, "generation_config", None) or config
    sources: dict[str, TensorSource] = {}
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            raise HikuiError(f"The parameter '{name}' is on the meta device and has no values; load the model first.")
        sources[name] = Float32Tensor(MemoryTensor(parameter.detach()))
    return OpenModel(
        module=_with_fake_weights(module, mode),
        mode=mode,
        sources=sources,
        architecture=type(module).__name__,
        positions=_positions(module),
        bos_token_id=_first(getattr(generation, _BOS, None)),
        eos_token_ids=token_ids(getattr(generation, _EOS, None), _EOS),
        tokenizer=None,
    )


def _first(value: object) -> int | None:
    return next(iter(token_ids(value, _BOS)), None)


def _positions(module: nn.Module) -> int | None:
    """The number of positions by the config; ALiBi models have none, BLOOM's `seq_length` is what it was trained at."""
    config: Any = module.config
    for name in ("max_position_embeddings", "n_positions", "seq_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _refuse_encoders(config: Any) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise HikuiError(
            f"The model type '{config.model_type}' is an encoder-decoder; hikui lowers decoder-only models."
        )
    quantisation = getattr(config, "quantization_config", None)
    if quantisation is not None:
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation.quant_method
        raise HikuiError(
            f"The checkpoint is already quantised ({method}); give the float checkpoint, hikui quantises in the graph."
        )


def _empty_model(checkpoint: Checkpoint, trusted: bool) -> nn.Module:
    """Builds the model on the meta device, with real buffers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        if checkpoint.has_config:
            config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=trusted, local_files_only=True)
        else:
            config = AutoConfig.for_model(**checkpoint.config)
    except Exception as error:  # KeyError, ValueError, ImportError, validation errors: whatever the config provokes
        where = checkpoint.folder / "config.json" if checkpoint.has_config else f"the metadata of {checkpoint.folder}"
        raise HikuiError(f"transformers rejects {where}: {first_line(error)}.") from error
    if checkpoint.quantisation is not None and hasattr(config, CONFIG_KEY):
        # The checkpoint gives floats, so the model is the float one.
        delattr(config, CONFIG_KEY)
    _refuse_encoders(config)
    try:
        with torch.device("meta"):
            module: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=trusted, dtype=torch.float32)
        _materialise_buffers(module)
    except HikuiError:
        raise
    except Exception as error:
        raise HikuiError(
            f"transformers cannot build a causal language model from {checkpoint.folder}: {first_line(error)}."
        ) from error
    return module.eval()


def _materialise_buffers(module: nn.Module) -> None:
    """Gives the buffers of a model built on the meta device their values, as `from_pretrained` does.

    transformers computes buffers anew in `_init_weights`; a sentinel tells whether it really did.
    """
    initialiser: dict[str, Callable[[nn.Module], None]] = {}
    for name, owner in module.named_modules():
        if hasattr(owner, "_init_weights"):
            initialiser[name] = owner._init_weights
        names = [key for key, buffer in owner.named_buffers(recurse=False) if buffer.is_meta]
        if not names:
            continue
        for key in names:
            meta = owner._buffers[key]
            assert meta is not None
            owner._buffers[key] = _sentinel(meta)
        nearest = max((prefix for prefix in initialiser if _inside(name, prefix)), key=len)
        initialiser[nearest](owner)
        for key in names:
            value = owner._buffers[key]
            assert value is not None
            if torch.equal(value, sentinel := _sentinel(value)) or (value.isnan() & sentinel.isnan()).any():
                raise HikuiError(
                    f"The buffer '{name}.{key}' has no values in the checkpoint's config, so the model cannot be built "
                    "from the folder; load it with transformers and give hikui the module."
                )


def _inside(name: str, prefix: str) -> bool:
    return not prefix or name == prefix or name.startswith(prefix + ".")


def _sentinel(like: Tensor) -> Tensor:
    if like.dtype.is_floating_point:
        return torch.full(like.shape, float("nan"), dtype=like.dtype)
    lowest = 0 if like.dtype == torch.bool else torch.iinfo(like.dtype).min
    return torch.full(like.shape, lowest, dtype=like.dtype)


def _checkpoint_sources(module: nn.Module, checkpoint: Checkpoint) -> tuple[dict[str, TensorSource], tuple[str, ...]]:
    """Finds each parameter in the checkpoint, and unties those that the checkpoint holds twice with two values.

    Returns:
        The parameters by name, and what is to be said of the tensors that none of them is.
    """
    prefix = str(getattr(module, "base_model_prefix", "model"))
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    sources: dict[str, TensorSource] = {}
    missing, read = [], []
    for tied in names.values():
        shape = tuple(module.get_parameter(tied[0]).shape)
        keys = [checkpoint.find([name], prefix) for name in tied]
        held = [key for key in keys if key is not None]
        if not held:
            missing.append(tied[0])
            continue
        read += held
        sources[tied[0]] = checkpoint.source(held[0], tied[0], shape, transposed=_keeps_transposed(module, tied[0]))
        for name, key in zip(tied[1:], keys[1:], strict=True):
            if key is not None and key != held[0] and not checkpoint.identical(key, held[0]):
                owner, _, attribute = name.rpartition(".")
                setattr(module.get_submodule(owner), attribute, nn.Parameter(torch.empty(shape, device="meta")))
                sources[name] = checkpoint.source(key, name, shape, transposed=_keeps_transposed(module, name))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise HikuiError(
            f"The checkpoint {checkpoint.folder} has no tensor for '{missing[0]}'{more}"
            f"{_why_missing(missing, checkpoint)}."
        )
    return sources, look_for_unread(checkpoint, module, read, prefix)


def _named_as_parameters(module: nn.Module, checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with its tensors by the names of the module's parameters, as far as another name is known."""
    if checkpoint.gguf is None:
        return _following_renames(module, checkpoint)
    held = {name: tensor for name, tensor in checkpoint.tensors.items() if isinstance(tensor, GgufTensor)}
    return replace(checkpoint, tensors=by_parameter(checkpoint.gguf, held, module))


def _stored_as(checkpoint: Checkpoint) -> tuple[str, ...]:
    """A sentence where the floats of a checkpoint are rounded ones already."""
    kinds = {} if checkpoint.gguf is None else checkpoint.gguf.kinds()
    if not set(kinds) - FLOAT_KINDS:
        return ()
    told = ", ".join(f"{kind} {count} tensor{'s' if count > 1 else ''}" for kind, count in kinds.items())
    return (
        f"The weights are stored as {told}: what is not adopted as it is becomes floats, which are no nearer to the "
        "model that was trained, and is rounded a second time where it is quantised.",
    )


def _following_renames(module: nn.Module, checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with those parameters added that it holds by a name which transformers changes on load."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    model: Any = module
    renames = [change for change in get_model_conversion_mapping(model) if isinstance(change, WeightRenaming)]
    wanted = {name for name, _ in module.named_parameters(remove_duplicate=False)} - set(checkpoint.tensors)
    found = {}
    for key, tensor in checkpoint.tensors.items():
        name = key
        for rename in renames:
            name = rename.rename_source_key(name)[0]
        if name in wanted:
            found[name] = tensor
    return replace(checkpoint, tensors={**checkpoint.tensors, **found}) if found else checkpoint


def _why_missing(missing: list[str], checkpoint: Checkpoint) -> str:
    """What is known of names that a checkpoint lacks: some that transformers makes itself when it loads one."""
    if any(".experts." in name for name in missing):
        return ": transformers fuses a mixture's experts when it loads them, and hikui does not support mixtures yet"
    return f", which its {'config.json' if checkpoint.has_config else 'metadata'} asks for"


def _keeps_transposed(module: nn.Module, name: str) -> bool:
    """Whether a parameter is the [K, N] matrix of a transformers `Conv1D`."""
    return type(module.get_submodule(name.rpartition(".")[0])).__name__ == "Conv1D"


def _with_fake_weights(module: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy of a module whose parameters hold no data; the module itself stays as it is."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        dtype = torch.float32 if parameter.dtype.is_floating_point else parameter.dtype
        with mode:
            memo[id(parameter)] = nn.Parameter(torch.empty(parameter.shape, dtype=dtype), requires_grad=False)
    try:
        result = copy.deepcopy(module, memo).eval()
    except Exception as error:
        raise HikuiError(
            f"The module {type(module).__name__} cannot be copied for tracing: {first_line(error)}."
        ) from error
    for owner in result.modules():
        for key, buffer in owner.named_buffers(recurse=False):
            if buffer.dtype.is_floating_point:
                owner._buffers[key] = buffer.detach().to("cpu", torch.float32)
    return result
