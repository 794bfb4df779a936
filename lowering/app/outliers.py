"""Looks, while reference numbers are made, for activations of which rounding leaves little.

One column far larger than the others takes the whole range of a token's int8 codes (Dettmers et al., LLM.int8(), 2022,
section 3), and where activations stay float, the weights that it meets are as small as it is large.
"""

import operator
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from hikui.lowering.ir.packed import PackedLinear, is_packed
from hikui.lowering.ir.program import SITE

_HALF_STEP = 1 / 254
"""Of int8 codes, over a token's largest magnitude: what is below counts as nothing."""

OUTLIER_SHARE = 0.6
"""Share of a token's values below half a step from which on a site is named, in the median token.

Of Gaussian values 1 % lie there, and 60 % where one column is 200 times as large as the others.
"""

_NAMED = 3


class OutlierWatch:
    """Observes an interpreter; `sentence` says afterwards which sites read such activations."""

    def __init__(self) -> None:
        self._shares: dict[fx.Node, list[Tensor]] = {}

    def __call__(self, node: fx.Node, args: Sequence[object], result: object) -> None:
        """Takes the float activation of a node that quantises one, or multiplies one with a rounded matrix."""
        name = getattr(node.target, "_schema", None)
        if name is None or not str(name.name).startswith("hikui::"):
            return
        op = str(name.name).removeprefix("hikui::")
        if op.endswith("_quantize") and isinstance(result, tuple):
            found = result[0]
        elif op.startswith("quantize_activation") or (op == "linear" and _rounded(node)):
            found = args[0]
        else:
            return
        assert isinstance(found, Tensor), "activations are tensors"
        self._shares.setdefault(node, []).append(_lost_shares(found))

    def sentence(self, has_remedy: bool) -> str | None:
        """What is to be said, or None.

        Args:
            has_remedy: a pass that evens columns out has run already.
        """
        found: dict[str, float] = {}
        for node, shares in self._shares.items():
            median = float(torch.cat(shares).median())
            if median > OUTLIER_SHARE:
                found |= dict.fromkeys(_sites(node), median)
        if not found:
            return None
        named = ", ".join(list(found)[:_NAMED])
        more = f" and {len(found) - _NAMED} more sites" if len(found) > _NAMED else ""
        way_out = (
            "leave the activations of these sites float (activation with skip)"
            if has_remedy
            else "let smooth or awq even the columns out before rounding (recipes smoothquant-8bit and awq-4bit)"
        )
        return (
            f"A few columns of what {named}{more} read(s) are so large that {100 * max(found.values()):.0f} % of the "
            f"others fall below half a step of int8, and quality falls with them; {way_out}."
        )


def _rounded(node: fx.Node) -> bool:
    return is_packed(node) and PackedLinear.of(node).format.is_integer


def _lost_shares(x: Tensor) -> Tensor:
    """For each token, the share of its values other than zero that are below half a step: float32 [tokens]."""
    sizes = x.abs().flatten(0, -2)
    known = sizes > 0
    lost = known & (sizes < sizes.amax(-1, keepdim=True) * _HALF_STEP)
    return lost.sum(-1) / known.sum(-1).clamp_min(1)


def _sites(node: fx.Node) -> list[str]:
    """The sites that read what a node gives."""
    if SITE in node.meta:
        return [str(node.meta[SITE])]
    readers = list(node.users)
    parts = [user for user in readers if user.target is operator.getitem]
    readers += [user for part in parts for user in part.users]
    return list(dict.fromkeys(str(reader.meta[SITE]) for reader in readers if SITE in reader.meta))
