"""Why a pattern was not found: what `hikui explain` prints."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from hikui.lowering.ir.program import SITE, Program
from hikui.lowering.pipeline.contract import PassContext
from hikui.passes.graph import aten, is_call
from hikui.passes.patterns.attention import (
    EAGER_SOFTMAX,
    SDPA,
    match_attention,
    why_eager,
)
from hikui.passes.patterns.branch import match_branch
from hikui.passes.patterns.linear import MATMULS, match_linear
from hikui.passes.patterns.match import NoMatch
from hikui.passes.patterns.norm import ANCHORS, match_rms_norm
from hikui.passes.patterns.rotary import is_half_rotation, match_rotary
from hikui.passes.patterns.swiglu import match_swiglu
from hikui.passes.rewrite.canonicalise import Canonicalise


@dataclass(frozen=True)
class Finding:
    """Something that no pass takes further.

    Attributes:
        pattern: what it nearly is: `linear site`, `attention`, `norm`, `rotary`, `swiglu` or `branch`.
        node: the node where the pattern broke.
        reason: why, in one clause.
        module: path of the module that it comes from; empty where unknown.
    """

    pattern: str
    node: str
    reason: str
    module: str = ""

    def __str__(self) -> str:
        place = f" in {self.module}" if self.module else ""
        return f"{self.pattern}: {self.node}{place}: {self.reason}"


def explain(program: Program) -> list[Finding]:
    """What stays out of the low-bit path, and why.

    Args:
        program: a program at any stage; it is brought into canonical form first and left as it is.

    Returns:
        Findings in graph order; none where every product is a site and every pattern is known.
    """
    canonical = Canonicalise().run(program, PassContext()).program
    by_name = {node.name: node for node in canonical.graph.nodes}
    out = []
    for node in canonical.graph.nodes:
        for pattern, miss in _misses(node):
            module = _module(by_name.get(miss.node, node)) or _module(node)
            out.append(Finding(pattern, miss.node, miss.reason, module))
    return out


def _misses(node: fx.Node) -> Iterator[tuple[str, NoMatch]]:
    """The patterns that a node anchors and that do not hold."""
    if is_call(node, SDPA):
        yield from _if_miss("attention", match_attention(node))
    elif is_call(node, *EAGER_SOFTMAX):
        yield from _if_miss("attention", why_eager(node))
    elif is_call(node, *MATMULS) and SITE not in node.meta:
        yield from _if_miss("linear site", _why_no_site(node))
    elif is_call(node, *ANCHORS):
        yield from _if_miss("norm", match_rms_norm(node))
    elif is_call(node, aten.silu.default):
        yield from _if_miss("swiglu", match_swiglu(node))
    elif is_half_rotation(node):
        yield from _if_miss("rotary", match_rotary(node))
    elif is_call(node, aten.add.Tensor):
        yield from _if_miss("branch", match_branch(node))


def _if_miss(pattern: str, result: object) -> Iterator[tuple[str, NoMatch]]:
    if isinstance(result, NoMatch):
        yield pattern, result


def _why_no_site(node: fx.Node) -> NoMatch | None:
    result = match_linear(node)
    return result if isinstance(result, NoMatch) else None


def _module(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(entry[0]) for entry in stack.values()]
    return paths[-1] if paths else ""
