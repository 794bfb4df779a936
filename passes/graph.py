"""What every pass does to a graph: find nodes, put new ones in, leave the metadata right."""

import re
from collections.abc import Iterator
from typing import TypeGuard

import torch
from torch import fx

from hikui.lowering.errors import UsageError
from hikui.lowering.expressions import compiled
from hikui.lowering.ir.program import (
    BLOCK,
    COLUMNS,
    CORRECTION,
    FACTOR,
    FIXED,
    FLOAT_WEIGHT,
    FORMAT,
    GROUP,
    LATENT,
    SENSITIVITY,
    SITE,
    STATISTICS,
    WEIGHT,
    Program,
)

aten = torch.ops.aten
hikui = torch.ops.hikui

SITE_METADATA = (SITE, GROUP, STATISTICS, SENSITIVITY, FORMAT, FIXED, FLOAT_WEIGHT, CORRECTION, COLUMNS, FACTOR, LATENT)
"""What is known of a site, whatever op it has become."""

INHERITED = (BLOCK, "nn_module_stack", "stack_trace")
"""Metadata that a new node takes over from the node in whose place it stands."""


def is_call(node: object, *targets: object) -> TypeGuard[fx.Node]:
    """Whether `node` is a call of one of `targets` (operator overloads or plain functions)."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def is_weight(node: object) -> TypeGuard[fx.Node]:
    """Whether `node` is the placeholder of a stored weight."""
    return isinstance(node, fx.Node) and node.op == "placeholder" and WEIGHT in node.meta


def argument(node: fx.Node, position: int, name: str, default: object = None) -> object:
    """An argument of a call, wherever it was given: by position, by name, or not at all."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def shape(node: fx.Node) -> tuple[int | torch.SymInt, ...]:
    """The shape of a node's value, symbols included."""
    return tuple(node.meta["val"].shape)


def same_size(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Whether two sizes are equal for every T; compares expressions, so it never adds a guard."""
    left = a.node.expr if isinstance(a, torch.SymInt) else a
    right = b.node.expr if isinstance(b, torch.SymInt) else b
    return bool(left == right)


def same_shape(a: fx.Node, b: fx.Node) -> bool:
    """Whether two nodes have values of one shape and dtype for every T."""
    first, second = a.meta["val"], b.meta["val"]
    return (
        first.dtype == second.dtype
        and first.dim() == second.dim()
        and all(same_size(m, n) for m, n in zip(first.shape, second.shape, strict=True))
    )


def insert(
    program: Program,
    before: fx.Node,
    target: object,
    args: tuple[fx.node.Argument, ...],
    like: fx.Node,
) -> fx.Node:
    """A new call before `before`, its fake value worked out; it inherits block and origin from `like`."""
    assert callable(target)
    with program.graph.inserting_before(before):
        node = program.graph.call_function(target, args)
    program.infer(node)
    for key in INHERITED:
        if key in like.meta:
            node.meta[key] = like.meta[key]
    return node


def keep_site(old: fx.Node, new: fx.Node) -> None:
    """Hands what is known of a site to the node that takes its place."""
    for key in SITE_METADATA:
        if key in old.meta:
            new.meta[key] = old.meta[key]


def replace(old: fx.Node, new: fx.Node) -> None:
    """Lets `new` stand wherever `old` stood, and erases `old`."""
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def drop_weights(program: Program, nodes: list[fx.Node]) -> int:
    """Erases those of the weight placeholders that nothing reads any more, and their tensors; returns how many."""
    unread = [node for node in nodes if not node.users]
    for node in unread:
        program.graph.erase_node(node)
    still = {program.weight_of(node) for node in program.weight_nodes()}
    program.store.drop({program.weight_of(node) for node in unread} - still)
    return len(unread)


def erase_dead(program: Program) -> int:
    """Erases calls that nothing reads; returns how many."""
    count = 0
    for node in reversed(list(program.graph.nodes)):
        if node.op == "call_function" and not node.users:
            program.graph.erase_node(node)
            count += 1
    return count


def sites(program: Program) -> list[fx.Node]:
    """The linear sites that `canonicalise` named, in graph order."""
    return [node for node in program.graph.nodes if SITE in node.meta]


def float_sites(program: Program) -> list[fx.Node]:
    """The linear sites that no pass has packed yet."""
    return [node for node in sites(program) if node.target is aten.linear.default]


def is_measured(node: fx.Node) -> bool:
    """Whether `calibrate` has seen what a site reads; weights of tokens alone say nothing of its columns."""
    return "mean_square" in node.meta.get(STATISTICS, {})


def groups(nodes: list[fx.Node]) -> dict[str, list[fx.Node]]:
    """Sites by the name of their tied group, in graph order."""
    out: dict[str, list[fx.Node]] = {}
    for node in nodes:
        out.setdefault(node.meta[GROUP], []).append(node)
    return out


def blocks(nodes: list[fx.Node]) -> list[list[list[fx.Node]]]:
    """Tied groups of sites by the block that they are in, all in graph order; what has no block is one of its own."""
    out: list[list[list[fx.Node]]] = []
    current: object = None
    for members in groups(nodes).values():
        block = members[0].meta.get(BLOCK, members[0])
        if not out or block != current:
            out.append([])
        current = block
        out[-1].append(members)
    return out


def weight_of(node: fx.Node) -> fx.Node:
    """The weight placeholder of an unpacked site."""
    weight = node.args[1]
    assert is_weight(weight), f"{node.name} is a site, so its second argument is a weight"
    return weight


def matrix_shape(node: fx.Node) -> tuple[int, int]:
    """(out features, in features) of an unpacked site."""
    n, k = weight_of(node).meta["val"].shape
    return int(n), int(k)


def pattern(text: str, option: str) -> re.Pattern[str]:
    """A compiled regular expression of site names.

    Raises:
        UsageError: the text is no regular expression.
    """
    try:
        return compiled(text)
    except re.error as error:
        raise UsageError(f"Option '{option}' is '{text}', which is not a regular expression: {error}.") from error


def selected(nodes: list[fx.Node], only: str, skip: str) -> Iterator[fx.Node]:
    """The sites whose name `only` matches (empty: all) and `skip` does not (empty: none)."""
    take, leave = pattern(only, "sites"), pattern(skip, "skip") if skip else None
    for node in nodes:
        name = node.meta[SITE]
        if take.search(name) and not (leave and leave.search(name)):
            yield node


def block_segments(program: Program) -> list[list[fx.Node]]:
    """The graph's calls in order, cut where a new block begins; what has no block stays with what came before."""
    segments: list[list[fx.Node]] = [[]]
    current: int | None = None
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        block = node.meta.get(BLOCK, current)
        if block != current:
            segments.append([])
            current = block
        segments[-1].append(node)
    return [segment for segment in segments if segment]
