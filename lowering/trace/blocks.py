"""Finds the repeated blocks of a graph from the paths of the modules that its nodes come from."""

from collections import Counter

from torch import fx

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


def assign_blocks(graph: fx.Graph) -> int:
    """Sets meta["hikui.block"] on the nodes of each entry of the module list that holds most of the graph.

    The outermost list wins a tie, so experts or heads kept in a list inside a block do not become blocks.

    Returns:
        The number of blocks; 0 where the model has no module list.
    """
    entries = {node: _list_entries(module_path(node)) for node in graph.nodes if node.op == "call_function"}
    sizes = Counter(name for found in entries.values() for name in {name for name, _ in found})
    if not sizes:
        return 0
    blocks = min(sizes, key=lambda name: (-sizes[name], len(name), name))
    numbers = set()
    for node, found in entries.items():
        for name, index in found:
            if name == blocks:
                node.meta[BLOCK] = index
                numbers.add(index)
    return len(numbers)
