"""Traces a Hugging Face causal language model into a program.

The model is exported once with a symbolic number of tokens, around a wrapper that brings its own positions, mask and
key-value cache (`wrapper`); nothing here asks for a model by name. Weights stay where they are: the graph sees fake
tensors, the store reads the checkpoint.
"""

import copy
import logging
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as symbolic_config
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.value_ranges import ValueRanges

import hikui.lowering.ir.dialect  # noqa: F401  (registers the ops that the wrapper calls)
from hikui.lowering.checkpoint.folder import check_finite
from hikui.lowering.errors import HikuiError
from hikui.lowering.ir.cache_shape import CacheShape
from hikui.lowering.ir.program import ModelConfig, Program
from hikui.lowering.ir.store import MemoryTensor, TensorSource, WeightStore
from hikui.lowering.trace.blocks import assign_blocks
from hikui.lowering.trace.convert import convert
from hikui.lowering.trace.source import OpenModel, open_model
from hikui.lowering.trace.wrapper import IMPLEMENTATION, Decoder, register

__all__ = ["trace"]


def trace(
    model: str | Path | nn.Module,
    *,
    context: int | None = None,
    scratch: Path | None = None,
    tokenizer: str | Path | None = None,
    finite: bool = True,
) -> Program:
    """Trace a model into a program.

    Args:
        model: A Hugging Face folder or hub id, or a transformers causal language model.
        context: Context length C; by default the model's own number of positions, at most 2048.
        scratch: Folder for tensors that passes make; None keeps them in memory.
        tokenizer: Folder with a tokenizer, instead of the checkpoint's own.
        finite: Look for NaN and infinity in the weights, which reads each of them once.

    Returns:
        The program in the calling convention of docs/architecture.md, unquantised; `hikui.block` is set on the nodes
        of each repeated block, and `nn_module_stack` holds the module paths of the checkpoint.

    Raises:
        HikuiError: The checkpoint is damaged or the model cannot be traced; names the tensor, or module and line.
        UsageError: The context is not one that the model admits.
    """
    opened = open_model(model, FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True))
    length = opened.context(context)
    decoder, caches = _prepare(opened, length)
    exported = _export(decoder, opened, caches)
    _check_tokens(exported, length)
    inputs = ("tokens", "past", *(f"{kind}_cache_{i}" for i in range(len(caches)) for kind in ("key", "value")))
    converted = convert(exported, decoder.aliases(), inputs)
    if not any(node.target is torch.ops.hikui.causal_mask.default for node in converted.graph.nodes):
        raise HikuiError("The model cannot be traced: it never asks transformers for an attention mask.")
    assign_blocks(converted.graph)
    sources: dict[str, TensorSource] = {key: opened.sources[key] for key in converted.parameters}
    sources |= {key: MemoryTensor(tensor) for key, tensor in converted.constants.items()}
    store = WeightStore(sources, scratch)
    if finite:
        check_finite(store)
    vocabulary = int(converted.logits.meta["val"].shape[-1])
    ends, cautions = _ends_of_text(opened.eos_token_ids, vocabulary)
    config = ModelConfig(
        context_length=length,
        vocabulary=vocabulary,
        caches=caches,
        architecture=opened.architecture,
        bos_token_id=opened.bos_token_id,
        eos_token_ids=ends,
    )
    folder = Path(tokenizer) if tokenizer is not None else opened.tokenizer
    program = Program(torch.fx.GraphModule(nn.Module(), converted.graph), store, config, folder, cautions)
    # Identities and layout were cut out, so strides may differ from what export saw.
    program.propagate(everything=True)
    program.recompile()
    return program


def _ends_of_text(tokens: tuple[object, ...], vocabulary: int) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The tokens that can end a text, and a sentence for each that no model of this vocabulary can write."""
    known = tuple(token for token in tokens if type(token) is int and 0 <= token < vocabulary)
    cautions = tuple(
        f"The configuration names {token} as a token that ends a text, which is none of the {vocabulary} tokens; it is "
        "left out."
        for token in tokens
        if token not in known
    )
    return known, cautions


def _prepare(opened: OpenModel, context: int) -> tuple[Decoder, tuple[CacheShape, ...]]:
    """Switches the copy of the model to our mask and attention, and learns its cache shapes."""
    register()
    for module in opened.module.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation"):
            config._attn_implementation = IMPLEMENTATION
    scout = copy.deepcopy(opened.module, {id(parameter): parameter for parameter in opened.module.parameters()})
    with torch.no_grad(), opened.mode, _naming_the_place(scout):
        tokens, past = torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        caches = Decoder(scout, context).record(tokens, past)
    return Decoder(opened.module, context), caches


def _example_length(context: int) -> int:
    """A number of tokens that is no size of the model by accident and leaves T free to be anything up to C."""
    return 7 if context > 7 else context - 1


def _oblivious_sizes() -> AbstractContextManager[None]:
    """Keeps T = 1 inside the traced range: by default export takes every symbol to be at least 2."""
    config: Any = symbolic_config  # torch installs `patch` at run time
    patched: AbstractContextManager[None] = config.patch(backed_size_oblivious=True)
    return patched


def _export(decoder: Decoder, opened: OpenModel, shapes: tuple[CacheShape, ...]) -> ExportedProgram:
    context = decoder.context
    with opened.mode:
        tokens = torch.zeros(1, _example_length(context), dtype=torch.int64)
        past = torch.zeros(1, dtype=torch.int64)
        caches = tuple(torch.zeros(1, s.heads, context, s.head_size) for s in shapes for _ in ("key", "value"))
    dynamic = ({1: Dim.DYNAMIC}, None, tuple(None for _ in caches))
    with torch.no_grad(), _oblivious_sizes(), _naming_the_place(opened.module):
        return torch.export.export(decoder, (tokens, past, caches), dynamic_shapes=dynamic, strict=False)


def _check_tokens(exported: ExportedProgram, context: int) -> None:
    """Refuses a model whose code took a branch on the number of tokens, and records that T is 1 to C.

    Every comparison of T that decided something is a guard. Those that torch itself makes at T = 1 only choose strides.
    """
    placeholders = exported.graph.find_nodes(op="placeholder")
    tokens = next(node.meta["val"] for node in placeholders if node.name == "tokens")
    size, shape_env = tokens.shape[1], tokens.fake_mode.shape_env
    if not isinstance(size, torch.SymInt):
        raise HikuiError(f"The model cannot be traced: it works for {size} tokens at a time only.")
    symbol = size.node.expr
    for guard in shape_env.guards:
        frame = guard.sloc.framework_loc
        inside_torch = frame is not None and Path(frame.filename).is_relative_to(Path(torch.__file__).parent)
        failing = [t for t in (1, 2, 3, context - 1, context) if not bool(guard.expr.subs(symbol, t))]
        if failing and not (inside_torch and set(failing) == {1}):
            place = f" at {Path(frame.filename).name}:{frame.lineno}" if frame is not None else ""
            raise HikuiError(
                f"The model cannot be traced: its code branches on the number of tokens{place}, so no one graph serves "
                f"{_example_length(context)} and {failing[0]} tokens."
            )
    shape_env.var_to_range[symbol] = ValueRanges(1, context)


@contextmanager
def _naming_the_place(module: nn.Module) -> Iterator[None]:
    """Turns an exception out of the model's code into a sentence with the module and the source line."""
    names = {id(child): name or "the model" for name, child in module.named_modules()}
    try:
        with _quiet():
            yield
    except HikuiError:
        raise
    except Exception as error:
        place = ""
        for frame, line in traceback.walk_tb(error.__traceback__):
            owner = frame.f_locals.get("self")
            file = Path(frame.f_code.co_filename)
            if id(owner) in names and not file.is_relative_to(Path(torch.__file__).parent):
                place = f" in module '{names[id(owner)]}' ({type(owner).__name__}, {file.name}:{line})"
        reason = (str(error).strip().split("\n")[0] or "no message").rstrip(".")
        raise HikuiError(f"The model cannot be traced: {type(error).__name__}{place}: {reason}.") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps torch from logging the traceback of an error that is about to become one sentence."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
