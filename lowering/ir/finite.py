"""Finds where numbers stop being finite."""

from typing import Any

import torch
from torch import Tensor, fx

from hikui.lowering.errors import HikuiError
from hikui.lowering.ir.interpreter import Interpreter
from hikui.lowering.ir.program import BLOCK, SOURCE, Program


def require_finite_logits(program: Program, tokens: Tensor, logits: Tensor, what: str) -> None:
    """Refuses logits with NaN or infinity in them.

    Args:
        program: gave the logits, or is the float program of the model that did.
        tokens: int64 [1, T], run from an empty cache.
        logits: of any shape.
        what: whose logits they are, as the start of a sentence.

    Raises:
        HikuiError: names the first node whose value is not finite.
    """
    if bool(torch.isfinite(logits).all()):
        return
    node = first_not_finite(program, tokens)
    place = "" if node is None else f": {place_of(node)} is the first whose value is not finite"
    raise HikuiError(
        f"{what} logits that are not finite for {tokens.shape[1]} tokens{place}; no text can come of them, "
        "so look at the weights and scales that lead there."
    )


def first_not_finite(program: Program, tokens: Tensor) -> fx.Node | None:
    """The first node with NaN or +∞ in its value, in the order of the graph; −∞ alone is what masks hold."""
    found: list[fx.Node] = []

    def observe(node: fx.Node, _: tuple[Any, ...], result: object) -> None:
        if not found and any(_overflows(value) for value in _tensors(result)):
            found.append(node)

    interpreter = Interpreter(program, keep_weights=False, observe=observe)
    interpreter.run(tokens, 0, interpreter.new_caches())
    return found[0] if found else None


def _tensors(result: object) -> list[Tensor]:
    parts = result if isinstance(result, tuple | list) else (result,)
    return [part for part in parts if isinstance(part, Tensor) and part.is_floating_point()]


def _overflows(value: Tensor) -> bool:
    return bool(value.isnan().any() or value.isposinf().any())


def place_of(node: fx.Node) -> str:
    """A node by its name, its op, its block and the line of the model's code, as far as known."""
    block, line = node.meta.get(BLOCK), node.meta.get(SOURCE)
    inside = "" if block is None else f" in block {block}"
    return f"node '{node.name}' ({node.target}){inside}{'' if line is None else f' at {line}'}"
