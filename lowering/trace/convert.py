"""Turns what `torch.export` gives into the graph of a program: the calling convention, without what does nothing."""

import operator
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from hikui.lowering.errors import HikuiError
from hikui.lowering.ir.program import SOURCE, WEIGHT
from hikui.lowering.trace.blocks import module_path

aten = torch.ops.aten

_CHECKS = ("_assert", "sym_constrain_range", "_guards")
"""Starts of the names of ops that export inserts to check its assumptions; the runner checks its inputs itself."""

_IDENTITIES = (
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.detach_.default,
    aten.lift_fresh_copy.default,
)
"""Ops that give the value of their operand. Memory layout is no part of a program's meaning: views became reshapes."""

_CASTS = (
    aten._to_copy.default,
    aten.to.device,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.other,
    aten.type_as.default,
)

_VIEWS = (aten.view.default, aten._unsafe_view.default)

_LAYOUT_OPTIONS = ("device", "layout", "memory_format", "pin_memory")

_KEPT_META = ("nn_module_stack", "val")
"""What a node keeps of export's metadata; stack traces hold paths of this machine, which an artefact must not."""

_FOLD_BYTES = 1 << 24
"""A constant that the model computes from nothing, such as ALiBi's slopes, becomes a weight up to this size."""


@dataclass(frozen=True)
class Converted:
    """A graph in the calling convention, its logits, the real tensors that it names, and its parameters' keys."""

    graph: fx.Graph
    logits: fx.Node
    constants: dict[str, Tensor]
    parameters: tuple[str, ...]


def convert(exported: ExportedProgram, keys: Mapping[str, str], inputs: tuple[str, ...]) -> Converted:
    """Rewrites an exported `Decoder`.

    Args:
        exported: The exported wrapper.
        keys: Store key of each parameter and buffer by its name in the wrapper; tied ones share a key.
        inputs: Names of the inputs in order.

    Raises:
        HikuiError: The graph holds an op or an input that a program cannot have.
    """
    graph = exported.graph
    for node in graph.nodes:
        _strip_path(node)
    parameters, tensors = _read_signature(exported, keys, inputs)
    _check_ops(graph)
    for node in list(graph.nodes):
        if node.op == "call_function":
            _simplify(graph, node)
    graph.eliminate_dead_code()
    _take_rows_at_positions(graph)
    graph.eliminate_dead_code()
    folded = _fold_constants(graph, tensors)
    graph.eliminate_dead_code()
    return _rebuild(graph, parameters, tensors | folded, inputs)


def weight_placeholder(key: str) -> str:
    """Name of the placeholder of a weight."""
    return re.sub(r"\W", "_", f"w_{key}")


def _read_signature(
    exported: ExportedProgram, keys: Mapping[str, str], inputs: tuple[str, ...]
) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """Marks the placeholders: weights get their key, inputs their name. Gives parameter keys and real tensors."""
    _drop_unread_state(exported, keys)
    tensors: dict[str, Tensor] = {}
    parameters: dict[str, fx.Node] = {}
    names = iter(inputs)
    placeholders = exported.graph.find_nodes(op="placeholder")
    for spec, node in zip(exported.graph_signature.input_specs, placeholders, strict=True):
        if spec.kind is InputKind.USER_INPUT:
            node.meta["hikui.input"] = next(names)
            continue
        # A tensor that is neither parameter nor buffer, but an attribute or a literal, is not among the keys.
        target = spec.target or spec.arg.name
        key = keys.get(target, target.removeprefix("model."))
        node.meta[WEIGHT] = key
        if spec.kind is InputKind.PARAMETER:
            if parameters.setdefault(key, node) is not node:
                node.replace_all_uses_with(parameters[key])
        elif spec.kind in (InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            value = exported.constants.get(spec.target or "", exported.state_dict.get(spec.target or ""))
            assert isinstance(value, Tensor), f"export gives the value of {spec.target}"
            tensors[key] = value.detach()
        else:
            raise HikuiError(f"The model cannot be traced: it takes '{key}', a {spec.kind.name.lower()}, as an input.")
    return tuple(parameters), tensors


def _drop_unread_state(exported: ExportedProgram, keys: Mapping[str, str]) -> None:
    """Leaves out what is written into buffers that are always written before they are read: it carries no state.

    Raises:
        HikuiError: a buffer carries something from one call to the next.
    """
    buffers = {
        spec.target: node
        for spec, node in zip(
            exported.graph_signature.input_specs, exported.graph.find_nodes(op="placeholder"), strict=True
        )
    }
    output = exported.graph.output_node()
    kept = []
    for spec, value in zip(exported.graph_signature.output_specs, output.args[0], strict=True):
        if spec.kind is OutputKind.USER_OUTPUT:
            kept.append(value)
        elif spec.kind is not OutputKind.BUFFER_MUTATION or buffers[spec.target].users:
            raise HikuiError(
                f"The model cannot be traced: it changes '{keys.get(spec.target or '', spec.target)}' while it runs, "
                "and only the key-value caches may carry something from one step to the next."
            )
    output.args = (tuple(kept),)


def describe(node: fx.Node) -> str:
    """Where a node comes from: its name, its op, its module and its source line, as far as known."""
    parts = [f"node '{node.name}' ({node.target})"]
    if path := module_path(node):
        parts.append(f"in module '{path}'")
    if line := _source_line(node):
        parts.append(f"at {line}")
    return " ".join(parts)


def _source_line(node: fx.Node) -> str:
    """File name and line of the model's code, such as "modeling_llama.py:59"; empty where export noted none."""
    # The stack trace holds pairs of lines, `File "…/x.py", line 7, in forward` and the source.
    lines = re.findall(r'File "(?:[^"]*/)?([^"/]+)", line (\d+)', node.meta.get("stack_trace") or "")
    return ":".join(lines[-1]) if lines else ""


def writes_in_place(graph: fx.Graph) -> bool:
    """Whether an op of the graph writes into its operand."""
    return any(_writes(node.target) for node in graph.nodes if node.op == "call_function")


def _writes(target: object) -> bool:
    return isinstance(target, OpOverload) and target._schema.is_mutable and target is not aten.detach_.default


def _check_ops(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        target = node.target
        if node.op != "call_function":
            raise HikuiError(
                f"The model cannot be traced: {describe(node)} is a {node.op}, control flow inside the model."
            )
        if not isinstance(target, OpOverload):
            continue
        if _writes(target):
            raise HikuiError(f"The model cannot be traced: {describe(node)} writes into its operand.")
        if torch.Tag.nondeterministic_seeded in target.tags and not _is_inert(node):
            raise HikuiError(f"The model cannot be traced: {describe(node)} draws random numbers.")


def _is_inert(node: fx.Node) -> bool:
    """Whether an op that may drop values at random does not: its probability is zero or it is not training."""
    if node.target is aten.dropout.default:
        return bool(node.args[1] == 0 or not node.args[2])
    if node.target is aten.scaled_dot_product_attention.default:
        probability = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)
        return bool(probability == 0)
    return False


def _take_rows_at_positions(graph: fx.Graph) -> None:
    """Rows of a table that are counted from the end of the keys are taken at the tokens' positions instead.

    A model that slices a mask of its own, `bias[keys - queries : keys]`, means the last tokens that were seen. With a
    cache of the whole context, `keys` is C whatever was seen: the rows past…past+T−1 are meant.
    """
    inputs = {
        node.meta["hikui.input"]: node for node in graph.find_nodes(op="placeholder") if "hikui.input" in node.meta
    }
    past, context = inputs["past"], int(inputs["key_cache_0"].meta["val"].shape[2])
    for node in graph.find_nodes(op="call_function", target=aten.slice.Tensor):
        table, dim, start, end = (*node.args, *(None,) * 4)[:4]
        count = _difference_from(context, start)
        if count is None or end != context or table.op != "placeholder" or WEIGHT not in table.meta:
            continue
        with graph.inserting_before(node):
            arange = graph.call_function(aten.arange.default, (count,))
            positions = graph.call_function(aten.add.Tensor, (past, arange))
            rows = graph.call_function(aten.index_select.default, (table, dim, positions))
        for made in (arange, positions, rows):
            made.meta = {key: value for key, value in node.meta.items() if key != "val"}
        node.replace_all_uses_with(rows)
        graph.erase_node(node)


def _difference_from(context: int, start: object) -> fx.Node | None:
    """The T of a node that computes C − T."""
    if not isinstance(start, fx.Node) or start.target is not operator.sub or start.args[0] != context:
        return None
    return start.args[1] if isinstance(start.args[1], fx.Node) else None


def _strip_path(node: fx.Node, root: str = "model") -> None:
    """Takes the wrapper, which holds the model as `root`, out of the module stack."""
    stack = node.meta.get("nn_module_stack")
    if stack:
        node.meta["nn_module_stack"] = {
            key: ("" if path == root else str(path).removeprefix(root + "."), kind)
            for key, (path, kind) in stack.items()
            if path == root or str(path).startswith(root + ".")
        }


def _simplify(graph: fx.Graph, node: fx.Node) -> None:
    target = node.target
    if isinstance(target, OpOverload) and target._schema.name.split("::")[1].startswith(_CHECKS):
        graph.erase_node(node)
        return
    if target in _VIEWS:
        node.target = aten.reshape.default
    operand = node.args[0] if node.args else None
    if isinstance(operand, fx.Node) and _is_identity(node, operand):
        node.replace_all_uses_with(operand)
        graph.erase_node(node)
        return
    node.kwargs = {key: value for key, value in node.kwargs.items() if key not in _LAYOUT_OPTIONS}


def _is_identity(node: fx.Node, operand: fx.Node) -> bool:
    if node.target in _IDENTITIES:
        return True
    if node.target is aten.dropout.default:
        return _is_inert(node)
    if node.target is aten.slice.Tensor:
        return node.args[2:4] == (0, sys.maxsize) and len(node.args) == 4
    if node.target in _CASTS:
        return bool(node.meta["val"].dtype == operand.meta["val"].dtype)
    return False


def _fold_constants(graph: fx.Graph, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Computes what depends on no input and no weight, and puts a weight in its place.

    Returns:
        The new tensors by key.
    """
    known: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "placeholder" and tensors.get(node.meta.get(WEIGHT, "")) is not None and _is_literal(node):
            known[node] = tensors[node.meta[WEIGHT]]
        elif node.op == "call_function" and all(operand in known for operand in node.all_input_nodes):
            value = node.meta.get("val")
            if isinstance(value, Tensor) and value.numel() * value.itemsize <= _FOLD_BYTES:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda operand: known[operand])
                with unset_fake_temporarily(), torch.no_grad():
                    known[node] = node.target(*args, **kwargs)
    folded: dict[str, Tensor] = {}
    first = next(iter(graph.nodes))
    for node, value in known.items():
        if node.op == "placeholder" or all(user in known for user in node.users):
            continue
        key = f"constant_{len(folded)}"
        with graph.inserting_before(first):
            placeholder = graph.placeholder(weight_placeholder(key))
        placeholder.meta = {"val": node.meta["val"], WEIGHT: key}
        node.replace_all_uses_with(placeholder)
        folded[key] = value.contiguous()
    return folded


def _is_literal(node: fx.Node) -> bool:
    """Whether a placeholder is a tensor written in the model's code, which export lifts under a name of its own."""
    return str(node.meta[WEIGHT]).rpartition(".")[2].startswith(("lifted_tensor", "_tensor_constant"))


def _rebuild(
    graph: fx.Graph, parameters: tuple[str, ...], tensors: dict[str, Tensor], inputs: tuple[str, ...]
) -> Converted:
    """Copies the graph with its placeholders in order: weights that are read, then the inputs."""
    placeholders = graph.find_nodes(op="placeholder")
    weights = [node for node in placeholders if WEIGHT in node.meta and node.users]
    by_name = {node.meta["hikui.input"]: node for node in placeholders if "hikui.input" in node.meta}
    result = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node, name in [
        *((node, weight_placeholder(node.meta[WEIGHT])) for node in weights),
        *((by_name[name], name) for name in inputs),
    ]:
        copies[node] = result.placeholder(name)
        copies[node].meta = {key: node.meta[key] for key in ("val", WEIGHT) if key in node.meta}
    outputs: list[fx.Node] = []
    for node in graph.nodes:
        if node.op == "call_function":
            copies[node] = result.node_copy(node, copies.__getitem__)
            copies[node].meta = {key: node.meta[key] for key in _KEPT_META if key in node.meta}
            if line := _source_line(node):
                copies[node].meta[SOURCE] = line
        elif node.op == "output":
            outputs = [copies[value] for value in node.args[0]]
            result.output(tuple(outputs))
    used = {str(node.meta[WEIGHT]) for node in weights}
    return Converted(
        result,
        outputs[0],
        {key: tensor for key, tensor in tensors.items() if key in used},
        tuple(key for key in parameters if key in used),
    )
