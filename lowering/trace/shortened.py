"""The first blocks and the head of a program and of its model, to compare what is too large to run whole."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.hooks import RemovableHandle

from hikui.lowering.ir.program import BLOCK, Program
from hikui.lowering.ir.store import MemoryTensor, TensorSource
from hikui.lowering.trace.blocks import block_list, block_results

_FEWEST = 2


def different_blocks(program: Program) -> int:
    """How many blocks from the first on hold one of each kind, at least two where there are so many.

    Blocks are of one kind where their calls are the same, on operands of the same shapes, on the same values from
    outside, and on constants of the same content: a sliding window may be no more than another table.
    """
    calls: dict[int, list[str]] = {}
    for node in program.graph.nodes:
        if (block := node.meta.get(BLOCK)) is not None:
            calls.setdefault(block, []).append(_kind(program, node))
    first: dict[tuple[str, ...], int] = {}
    for block in sorted(calls):
        first.setdefault(tuple(calls[block]), block)
    return min(max([_FEWEST, *(block + 1 for block in first.values())]), len(calls))


def _kind(program: Program, node: fx.Node) -> str:
    def described(operand: fx.Node) -> Any:
        value = operand.meta.get("val")
        shape = tuple(map(str, value.shape)) if isinstance(value, Tensor) else str(value)
        if operand.op == "placeholder":
            return shape, _content(program, operand)
        return shape, "" if BLOCK in operand.meta else operand.name

    return str((node.target, fx.node.map_arg((node.args, node.kwargs), described)))


def _content(program: Program, placeholder: fx.Node) -> str:
    """A constant of the model's code by its bytes; parameters, which differ from block to block, by nothing."""
    if placeholder not in program.weight_nodes():
        return ""
    source = program.store.source(program.weight_of(placeholder))
    if not isinstance(source, MemoryTensor):
        return ""
    return hashlib.sha256(source.tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


def shortened(program: Program, blocks: int) -> Program | None:
    """The program with its first blocks only, whose result goes to what comes after the last one.

    Returns:
        None where blocks hand on more than one value, so that none can be left out.
    """
    clone = program.clone()
    results = block_results(clone.graph)
    last = max((node.meta[BLOCK] for node in clone.graph.nodes if BLOCK in node.meta), default=0)
    if last not in results or blocks - 1 not in results:
        return None
    end, kept = results[last], results[blocks - 1]
    end.replace_all_uses_with(kept, delete_user_cb=lambda user: user.meta.get(BLOCK) is None)
    logits, *caches = clone.outputs()
    given = clone.cache_nodes()
    left_out = [new.meta.get(BLOCK, 0) >= blocks for new in caches]
    new = [old if out else cache for old, cache, out in zip(given, caches, left_out, strict=True)]
    clone.output_node.args = ((logits, *new),)
    clone.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    if any(node.meta.get(BLOCK, 0) >= blocks for node in clone.graph.nodes):
        return None
    clone.remove_unused_weights()
    clone.recompile()
    return clone


def shorten(model: nn.Module, program: Program, blocks: int) -> None:
    """Takes all but the first blocks out of the model that a program was traced from."""
    path = block_list(program.graph)
    assert path is not None, "a program with blocks has a list of them"
    owner, _, name = path.rpartition(".")
    setattr(model.get_submodule(owner), name, nn.ModuleList(list(model.get_submodule(path).children())[:blocks]))


def load_when_called(model: nn.Module, sources: Mapping[str, TensorSource]) -> list[RemovableHandle]:
    """Lets each module load its own parameters for the time of its call, so that one module's are in memory at once."""
    handles = []
    for module, names in parameter_names(model).items():
        handles.append(module.register_forward_pre_hook(_Loading(names, sources)))
        handles.append(module.register_forward_hook(_Dropping(dict(module._parameters))))
    return handles


def parameter_names(model: nn.Module) -> dict[nn.Module, dict[str, str]]:
    """For each module with parameters of its own, the names that their sources go by; tied ones share the first."""
    first: dict[int, str] = {}
    found: dict[nn.Module, dict[str, str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner, _, attribute = name.rpartition(".")
        source = first.setdefault(id(parameter), name)
        found.setdefault(model.get_submodule(owner), {})[attribute] = source
    return found


def fill(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Gives a module's own parameters their values."""
    for attribute, value in values.items():
        module._parameters[attribute] = nn.Parameter(value, requires_grad=False)


class _Loading:
    def __init__(self, names: Mapping[str, str], sources: Mapping[str, TensorSource]) -> None:
        self._names, self._sources = names, sources

    def __call__(self, module: nn.Module, _: object) -> None:
        fill(module, {attribute: self._sources[name].load() for attribute, name in self._names.items()})


class _Dropping:
    def __init__(self, empty: dict[str, nn.Parameter | None]) -> None:
        self._empty = empty

    def __call__(self, module: nn.Module, _: object, __: object) -> None:
        module._parameters.update(self._empty)
