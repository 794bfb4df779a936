"""Checks that a program keeps the invariants which every pass and backend relies on."""

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from hikui.lowering.errors import UsageError, VerificationError
from hikui.lowering.formats import Format
from hikui.lowering.ir.cache_shape import CacheTensor
from hikui.lowering.ir.program import Program

PACKED_AT = {"linear": (1, 2, 4, 5), "linear_a8": (3, 4, 6, 7), "linear_a8_branch": (3, 4, 9, 10)}
"""Positions of weight, scale, format and out_features among the arguments of the ops on packed weights."""


def verify(program: Program) -> None:
    """Checks a program.

    Raises:
        VerificationError: the first broken invariant, with the node's name.
    """
    try:
        program.graph.lint()
    except (RuntimeError, ValueError) as error:
        raise VerificationError(f"The graph is malformed: {error}") from error
    for node in program.graph.nodes:
        if node.op != "output" and "val" not in node.meta:
            raise VerificationError(f"Node {node.name} has no meta['val'].")
    _verify_inputs(program)
    _verify_outputs(program)
    for node in program.graph.nodes:
        if node.op not in ("placeholder", "call_function", "output"):
            raise VerificationError(f"Node {node.name} is a {node.op}; a program holds placeholders and calls only.")
        if node.op == "call_function" and str(node.target).startswith("hikui.linear"):
            _verify_packed(program, node)


def _verify_inputs(program: Program) -> None:
    seen_input = False
    for node in program.graph.find_nodes(op="placeholder"):
        if "hikui.weight" not in node.meta:
            seen_input = True
            continue
        if seen_input:
            raise VerificationError(f"Weight placeholder {node.name} comes after an input.")
        key, value = program.weight_of(node), node.meta["val"]
        if key not in program.store:
            raise VerificationError(f"Placeholder {node.name} names '{key}', which the store does not have.")
        info = program.store.info(key)
        if tuple(value.shape) != info.shape or value.dtype != info.dtype:
            raise VerificationError(
                f"Placeholder {node.name} is {value.dtype}{tuple(value.shape)}, "
                f"but '{key}' is {info.dtype}{info.shape}."
            )
    inputs, due = program.input_nodes(), program.config.cache_tensors()
    if len(inputs) != 2 + len(due):
        raise VerificationError(f"The program has {len(inputs)} inputs; tokens, past and {len(due)} caches are due.")
    for node, want in zip(program.cache_nodes(), due, strict=True):
        _verify_cache(node, want)


def _verify_cache(node: fx.Node, want: CacheTensor) -> None:
    value = node.meta["val"]
    if tuple(value.shape) != want.shape or value.dtype != getattr(torch, want.dtype):
        raise VerificationError(
            f"Cache {node.name} is {value.dtype}{tuple(value.shape)}, not {want.dtype}{want.shape} ({want.kind})."
        )


def _verify_outputs(program: Program) -> None:
    outputs = program.outputs()
    caches = program.config.cache_tensors()
    if len(outputs) != 1 + len(caches):
        raise VerificationError(f"The program must return a tuple of {1 + len(caches)}: the logits and the caches.")
    for node, want in zip(outputs[1:], caches, strict=True):
        _verify_cache(node, want)
    value = outputs[0].meta.get("val")
    if not isinstance(value, FakeTensor) or value.dim() != 3 or value.shape[-1] != program.config.vocabulary:
        raise VerificationError(f"The first output is not logits of shape [1, T, {program.config.vocabulary}].")


def _verify_packed(program: Program, node: fx.Node) -> None:
    op = str(node.target).split(".")[1]
    weight_at, scale_at, format_at, out_at = PACKED_AT[op]
    try:
        fmt = Format.parse(str(node.args[format_at]))
    except UsageError as error:
        raise VerificationError(f"Node {node.name}: {error}") from error
    weight, scale, n = node.args[weight_at], node.args[scale_at], node.args[out_at]
    if not isinstance(weight, fx.Node) or not isinstance(n, int):
        raise VerificationError(f"Node {node.name} does not take its weight as a node and its size as a number.")
    # The op does not carry K, so it is bounded by the widths that the packed shape and the operand admit.
    if op == "linear":
        x = node.args[0]
        assert isinstance(x, fx.Node)
        k = int(x.meta["val"].shape[-1])
        want: list[tuple[tuple[int, ...] | None, object]] = [
            (fmt.weight_shape(n, k), weight),
            (fmt.scale_shape(n, k), scale),
        ]
        for shape, operand in want:
            got = tuple(operand.meta["val"].shape) if isinstance(operand, fx.Node) else None
            if got != shape:
                raise VerificationError(f"Node {node.name} ({fmt}) has an operand of shape {got}; {shape} is due.")
    elif weight.meta["val"].dtype != fmt.weight_dtype or weight.meta["val"].shape[0] != -(-n // 16):
        raise VerificationError(f"Node {node.name}: weight {weight.name} is not {fmt} with {n} rows.")
