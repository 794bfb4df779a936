"""Finds the repeated blocks of a graph from the paths of the modules that its nodes come from."""

from collections import Counter

from torch import Tensor, fx

from hikui.lowering.ir.program import BLOCK


def module_path(node: fx.Node) -> str:
    """Path of the innermost module that the node was traced in; empty for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(entry[0]) for entry in stack.values()]
    return paths[-1] if paths else ""


def _list_entries(path: str) -> list[tuple[str, int]]:
    """Every (list, index) on a path: "model.layers.3.mlp" gives [("model.layers", 3)]."""
    parts = path.split(".")
    return [(".".join(parts[:at]), int(part)) for at, part in enumerate(parts) if at and part.isdecimal()]


def _calls(graph: fx.Graph) -> dict[fx.Node, list[tuple[str, int]]]:
    return {node: _list_entries(module_path(node)) for node in graph.nodes if node.op == "call_function"}


def block_list(graph: fx.Graph) -> str | None:
    """Path of the module list that holds most of the graph; None where the model has no module list.

    The outermost list wins a tie, so experts or heads kept in a list inside a block do not become blocks.
    """
    sizes = Counter(name for found in _calls(graph).values() for name in {name for name, _ in found})
    return min(sizes, key=lambda name: (-sizes[name], len(name), name)) if sizes else None


def assign_blocks(graph: fx.Graph) -> int:
    """Sets meta["hikui.block"] on the nodes of each entry of the module list that holds most of the graph.

    Returns:
        The number of blocks; 0 where the model has no module list.
    """
    blocks = block_list(graph)
    numbers = set()
    for node, found in _calls(graph).items():
        for name, index in found:
            if name == blocks:
                node.meta[BLOCK] = index
                numbers.add(index)
    return len(numbers)


def block_results(graph: fx.Graph) -> dict[int, fx.Node]:
    """The one value [1, T, width] by which each block is read; blocks that hand on several of them are left out."""
    read: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        block, value = node.meta.get(BLOCK), node.meta.get("val")
        if block is None or not isinstance(value, Tensor) or value.dim() != 3 or not value.is_floating_point():
            continue
        if any(user.meta.get(BLOCK) != block and user.op != "output" for user in node.users):
            read.setdefault(block, []).append(node)
    return {block: nodes[0] for block, nodes in sorted(read.items()) if len(nodes) == 1}
