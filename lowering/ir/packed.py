"""The ops on packed weights: what their operands are, said once for every reader of a graph.

Where an operand stands is read from the op's own schema (`dialect.py`), so that no position is written down anywhere.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import NoneType
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx

import hikui.lowering.ir.dialect  # noqa: F401  (registers the ops)
from hikui.lowering.errors import UsageError, VerificationError
from hikui.lowering.formats import ROWS, Format, unpack
from hikui.lowering.ir.program import FLOAT_WEIGHT, LATENT, WEIGHT, Program
from hikui.lowering.ir.store import WeightStore

PACKED_OPS: tuple[Any, ...] = (
    torch.ops.hikui.linear.default,
    torch.ops.hikui.linear_a8.default,
    torch.ops.hikui.linear_a8_branch.default,
)

EMBEDDING: Any = torch.ops.hikui.embedding.default

_BLOCKS = 128
"""Blocks of rows unpacked at a time: the head of a large vocabulary takes gigabytes in float32."""

_FACTOR = Format("float16")

_KINDS: dict[str, tuple[type, ...]] = {
    "Tensor": (fx.Node,),
    "Optional[Tensor]": (fx.Node, NoneType),
    "str": (str,),
    "int": (int,),
}
"""What may stand in a graph for the operands of a packed op, by their types in its schema."""


@cache
def operand_names(op: Any) -> tuple[str, ...]:
    """The names of an op's operands, in their order."""
    return tuple(argument.name for argument in op._schema.arguments)


def is_packed(node: object) -> TypeGuard[fx.Node]:
    """Whether a node multiplies with a packed weight."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in PACKED_OPS


def is_packed_embedding(node: object) -> TypeGuard[fx.Node]:
    """Whether a node looks up rows of a packed matrix."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is EMBEDDING


def is_stored(node: object) -> TypeGuard[fx.Node]:
    """Whether a node is the placeholder of a stored tensor."""
    return isinstance(node, fx.Node) and WEIGHT in node.meta


@dataclass(frozen=True)
class PackedLinear:
    """A product with a packed weight, taken apart.

    Attributes:
        node: the call.
        operands: every operand by its name in the dialect.
        weight: placeholder of the packed matrix.
        scale: of its scales; None where the format has none.
        bias: what is added, or None.
        branch: placeholders of A [rank, k] and B [n, rank], packed as float16, of a branch inside the op; or None.
        format: of the weight.
        rows: n, the number of output features.
    """

    node: fx.Node
    operands: dict[str, fx.node.Argument]
    weight: fx.Node
    scale: fx.Node | None
    bias: fx.Node | None
    branch: tuple[fx.Node, fx.Node] | None
    format: Format
    rows: int

    @staticmethod
    def of(node: fx.Node) -> "PackedLinear":
        """Takes a call of one of `PACKED_OPS` apart.

        Raises:
            VerificationError: an operand is missing or of another kind than the op's.
        """
        operands, fmt = _operands(node)
        weight, rows = operands["weight"], operands["out_features"]
        assert isinstance(weight, fx.Node) and isinstance(rows, int), "as the schema has them"
        scale, bias, a, b = (_node_or_none(operands.get(name)) for name in ("scale", "bias", "a", "b"))
        branch = None if a is None or b is None else (a, b)
        return PackedLinear(node, operands, weight, scale, bias, branch, fmt, rows)

    @property
    def source(self) -> fx.Node:
        """The float activation [..., k] that the product reads or that its quantiser read.

        Of a fused norm or SwiGLU it is the first operand, which is as wide.

        Raises:
            VerificationError: what it reads was quantised by no op of the dialect.
        """
        source = self.node.args[0]
        assert isinstance(source, fx.Node), "the first operand is an activation"
        if self.node.target is torch.ops.hikui.linear.default:
            return source
        quantiser = source.args[0] if source.args else None
        if not isinstance(quantiser, fx.Node) or getattr(quantiser.target, "namespace", "") != "hikui":
            raise VerificationError(f"Node {self.node.name} reads {source.name}, which no hikui op has quantised.")
        read = quantiser.args[0]
        assert isinstance(read, fx.Node), "the first operand is an activation"
        return read

    @property
    def columns(self) -> int:
        """k, the number of input features; q itself is padded."""
        return int(self.source.meta["val"].shape[-1])

    @property
    def order(self) -> fx.Node | None:
        """Placeholder of the order (int32 [k]) in which the columns stand, if it is not the checkpoint's."""
        source = self.source
        if source.target is torch.ops.aten.index_select.default and is_stored(source.args[2]):
            return source.args[2]
        return None

    @property
    def rank(self) -> int:
        """Of the branch inside the op; 0 for none."""
        return 0 if self.branch is None else int(self.branch[1].meta["val"].shape[1])

    def stored(self) -> tuple[fx.Node, ...]:
        """The placeholders of its matrix: weight, scales, and the factors of a branch."""
        return tuple(node for node in (self.weight, self.scale, *(self.branch or ())) if node is not None)

    def arguments(self, op: Any, **changes: fx.node.Argument) -> tuple[fx.node.Argument, ...]:
        """The arguments of another op of the three on the same weight, some operands changed or added."""
        named = {**self.operands, **changes}
        return tuple(named[name] for name in operand_names(op))

    def set_bias(self, bias: fx.Node) -> None:
        """Lets the call add a stored vector [n]."""
        self.node.update_arg(operand_names(self.node.target).index("bias"), bias)

    def column_order(self, store: WeightStore) -> Tensor | None:
        """The order in which the columns stand: int64 [k], or None where they stand as in the checkpoint."""
        held = self.order
        return None if held is None else store.load(Program.weight_of(held)).long()

    def unrounded(self, store: WeightStore) -> Tensor:
        """What it was packed from, its columns as stored: float32 [n, k]; the site must still name it."""
        order, matrix = self.column_order(store), store.load(str(self.node.meta[FLOAT_WEIGHT])).float()
        return matrix if order is None else matrix[:, order]

    def latent(self, store: WeightStore) -> Tensor:
        """What its codes are the nearest to, columns as stored: float32 [n, k]; of factors their own."""
        if LATENT in self.node.meta:
            return store.load(str(self.node.meta[LATENT])).float()
        return self.unrounded(store)

    def dense(self, store: WeightStore) -> Tensor:
        """The matrix that activations are multiplied with, its branch added, columns as stored: float32 [n, k]."""
        out, start = torch.empty(self.rows, self.columns), 0
        for rows in self.dense_rows(store):
            out[start : start + rows.shape[0]] = rows
            start += rows.shape[0]
        return out

    def dense_rows(self, store: WeightStore) -> Iterator[Tensor]:
        """The same, some rows at a time."""
        a, b = (None, None) if self.branch is None else (_load(store, node) for node in self.branch)
        k, start = self.columns, 0
        for matrix in _unpacked_rows(store, self, k):
            if a is not None and b is not None:
                rank, count, blocks = int(b.shape[1]), matrix.shape[0], slice(start, start + _BLOCKS)
                matrix += unpack(_FACTOR, b[blocks], None, count, rank) @ unpack(_FACTOR, a, None, rank, k)
            start += _BLOCKS
            yield matrix


@dataclass(frozen=True)
class PackedEmbedding:
    """A look-up of rows of a packed matrix, taken apart; a product may read the same matrix.

    Attributes:
        node: the call.
        ids: what it looks up: int64 [...].
        weight: placeholder of the packed matrix.
        scale: of its scales; None where the format has none.
        format: of the weight; any but `mixed`, whose columns stand in another order.
        rows: how many the matrix has; ids are 0 … rows−1.
        columns: how many values a row has.
    """

    node: fx.Node
    ids: fx.Node
    weight: fx.Node
    scale: fx.Node | None
    format: Format
    rows: int
    columns: int

    @staticmethod
    def of(node: fx.Node) -> "PackedEmbedding":
        """Takes a call of `hikui::embedding` apart.

        Raises:
            VerificationError: an operand is missing or of another kind than the op's.
        """
        operands, fmt = _operands(node)
        ids, weight, rows, columns = (operands[name] for name in ("ids", "weight", "rows", "columns"))
        assert isinstance(ids, fx.Node) and isinstance(weight, fx.Node), "as the schema has them"
        assert isinstance(rows, int) and isinstance(columns, int), "as the schema has them"
        return PackedEmbedding(node, ids, weight, _node_or_none(operands["scale"]), fmt, rows, columns)

    def stored(self) -> tuple[fx.Node, ...]:
        """The placeholders of its matrix: weight and scales."""
        return (self.weight,) if self.scale is None else (self.weight, self.scale)

    def dense_rows(self, store: WeightStore) -> Iterator[Tensor]:
        """The matrix, some rows at a time: float32 [rows, columns]."""
        return _unpacked_rows(store, self, self.columns)


def _operands(node: fx.Node) -> tuple[dict[str, fx.node.Argument], Format]:
    """The operands of a packed op by their names in its schema, each of its kind, and the format.

    Raises:
        VerificationError: one is missing or of another kind.
    """
    names = operand_names(node.target)
    if len(node.args) != len(names) or node.kwargs:
        raise VerificationError(f"Node {node.name} does not have the operands {', '.join(names)}, by position.")
    operands = dict(zip(names, node.args, strict=True))
    for argument in node.target._schema.arguments:  # type: ignore[union-attr]
        operand, due = operands[argument.name], str(argument.type)
        if not isinstance(operand, _KINDS[due]):
            raise VerificationError(f"Node {node.name} takes {operand!r} as its {argument.name}; {due} is due.")
    try:
        return operands, Format.parse(str(operands["format"]))
    except UsageError as error:
        raise VerificationError(f"Node {node.name}: {error}") from error


def _unpacked_rows(store: WeightStore, packed: PackedLinear | PackedEmbedding, k: int) -> Iterator[Tensor]:
    """The matrix behind weight and scales, `_BLOCKS` blocks of rows at a time: float32 [rows, k]."""
    weight, scale = _load(store, packed.weight), _load(store, packed.scale)
    assert weight is not None, "a packed op has its weight"
    for start in range(0, weight.shape[0], _BLOCKS):
        blocks = slice(start, start + _BLOCKS)
        count = min((start + _BLOCKS) * ROWS, packed.rows) - start * ROWS
        yield unpack(packed.format, weight[blocks], None if scale is None else scale[blocks], count, k)


def verify_packed(node: fx.Node) -> None:
    """Checks that the operands of a packed op have the shapes and dtypes that its format and its input ask for.

    Raises:
        VerificationError: which one has not.
    """
    packed = PackedLinear.of(node)
    fmt, n, k = packed.format, packed.rows, packed.columns
    try:
        weight_shape = fmt.weight_shape(n, k)
    except UsageError as error:
        raise VerificationError(f"Node {node.name}: {error}") from error
    due: list[tuple[str, object, tuple[int, ...] | None, torch.dtype]] = [
        ("weight", packed.weight, weight_shape, fmt.weight_dtype),
        ("scale", packed.operands["scale"], fmt.scale_shape(n, k), torch.float16),
    ]
    if packed.bias is not None:
        due.append(("bias", packed.bias, (n,), torch.float32))
    if packed.branch is not None:
        down, up = packed.branch
        due.append(("a", down, _FACTOR.weight_shape(packed.rank, k), torch.float16))
        due.append(("b", up, _FACTOR.weight_shape(n, packed.rank), torch.float16))
    _expect(node, fmt, due)


def verify_embedding(node: fx.Node) -> None:
    """Checks that the operands of a look-up have the shapes and dtypes that its format and its sizes ask for.

    Raises:
        VerificationError: which one has not.
    """
    packed = PackedEmbedding.of(node)
    fmt, n, k = packed.format, packed.rows, packed.columns
    if fmt.is_mixed:
        raise VerificationError(f"Node {node.name} looks up rows of {fmt}, whose columns stand in another order.")
    if n < 1 or k < 1:
        raise VerificationError(f"Node {node.name} looks up {n} rows of {k} columns; at least 1 of 1 are due.")
    if packed.ids.meta["val"].dtype != torch.int64:
        raise VerificationError(f"Node {node.name} looks up ids of {packed.ids.meta['val'].dtype}; int64 is due.")
    weight = ("weight", packed.weight, fmt.weight_shape(n, k), fmt.weight_dtype)
    _expect(node, fmt, [weight, ("scale", packed.scale, fmt.scale_shape(n, k), torch.float16)])


def _expect(node: fx.Node, fmt: Format, due: list[tuple[str, object, tuple[int, ...] | None, torch.dtype]]) -> None:
    for name, operand, shape, dtype in due:
        value = operand.meta["val"] if isinstance(operand, fx.Node) else None
        got = None if value is None else tuple(value.shape)
        if got != shape:
            raise VerificationError(f"Node {node.name} ({fmt}) has a {name} of shape {got}; {shape} is due.")
        if value is not None and value.dtype != dtype:
            raise VerificationError(f"Node {node.name} ({fmt}) has a {name} of {value.dtype}; {dtype} is due.")


def _node_or_none(operand: object) -> fx.Node | None:
    return operand if isinstance(operand, fx.Node) else None


def _load(store: WeightStore, node: fx.Node | None) -> Tensor | None:
    return None if node is None else store.load(Program.weight_of(node))
