"""Brings every traced model into one form, and names its linear sites.

No-op calls go, views become `reshape`, equal constants become one, and each product with a stored matrix becomes
`aten.linear` with an [N, K] weight. Each such site gets its name, its tied group and its block in the metadata.
"""

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from hikui.lowering.errors import HikuiError, VerificationError
from hikui.lowering.ir.program import BLOCK, GROUP, SITE, WEIGHT, Program
from hikui.lowering.ir.store import Transposed
from hikui.lowering.pipeline.contract import Pass, PassContext, PassResult
from hikui.passes.graph import (
    aten,
    drop_weights,
    erase_dead,
    insert,
    is_call,
    is_weight,
    replace,
    same_size,
    shape,
    sites,
)
from hikui.passes.patterns.linear import LinearMatch, match_linear
from hikui.passes.patterns.noop import ASSERTIONS, merged_view, noop_operand

_VIEWS = (aten.view.default, aten._unsafe_view.default)
_PARAMETER_SUFFIXES = (".weight", ".bias")


@dataclass(frozen=True)
class Canonicalise(Pass):
    """Finds linear sites, tied groups and blocks; removes calls that do nothing."""

    name: ClassVar[str] = "canonicalise"

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Works on a clone.

        Raises:
            HikuiError: the blocks of the sites are out of order.
        """
        work = program.clone()
        read = [node for node in work.weight_nodes() if node.users]
        counts = {
            "no-op calls removed": _remove_noops(work),
            "views turned into reshapes": _rewrite_views(work),
            "products brought into the form of linear": _rewrite_products(work),
            "equal constants merged": _merge_constants(work),
            "unread calls removed": erase_dead(work),
        }
        changed = any(counts.values())
        named = _name_sites(work)
        if not changed and not named:
            return PassResult(program, False)
        drop_weights(work, read)
        work.recompile()
        _check_blocks(work)
        found = sites(work)
        notes = [f"{count} {what}" for what, count in counts.items() if count]
        tied = sum(1 for name in {node.meta[GROUP] for node in found} if "+" in name)
        notes.append(f"{len(found)} linear sites, {tied} tied groups")
        return PassResult(work, True, notes)

    def ensures(self, program: Program) -> None:
        """Every linear with a stored weight is a site, and site names are unique."""
        names: set[str] = set()
        for node in program.graph.nodes:
            if is_call(node, aten.linear.default) and is_weight(node.args[1]) and SITE not in node.meta:
                raise VerificationError(f"Node {node.name} multiplies a stored weight but is not a site.")
            if SITE in node.meta:
                if node.meta[SITE] in names:
                    raise VerificationError(f"Two sites are called {node.meta[SITE]}.")
                names.add(node.meta[SITE])


def _remove_noops(program: Program) -> int:
    count = 0
    for node in list(program.graph.nodes):
        if is_call(node, *ASSERTIONS):
            program.graph.erase_node(node)
            count += 1
        elif (operand := noop_operand(node)) is not None:
            replace(node, operand)
            count += 1
    return count


def _rewrite_views(program: Program) -> int:
    """One op for all views, and none of a view: once copies are gone, what is viewed need not be contiguous."""
    count = 0
    for node in list(program.graph.nodes):
        merged = merged_view(node)
        if merged is not None:
            node.args = merged
        elif not is_call(node, *_VIEWS):
            continue
        node.target = aten.reshape.default
        count += 1
        if (operand := noop_operand(node)) is not None:
            replace(node, operand)
    return count


def _rewrite_products(program: Program) -> int:
    count = 0
    for node in list(program.graph.nodes):
        match = match_linear(node)
        if not isinstance(match, LinearMatch):
            continue
        if node.target is not aten.linear.default or match.weight is not node.args[1]:
            node = _as_linear(program, node, match)
            count += 1
        count += _keep_leading_dimensions(program, node)
    return count


def _as_linear(program: Program, node: fx.Node, match: LinearMatch) -> fx.Node:
    weight = _transposed_weight(program, match.weight) if match.transposed else match.weight
    args = (match.x, weight) if match.bias is None else (match.x, weight, match.bias)
    linear = insert(program, node, aten.linear.default, args, node)
    replace(node, linear)
    return linear


def _transposed_weight(program: Program, weight: fx.Node) -> fx.Node:
    key = f"{program.weight_of(weight)}.transposed"
    for other in program.weight_nodes():
        if program.weight_of(other) == key:
            return other
    program.store.alias(key, Transposed(program.store.source(program.weight_of(weight))))
    return program.add_placeholder(key)


def _keep_leading_dimensions(program: Program, node: fx.Node) -> int:
    """Undoes reshape → linear → reshape, which only flattens and restores the leading dimensions."""
    flat = node.args[0]
    if not is_call(flat, aten.reshape.default) or len(node.users) != 1:
        return 0
    (restored,) = node.users
    source = flat.args[0]
    if not is_call(restored, aten.reshape.default) or not isinstance(source, fx.Node):
        return 0
    want = (*shape(source)[:-1], shape(node)[-1])
    got = shape(restored)
    same_features = same_size(shape(source)[-1], shape(flat)[-1])
    if not same_features or len(want) != len(got) or not all(map(same_size, want, got)):
        return 0
    node.args = (source, *node.args[1:])
    node.meta["val"] = restored.meta["val"]
    replace(restored, node)
    return 1


def _merge_constants(program: Program) -> int:
    """Makes one of stored tensors that are equal byte for byte and are no module's weight or bias (tables, masks)."""
    first: dict[tuple[object, ...], fx.Node] = {}
    count = 0
    for node in program.weight_nodes():
        key = program.weight_of(node)
        if key.endswith(_PARAMETER_SUFFIXES) or not node.users or key.endswith(".transposed"):
            continue
        tensor = program.store.load(key)
        digest = hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()
        kept = first.setdefault((tensor.dtype, tuple(tensor.shape), digest), node)
        if kept is not node:
            node.replace_all_uses_with(kept)
            count += 1
    return count


def _name_sites(program: Program) -> bool:
    """Writes site and group names; returns whether any was new."""
    found = [node for node in program.graph.nodes if is_call(node, aten.linear.default) and is_weight(node.args[1])]
    packed = [node for node in sites(program) if node not in set(found)]
    taken = {node.meta[SITE] for node in packed}
    changed = False
    for node in found:
        name = node.meta.get(SITE) or _module_path(program, node)
        unique, number = name, 2
        while unique in taken:
            unique, number = f"{name}#{number}", number + 1
        taken.add(unique)
        changed |= node.meta.get(SITE) != unique
        node.meta[SITE] = unique
    tied: dict[fx.Node, list[fx.Node]] = {}
    for node in found:
        x = node.args[0]
        assert isinstance(x, fx.Node)
        tied.setdefault(x, []).append(node)
    for members in tied.values():
        group = _group_name([node.meta[SITE] for node in members])
        for node in members:
            changed |= node.meta.get(GROUP) != group
            node.meta[GROUP] = group
    return changed


def _module_path(program: Program, node: fx.Node) -> str:
    """The module that holds the weight; for a weight that others read too (a tied head), the module that multiplies."""
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    path = str(weight.meta[WEIGHT]).removesuffix(".transposed").removesuffix(".weight")
    stack = node.meta.get("nn_module_stack")
    if len(weight.users) > 1 and stack:
        innermost = str(list(stack.values())[-1][0])
        return innermost or path
    return path


def _group_name(names: list[str]) -> str:
    """`a.b.{q,k,v}` as `a.b.q+k+v`; one site is its own group."""
    head = names[0].rpartition(".")[0]
    tails = [name.rpartition(".") for name in names]
    if all(prefix == head for prefix, _, _ in tails):
        joined = "+".join(tail for _, _, tail in tails)
        return f"{head}.{joined}" if head else joined
    return "+".join(names)


def _check_blocks(program: Program) -> None:
    current = -1
    for node in sites(program):
        block = node.meta.get(BLOCK)
        if block is None:
            continue
        if not isinstance(block, int) or block < current:
            raise HikuiError(
                f"Site {node.meta[SITE]} of block {block} comes after block {current}; the model's blocks do not run "
                "one after the other, so they cannot be processed one by one."
            )
        current = block
