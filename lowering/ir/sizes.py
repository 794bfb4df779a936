"""What a program's weights take: every linear site with its true bits, and everything else beside them."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx

from hikui.lowering.errors import VerificationError
from hikui.lowering.ir.program import SITE, WEIGHT, Program

_LINEAR = torch.ops.aten.linear.default


class Operands(NamedTuple):
    """Positions among the arguments of an op on a packed weight; `branch` is those of A and B."""

    weight: int
    scale: int
    branch: tuple[int, ...]
    format: int
    rows: int


OPERANDS: dict[Any, Operands] = {
    torch.ops.hikui.linear.default: Operands(1, 2, (), 4, 5),
    torch.ops.hikui.linear_a8.default: Operands(3, 4, (), 6, 7),
    torch.ops.hikui.linear_a8_branch.default: Operands(3, 4, (7, 8), 9, 10),
}


@dataclass(frozen=True)
class Site:
    """One matrix that activations are multiplied with.

    Attributes:
        format: of its weights, as text; `float32` before any pass has quantised it.
        rank: of the low-rank branch beside it inside the same op, 0 for none.
        nbytes: weights, scales, padding and branch.
    """

    name: str
    format: str
    out_features: int
    in_features: int
    rank: int
    nbytes: int

    @property
    def parameters(self) -> int:
        return self.out_features * self.in_features

    @property
    def true_bits(self) -> float:
        return 8 * self.nbytes / self.parameters


@dataclass(frozen=True)
class Sizes:
    """What all weights of a program take.

    Attributes:
        sites: the linear sites, in the order of the graph; the head is one of them.
        branch_bytes: low-rank branches that stand as plain nodes beside their site.
        total_bytes: every weight once: sites, branches, embeddings, norms, biases.
    """

    sites: tuple[Site, ...]
    branch_bytes: int
    total_bytes: int

    @property
    def linear_bytes(self) -> int:
        return sum(site.nbytes for site in self.sites) + self.branch_bytes

    @property
    def true_bpw(self) -> float:
        """Bits per weight over all linear sites; scales, padding and branches counted."""
        parameters = sum(site.parameters for site in self.sites)
        return 8 * self.linear_bytes / parameters if parameters else 0.0


def measure(program: Program) -> Sizes:
    """Counts the weights of a program at any stage, from the freshly traced one to the fused one."""
    found: list[Site] = []
    branches = 0
    orders: set[str] = set()
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is _LINEAR:
            weight = node.args[1]
            if _is_weight(weight):
                n, k = weight.meta["val"].shape
                found.append(Site(_name(node, program), "float32", n, k, 0, _nbytes(weight)))
        elif node.target in OPERANDS:
            site = _packed(node, program, orders)
            if node.target is torch.ops.hikui.linear.default and SITE not in node.meta:
                branches += site.nbytes
            else:
                found.append(site)
    return Sizes(tuple(found), branches, sum(_nbytes(node) for node in program.weight_nodes()))


def column_order(node: fx.Node) -> fx.Node | None:
    """The stored order (int32 [k]) in which a packed site's columns stand, if it is not the checkpoint's.

    Args:
        node: a call of one of `OPERANDS`.
    """
    source = _source(node)
    if source.target is torch.ops.aten.index_select.default and _is_weight(source.args[2]):
        assert isinstance(source.args[2], fx.Node), "it is a weight's placeholder"
        return source.args[2]
    return None


def _packed(node: fx.Node, program: Program, orders: set[str]) -> Site:
    """A site on a packed weight; the order of a mixed one's columns counts at the first that reads it."""
    places = OPERANDS[node.target]
    held = [node.args[at] for at in (places.weight, places.scale, *places.branch)]
    nbytes = sum(_nbytes(operand) for operand in held if isinstance(operand, fx.Node))
    order = column_order(node)
    if order is not None and program.weight_of(order) not in orders:
        orders.add(program.weight_of(order))
        nbytes += _nbytes(order)
    rank = 0
    if places.branch:
        up = node.args[places.branch[1]]
        assert isinstance(up, fx.Node), "the branch's second factor is a weight"
        rank = int(up.meta["val"].shape[1])
    rows = node.args[places.rows]
    assert isinstance(rows, int), "the number of rows is a constant"
    return Site(_name(node, program), str(node.args[places.format]), rows, _in_features(node), rank, nbytes)


def _in_features(node: fx.Node) -> int:
    """K of a packed site: the last dimension of what was quantised, since q itself is padded."""
    return int(_source(node).meta["val"].shape[-1])


def _source(node: fx.Node) -> fx.Node:
    """The float activation that a packed site reads, quantised or not."""
    source = node.args[0]
    assert isinstance(source, fx.Node), "the first operand is an activation"
    if node.target is not torch.ops.hikui.linear.default:
        quantiser = source.args[0]
        assert isinstance(quantiser, fx.Node), "q is the first output of an op that quantises"
        if not str(quantiser.target).startswith("hikui."):
            raise VerificationError(f"Node {node.name} reads {source.name}, which no hikui op has quantised.")
        source = quantiser.args[0]
        assert isinstance(source, fx.Node), "the first operand is an activation"
    return source


def _name(node: fx.Node, program: Program) -> str:
    if SITE in node.meta:
        return str(node.meta[SITE])
    weight = next(operand for operand in node.all_input_nodes if _is_weight(operand))
    return program.weight_of(weight).removesuffix(".weight")


def _is_weight(node: object) -> bool:
    return isinstance(node, fx.Node) and WEIGHT in node.meta


def _nbytes(node: fx.Node) -> int:
    value = node.meta["val"]
    return int(value.numel()) * int(value.dtype.itemsize)
