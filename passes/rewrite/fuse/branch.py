"""linear_a8(…) + B(A x), and linear_a8(…) + bias → one op."""

from torch import fx

from hikui.lowering.formats import Format, pack
from hikui.lowering.ir.packed import PackedLinear, is_packed
from hikui.lowering.ir.program import Program
from hikui.passes.graph import (
    aten,
    hikui,
    insert,
    is_call,
    is_weight,
    keep_site,
    replace,
    weight_of,
)
from hikui.passes.patterns.branch import BranchMatch, match_branch
from hikui.passes.patterns.match import NoMatch
from hikui.passes.rewrite.fuse.report import FusionReport

_FACTOR = Format("float16")


def fuse_branches(program: Program) -> FusionReport:
    """Rewrites every quantised site with a branch, in place."""
    report = FusionReport("branch")
    for node in list(program.graph.nodes):
        match = match_branch(node)
        if isinstance(match, NoMatch):
            report.misses.append(match)
        elif match is not None:
            _rewrite(program, match)
            report.fused += 1
    return report


def fuse_biases(program: Program) -> FusionReport:
    """Puts a stored vector that is added to a quantised site without a bias into the site, in place."""
    report = FusionReport("bias")
    for node in list(program.graph.nodes):
        if not is_call(node, aten.add.Tensor) or len(node.args) != 2 or node.kwargs.get("alpha", 1) != 1:
            continue
        main, bias = node.args
        if not is_packed(main):
            main, bias = bias, main
        if not is_packed(main) or not is_weight(bias) or len(main.users) != 1:
            continue
        packed = PackedLinear.of(main)
        if packed.bias is not None or tuple(bias.meta["val"].shape) != (packed.rows,):
            continue
        packed.set_bias(bias)
        replace(node, main)
        report.fused += 1
    return report


def _rewrite(program: Program, match: BranchMatch) -> None:
    main = match.main
    a, b = (_packed(program, node) for node in (match.down, match.up))
    op = hikui.linear_a8_branch.default
    fused = insert(program, match.output, op, PackedLinear.of(main).arguments(op, x=match.x, a=a, b=b), main)
    keep_site(main, fused)
    replace(match.output, fused)


def _packed(program: Program, node: fx.Node) -> fx.Node:
    """The placeholder of a factor packed as float16; `sub_branch` has rounded the factors to what float16 holds."""
    if is_call(node, hikui.linear.default):
        return PackedLinear.of(node).weight
    key = program.weight_of(weight_of(node))
    return program.add_weight(f"{key}.{_FACTOR}", pack(_FACTOR, program.store.load(key)).weight)
