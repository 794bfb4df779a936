"""What a program's weights take: every linear site with its true bits, and everything else beside them."""

import math
from dataclasses import dataclass

import torch
from torch import fx

from hikui.lowering.ir.factored import FactoredLinear, is_factor, is_left_factor
from hikui.lowering.ir.packed import PackedEmbedding, PackedLinear, is_packed, is_packed_embedding, is_stored
from hikui.lowering.ir.program import BLOCK, SITE, Program

_LINEAR = torch.ops.aten.linear.default
_EMBEDDING = torch.ops.aten.embedding.default

KINDS_OF_BYTES = {
    "codes": "codes of linear sites, padding counted",
    "scales": "scales of linear sites",
    "floats": "linear sites that are stored as floats",
    "orders": "orders of columns",
    "branches": "low-rank branches",
    "tables": "tables of embeddings that no linear site shares, with their scales",
    "vectors": "norms, biases and whatever else has one dimension",
    "others": "all else",
}
"""What bytes are stored for."""


@dataclass(frozen=True)
class Site:
    """One matrix that activations are multiplied with.

    Attributes:
        format: of its weights, as text; `float32` before any pass has quantised it.
        rank: of the low-rank branch beside it inside the same op, 0 for none.
        nbytes: weights, scales, padding and branch.
        in_block: whether it stands in one of the model's blocks; the head does not.
    """

    name: str
    format: str
    out_features: int
    in_features: int
    rank: int
    nbytes: int
    in_block: bool

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
        block_branch_bytes: those of them that stand in blocks.
        total_bytes: every weight once: sites, branches, embeddings, norms, biases.
        parameters: how many the model has, each tied matrix once.
        kinds: of the total, what is stored for what: a key of `KINDS_OF_BYTES` → bytes.
    """

    sites: tuple[Site, ...]
    branch_bytes: int
    block_branch_bytes: int
    total_bytes: int
    parameters: int
    kinds: dict[str, int]

    @property
    def linear_bytes(self) -> int:
        return sum(site.nbytes for site in self.sites) + self.branch_bytes

    @property
    def true_bpw(self) -> float:
        """Bits per weight over all linear sites, the head among them; scales, padding and branches counted."""
        return _bits(self.linear_bytes, sum(site.parameters for site in self.sites))

    def bits(self) -> dict[str, float]:
        """The three totals by their names, to six digits, as they are told everywhere."""
        return {name: round(getattr(self, name), 6) for name in ("block_bpw", "true_bpw", "all_bpw")}

    @property
    def block_bpw(self) -> float:
        """The same over the linear sites inside blocks, which leaves the head out; 0 where no site is in a block."""
        inside = [site for site in self.sites if site.in_block]
        nbytes = sum(site.nbytes for site in inside) + self.block_branch_bytes
        return _bits(nbytes, sum(site.parameters for site in inside)) if inside else 0.0

    @property
    def all_bpw(self) -> float:
        """Bits per parameter of the model, over everything stored: embeddings, norms, biases and scales too.

        A tied matrix is one as parameters; what is stored of it counts as often as it is stored.
        """
        return _bits(self.total_bytes, self.parameters)


def measure(program: Program) -> Sizes:
    """Counts the weights of a program at any stage, from the freshly traced one to the fused one."""
    found: list[Site] = []
    branches = block_branches = 0
    orders: set[str] = set()
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is _LINEAR:
            weight = node.args[1]
            if is_stored(weight):
                n, k = weight.meta["val"].shape
                found.append(Site(_name(node, program), "float32", n, k, 0, _nbytes(weight), BLOCK in node.meta))
        elif is_left_factor(node):
            found.append(_factored(node, program))
        elif is_packed(node) and not is_factor(node):
            site = _packed(node, program, orders)
            if node.target is torch.ops.hikui.linear.default and SITE not in node.meta:
                branches += site.nbytes
                block_branches += site.nbytes if site.in_block else 0
            else:
                found.append(site)
    stored = {program.weight_of(node): node for node in program.weight_nodes()}
    total = sum(map(_nbytes, stored.values()))
    parameters = _parameters(program) if program.parameters is None else program.parameters
    return Sizes(tuple(found), branches, block_branches, total, parameters, _kinds(program))


def _kinds(program: Program) -> dict[str, int]:
    """The bytes of every weight once, by what they are for; what several read counts for the first of these."""
    kind_of: dict[str, str] = {}

    def note(node: fx.Node | None, kind: str) -> None:
        if node is not None:
            kind_of.setdefault(program.weight_of(node), kind)

    embedded = []
    for node in program.graph.nodes:
        if is_packed(node):
            packed = PackedLinear.of(node)
            if node.target is torch.ops.hikui.linear.default and SITE not in node.meta:
                note(packed.weight, "branches")
                continue
            note(packed.weight, "codes" if packed.format.is_integer else "floats")
            note(packed.scale, "scales")
            note(packed.order, "orders")
            note(FactoredLinear.of(node).columns if is_left_factor(node) else None, "scales")
            for factor in packed.branch or ():
                note(factor, "branches")
        elif node.target is _LINEAR and is_stored(node.args[1]):
            note(node.args[1], "floats")
        elif is_packed_embedding(node) or node.target is _EMBEDDING:
            embedded.append(node)
    for node in embedded:
        for operand in node.all_input_nodes:
            note(operand if is_stored(operand) else None, "tables")
    out = dict.fromkeys(KINDS_OF_BYTES, 0)
    for key, node in {program.weight_of(node): node for node in program.weight_nodes()}.items():
        other = "vectors" if node.meta["val"].dim() <= 1 else "others"
        out[kind_of.get(key, other)] += _nbytes(node)
    return {kind: nbytes for kind, nbytes in out.items() if nbytes}


def _bits(nbytes: int, parameters: int) -> float:
    return 8 * nbytes / parameters if parameters else 0.0


def _parameters(program: Program) -> int:
    """How many parameters the weights of a program stand for, where nobody has counted those of the model.

    A packed matrix counts as the one that it stands for, once however many read it; scales and orders are none.
    """
    counts: dict[str, int] = {}
    for node in program.weight_nodes():
        counts[program.weight_of(node)] = math.prod(node.meta["val"].shape)
    for node in program.graph.nodes:
        if is_packed(node):
            packed = PackedLinear.of(node)
            # What two factors stand for counts at the one that has the site's rows.
            columns = FactoredLinear.of(node).right.columns if is_left_factor(node) else packed.columns
            counts[program.weight_of(packed.weight)] = packed.rows * columns
            beside = [packed.scale, packed.order, *(packed.branch or ())]
            if is_factor(node):
                beside += [FactoredLinear.of(node).columns] if is_left_factor(node) else [packed.weight]
        elif is_packed_embedding(node):
            table = PackedEmbedding.of(node)
            counts[program.weight_of(table.weight)] = table.rows * table.columns
            beside = [table.scale]
        else:
            continue
        for held in beside:
            if held is not None:
                counts[program.weight_of(held)] = 0
    return sum(counts.values())


def _packed(node: fx.Node, program: Program, orders: set[str]) -> Site:
    """A site on a packed weight; the order of a mixed one's columns counts at the first that reads it."""
    packed = PackedLinear.of(node)
    nbytes = sum(map(_nbytes, packed.stored()))
    order = packed.order
    if order is not None and program.weight_of(order) not in orders:
        orders.add(program.weight_of(order))
        nbytes += _nbytes(order)
    return Site(
        _name(node, program), str(packed.format), packed.rows, packed.columns, packed.rank, nbytes, BLOCK in node.meta
    )


def _factored(node: fx.Node, program: Program) -> Site:
    """A site that two matrices of signs stand for; the scales of its columns count."""
    both = FactoredLinear.of(node)
    n, k, nbytes = both.left.rows, both.right.columns, sum(map(_nbytes, both.stored()))
    return Site(_name(node, program), f"factors-r{both.rank}", n, k, 0, nbytes, BLOCK in node.meta)


def _name(node: fx.Node, program: Program) -> str:
    if SITE in node.meta:
        return str(node.meta[SITE])
    weight = next(operand for operand in node.all_input_nodes if is_stored(operand))
    return program.weight_of(weight).removesuffix(".weight")


def _nbytes(node: fx.Node) -> int:
    value = node.meta["val"]
    return int(value.numel()) * int(value.dtype.itemsize)
