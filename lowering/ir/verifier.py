"""Checks that a program keeps the invariants which every pass and backend relies on."""

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from hikui.lowering.errors import VerificationError
from hikui.lowering.ir.cache_shape import CacheTensor
from hikui.lowering.ir.packed import is_packed, is_packed_embedding, verify_embedding, verify_packed
from hikui.lowering.ir.program import WEIGHT, Program


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
        if is_packed(node):
            verify_packed(node)
        if is_packed_embedding(node):
            verify_embedding(node)


def _verify_inputs(program: Program) -> None:
    seen_input = False
    for node in program.graph.find_nodes(op="placeholder"):
        if WEIGHT not in node.meta:
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
