"""Quantises activations, so that integer weights meet integer activations."""

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from hikui.lowering.errors import HikuiError, UsageError
from hikui.lowering.ir.packed import PackedLinear
from hikui.lowering.ir.program import GROUP, SITE, STATISTICS, Program
from hikui.lowering.pipeline.contract import Pass, PassContext, PassResult
from hikui.passes.graph import hikui, insert, is_call, keep_site, replace


@dataclass(frozen=True)
class Activation(Pass):
    """Rewrites `hikui::linear` with an integer format into a quantiser and `linear_a8`.

    Sites that read the same activation share its quantised form.

    Attributes:
        bits: of the activations: 8, or 4 (−7…7, held in int8).
        static: take one step for all tokens, the largest magnitude that `calibrate` has seen over 127, instead of each
            token's own; what is beyond is clipped. For 8 bits.
    """

    name: ClassVar[str] = "activation"
    bits: int = 8
    static: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise UsageError(f"activation cannot quantise to {self.bits} bits; it takes 8 or 4.")
        if self.static and self.bits != 8:
            raise UsageError("activation takes a static step for 8 bits only; drop static=true or bits=4.")

    def requires(self, program: Program) -> None:
        """Raises HikuiError where a static step is wanted and no statistics say how large it is."""
        if self.static:
            for node in _integer_linears(program):
                if node.meta.get(STATISTICS, {}).get("max_abs") not in program.store:
                    name = node.meta.get(SITE, node.name)
                    raise HikuiError(
                        f"Site {name} has no statistics to take a static step from; run `calibrate` before `rtn` and "
                        "`dead_code` after `activation`, or drop static=true."
                    )

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Works on a clone."""
        work = program.clone()
        linears = _integer_linears(work)
        if not linears:
            return PassResult(program, False)
        quantised: dict[fx.Node, tuple[fx.Node, ...]] = {}
        for node in linears:
            x = node.args[0]
            assert isinstance(x, fx.Node)
            if x not in quantised:
                quantised[x] = self._quantiser(work, x, node)
            q, scale, sums = quantised[x]
            linear = insert(
                work,
                node,
                hikui.linear_a8.default,
                PackedLinear.of(node).arguments(hikui.linear_a8.default, q=q, q_scale=scale, q_sums=sums),
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

    def _quantiser(self, program: Program, x: fx.Node, site: fx.Node) -> tuple[fx.Node, ...]:
        """q, scale and sums of an activation, put before its first reader."""
        args: tuple[fx.Node, ...] = (x,)
        quantise = hikui.quantize_activation.default if self.bits == 8 else hikui.quantize_activation_int4.default
        if self.static:
            quantise = hikui.quantize_activation_static.default
            largest = program.store.load(site.meta[STATISTICS]["max_abs"]).amax().reshape(1)
            args = (x, _step(program, f"{site.meta[GROUP]}.step", largest / 127))
        call = insert(program, site, quantise, args, site)
        return tuple(insert(program, site, operator.getitem, (call, index), site) for index in range(3))


def _integer_linears(program: Program) -> list[fx.Node]:
    found = [node for node in program.graph.nodes if is_call(node, hikui.linear.default)]
    return [node for node in found if PackedLinear.of(node).format.is_integer]


def _step(program: Program, key: str, step: torch.Tensor) -> fx.Node:
    """The placeholder of a step; sites of one group have one, whether or not their columns are permuted."""
    return program.add_placeholder(key) if key in program.store else program.add_weight(key, step)
