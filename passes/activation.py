"""Quantises activations to int8 a token, so that integer weights meet integer activations."""

import operator
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from hikui.lowering.errors import UsageError
from hikui.lowering.formats import Format
from hikui.lowering.passes_base import Pass, PassContext, PassResult
from hikui.lowering.program import Program
from hikui.passes.graph import hikui, insert, is_call, keep_site, replace


@dataclass(frozen=True)
class Activation(Pass):
    """Rewrites `hikui::linear` with an integer format into `quantize_activation` and `linear_a8`.

    Sites that read the same activation share its quantised form.

    Attributes:
        bits: of the activations; 8 is what the kernels take.
    """

    name: ClassVar[str] = "activation"
    bits: int = 8

    def __post_init__(self) -> None:
        if self.bits != 8:
            raise UsageError(f"activation cannot quantise to {self.bits} bits; it takes 8.")

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Works on a clone."""
        work = program.clone()
        linears = [n for n in work.graph.nodes if is_call(n, hikui.linear.default) and _is_integer(n)]
        if not linears:
            return PassResult(program, False)
        quantised: dict[fx.Node, tuple[fx.Node, ...]] = {}
        for node in linears:
            x = node.args[0]
            assert isinstance(x, fx.Node)
            if x not in quantised:
                quantised[x] = _quantiser(work, x, node)
            linear = insert(
                work,
                node,
                hikui.linear_a8.default,
                (*quantised[x], *node.args[1:]),
                node,
            )
            keep_site(node, linear)
            replace(node, linear)
        work.recompile()
        return PassResult(
            work,
            True,
            [f"{len(quantised)} activations quantised for {len(linears)} sites"],
        )


def _is_integer(node: fx.Node) -> bool:
    return Format.parse(str(node.args[4])).is_integer


def _quantiser(program: Program, x: fx.Node, before: fx.Node) -> tuple[fx.Node, ...]:
    """q, scale and sums of an activation, put before its first reader."""
    call = insert(program, before, hikui.quantize_activation.default, (x,), before)
    return tuple(insert(program, before, operator.getitem, (call, index), before) for index in range(3))
