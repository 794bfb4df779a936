"""Gated units: silu(gate) · up."""

from dataclasses import dataclass

from torch import fx

from hikui.passes.graph import aten, is_call, same_shape
from hikui.passes.patterns.match import NoMatch


@dataclass(frozen=True)
class SwigluMatch:
    """silu(gate) · up, ending in `output`."""

    gate: fx.Node
    up: fx.Node
    output: fx.Node


def match_swiglu(anchor: fx.Node) -> SwigluMatch | NoMatch:
    """Recognises the unit around an `aten.silu`."""
    if not is_call(anchor, aten.silu.default):
        return NoMatch(f"{anchor.target} is no SiLU", anchor.name)
    gate = anchor.args[0]
    assert isinstance(gate, fx.Node)
    users = list(anchor.users)
    if len(users) != 1 or not is_call(users[0], aten.mul.Tensor):
        return NoMatch(f"{anchor.name} is not read by one product alone", anchor.name)
    (output,) = users
    up = output.args[1] if output.args[0] is anchor else output.args[0]
    if not isinstance(up, fx.Node) or up is anchor or not same_shape(up, gate):
        return NoMatch(
            f"{anchor.name} is not multiplied by an activation of its own shape",
            output.name,
        )
    return SwigluMatch(gate, up, output)
