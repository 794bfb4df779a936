"""Traces a Hugging Face causal language model into a program.

The model is exported once with a symbolic number of tokens, around a wrapper that brings its own positions, mask and
key-value cache (`wrapper`); nothing here asks for a model by name. Weights stay where they are: the graph sees fake
tensors, the store reads the checkpoint.
"""

import copy
import logging
import math
import re
import traceback
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as symbolic_config
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv
from torch.utils._sympy.value_ranges import ValueRanges

import hikui.lowering.ir.dialect  # noqa: F401  (registers the ops that the wrapper calls)
from hikui.lowering.checkpoint.folder import check_finite
from hikui.lowering.errors import HikuiError
from hikui.lowering.huggingface.remote_code import refuse_tokenizer_code
from hikui.lowering.huggingface.tokenizer import ModelTokenizer
from hikui.lowering.ir.cache_shape import CacheShape
from hikui.lowering.ir.program import ModelConfig, Program
from hikui.lowering.ir.store import MemoryTensor, TensorSource, WeightStore
from hikui.lowering.trace.blocks import assign_blocks
from hikui.lowering.trace.convert import convert, writes_in_place
from hikui.lowering.trace.fidelity import Fidelity, compare, own_model
from hikui.lowering.trace.source import OpenModel, open_model
from hikui.lowering.trace.wrapper import IMPLEMENTATION, Decoder, FunctionalCache, register

_SIZES_DIFFER = re.compile(r"broadcast|[Ss]ize of tensor a|must match the (existing )?size")
"""What torch says where the operands of an operation have sizes that do not fit."""

__all__ = ["Fidelity", "trace", "trace_and_compare"]


def trace(
    model: str | Path | nn.Module,
    *,
    context: int | None = None,
    scratch: Path | None = None,
    tokenizer: str | Path | None = None,
    finite: bool = True,
    trust_remote_code: bool = False,
) -> Program:
    """Trace a model into a program.

    Args:
        model: A Hugging Face folder or hub id, a GGUF file, or a transformers causal language model.
        context: Context length C; by default the model's own number of positions, at most 2048.
        scratch: Folder for tensors that passes make; None keeps them in memory.
        tokenizer: Folder with a tokenizer, instead of the checkpoint's own.
        finite: Look for NaN and infinity in the weights, which reads each of them once.
        trust_remote_code: Run Python files that come with the checkpoint or the tokenizer.

    Returns:
        The program in the calling convention of docs/architecture.md, unquantised; `hikui.block` is set on the nodes
        of each repeated block, and `nn_module_stack` holds the module paths of the checkpoint.

    Raises:
        HikuiError: The checkpoint is damaged or the model cannot be traced; names the tensor, or module and line.
        UsageError: The context is not one that the model admits.
    """
    opened, known = _open(model, tokenizer, trust_remote_code)
    return _traced(opened, known, context, scratch, finite)


def trace_and_compare(
    model: str | Path | nn.Module,
    *,
    context: int | None = None,
    scratch: Path | None = None,
    tokenizer: str | Path | None = None,
    finite: bool = True,
    trust_remote_code: bool = False,
) -> tuple[Program, Fidelity]:
    """As `trace`, and holds the program to the model's own logits.

    Raises:
        HikuiError: also where the program's logits are not the model's, or not finite.
    """
    opened, known = _open(model, tokenizer, trust_remote_code)
    own = own_model(opened)
    program = _traced(opened, known, context, scratch, finite)
    return program, compare(program, own, opened.sources)


def _open(
    model: str | Path | nn.Module, tokenizer: str | Path | None, trusted: bool
) -> tuple[OpenModel, ModelTokenizer | None]:
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    opened = open_model(model, mode, trust_remote_code=trusted)
    folder = Path(tokenizer) if tokenizer is not None else opened.tokenizer
    if folder is not None:
        refuse_tokenizer_code(folder, trusted=trusted)
    return opened, None if folder is None else ModelTokenizer(folder, trusted)


def _traced(
    opened: OpenModel, tokenizer: ModelTokenizer | None, context: int | None, scratch: Path | None, finite: bool
) -> Program:
    length = opened.context(context)
    decoder, caches, masks = _prepare(opened, length)
    exported = _export(decoder, opened, caches, masks)
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
    config = ModelConfig(
        context_length=length,
        vocabulary=int(converted.logits.meta["val"].shape[-1]),
        caches=caches,
        architecture=opened.architecture,
        bos_token_id=opened.bos_token_id,
        eos_token_ids=opened.eos_token_ids,
    )
    infos = [sources[key].info for key in sorted(set(converted.parameters))]
    program = Program(
        torch.fx.GraphModule(nn.Module(), converted.graph), store, config, tokenizer, opened.cautions,
        sum(math.prod(info.shape) for info in infos if info.dtype.is_floating_point),
    )  # fmt: skip
    # Identities and layout were cut out, so strides may differ from what export saw.
    program.propagate(everything=True)
    program.recompile()
    return program


def _prepare(opened: OpenModel, context: int) -> tuple[Decoder, tuple[CacheShape, ...], tuple[str | None, ...]]:
    """Switches the copy of the model to our mask and attention, and learns its cache shapes and its masks."""
    register()
    for module in opened.module.modules():
        _settle_rope(module)
        config: Any = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation"):
            config._attn_implementation = IMPLEMENTATION
    scout = copy.deepcopy(opened.module, {id(parameter): parameter for parameter in opened.module.parameters()})
    with torch.no_grad(), opened.mode, _naming_the_place(scout):
        tokens, past = torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        caches, masks = Decoder(scout, context).record(tokens, past)
    return Decoder(opened.module, context), caches, masks


def _settle_rope(module: Any) -> None:
    """Dynamic rotary angles change only beyond the model's positions, which no context exceeds: up to there they rest.

    What decides it is read from values, which no graph can branch on.
    """
    kinds = getattr(module, "rope_type", None)
    if isinstance(kinds, dict):
        module.rope_type = {layer: "default" if kind == "dynamic" else kind for layer, kind in kinds.items()}
    elif kinds == "dynamic":
        module.rope_type = "default"


def _example_length(context: int) -> int:
    """A number of tokens that is no size of the model by accident and leaves T free to be anything up to C."""
    return 7 if context > 7 else context - 1


def _oblivious_sizes() -> AbstractContextManager[None]:
    """Keeps T = 1 inside the traced range: by default export takes every symbol to be at least 2."""
    config: Any = symbolic_config  # torch installs `patch` at run time
    patched: AbstractContextManager[None] = config.patch(backed_size_oblivious=True)
    return patched


def _export(
    decoder: Decoder, opened: OpenModel, shapes: tuple[CacheShape, ...], masks: tuple[str | None, ...]
) -> ExportedProgram:
    context = decoder.context
    with opened.mode:
        tokens = torch.zeros(1, _example_length(context), dtype=torch.int64)
        past = torch.zeros(1, dtype=torch.int64)
        caches = tuple(torch.zeros(1, s.heads, context, s.head_size) for s in shapes for _ in ("key", "value"))
    dynamic = ({1: Dim.DYNAMIC}, None, tuple(None for _ in caches))
    with torch.no_grad(), _oblivious_sizes(), _naming_the_place(opened.module):
        exported = torch.export.export(decoder, (tokens, past, caches), dynamic_shapes=dynamic, strict=False)
        _check_masks(exported.graph, masks)
        # An empty table takes nothing apart: what is left is that each op that writes becomes one that returns.
        return exported.run_decompositions({}) if writes_in_place(exported.graph) else exported


def _check_masks(graph: torch.fx.Graph, masks: tuple[str | None, ...]) -> None:
    """Refuses a mask that is not plain causal, unless nothing reads it: some models ask for one they may not need."""
    asked = list(graph.find_nodes(op="call_function", target=torch.ops.hikui.causal_mask.default))
    read = set(graph.output_node().all_input_nodes)
    for node in reversed(graph.nodes):
        if node in read:
            read.update(node.all_input_nodes)
    same = len(asked) == len(masks)
    for at, reason in enumerate(masks):
        if reason is not None and not (same and asked[at] not in read):
            raise HikuiError(reason)


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
        raise HikuiError(f"The model cannot be traced: {_in_words(error, place)}.") from error


def _in_words(error: Exception, place: str) -> str:
    """What went wrong, without the names of what stands in for transformers' own cache while a model is traced."""
    if isinstance(error, GuardOnDataDependentSymNode):
        return f"its code decides{place} by a number that is known only when it runs, such as how many tokens were seen"
    if isinstance(error, AttributeError) and isinstance(error.obj, FunctionalCache):
        return f"it asks{place} for '{error.name}' of its key-value cache, which hikui's cache does not have"
    reason = (str(error).strip().split("\n")[0] or "no message").rstrip(".")
    if _SIZES_DIFFER.search(reason):
        sizes = " and ".join(re.findall(r"\[[\d, ]+\]", reason))
        return (
            f"its code joins tensors{place} whose sizes do not fit{f', {sizes}' if sizes else ''}; it is called with a "
            "key-value cache that has a place for every token of the context from the start"
        )
    reason = re.sub(r"'?(Recording|Functional)Cache'?( object)?", "hikui's key-value cache", reason)
    return f"{type(error).__name__}{place}: {reason}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps torch from logging the traceback of an error that is about to become one sentence."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on what torch itself and the model's code call
            yield
    finally:
        logger.disabled = before
