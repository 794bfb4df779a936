"""What a program's weights take: every linear site with its true bits, and everything else beside them."""

from dataclasses import dataclass

import torch
from torch import fx

from hikui.lowering.ir.packed import PackedLinear, is_packed, is_stored
from hikui.lowering.ir.program import SITE, Program

_LINEAR = torch.ops.aten.linear.default


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
            if is_stored(weight):
                n, k = weight.meta["val"].shape
                found.append(Site(_name(node, program), "float32", n, k, 0, _nbytes(weight)))
        elif is_packed(node):
            site = _packed(node, program, orders)
            if node.target is torch.ops.hikui.linear.default and SITE not in node.meta:
                branches += site.nbytes
            else:
                found.append(site)
    return Sizes(tuple(found), branches, sum(_nbytes(node) for node in program.weight_nodes()))


def _packed(node: fx.Node, program: Program, orders: set[str]) -> Site:
    """A site on a packed weight; the order of a mixed one's columns counts at the first that reads it."""
    packed = PackedLinear.of(node)
    nbytes = sum(map(_nbytes, packed.stored()))
    order = packed.order
    if order is not None and program.weight_of(order) not in orders:
        orders.add(program.weight_of(order))
        nbytes += _nbytes(order)
    return Site(_name(node, program), str(packed.format), packed.rows, packed.columns, packed.rank, nbytes)


def _name(node: fx.Node, program: Program) -> str:
    if SITE in node.meta:
        return str(node.meta[SITE])
    weight = next(operand for operand in node.all_input_nodes if is_stored(operand))
    return program.weight_of(weight).removesuffix(".weight")


def _nbytes(node: fx.Node) -> int:
    value = node.meta["val"]
    return int(value.numel()) * int(value.dtype.itemsize)
