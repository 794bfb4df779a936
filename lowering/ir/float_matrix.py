"""The float matrices that packed ones stand for."""

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from hikui.lowering.ir.factored import LEFT, RIGHT, FactoredLinear, is_left_factor
from hikui.lowering.ir.packed import PackedEmbedding, PackedLinear, is_packed_embedding
from hikui.lowering.ir.program import FACTOR, Program
from hikui.lowering.ir.store import WeightStore


def float_matrix(node: fx.Node, store: WeightStore) -> Tensor:
    """The matrix of the float model in the place of a packed one, columns as stored: float32.

    Of factors, the right one gives what it reads, x·s, in the place of its product, and the left one multiplies that
    with the float matrix over s.
    """
    packed = PackedLinear.of(node)
    if node.meta.get(FACTOR) == RIGHT:
        return torch.eye(packed.columns)
    matrix = packed.unrounded(store)
    if node.meta.get(FACTOR) == LEFT:
        matrix = matrix / store.load(Program.weight_of(FactoredLinear.of(node).columns))
    return matrix


def float_and_packed_rows(
    program: Program, node: fx.Node, floats: WeightStore, key: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Some rows at a time, a float matrix and the packed one that stands for it: float32 [rows, k] each.

    Both have their columns in the packed one's order.

    Args:
        program: holds the packed matrix.
        node: a call of one of `PACKED_OPS`, of factors the left one, or of `hikui::embedding`.
        floats: holds the float matrix.
        key: its store key.
    """
    if is_left_factor(node):
        yield floats.load(key).float(), FactoredLinear.of(node).dense(program.store)
        return
    packed = PackedEmbedding.of(node) if is_packed_embedding(node) else PackedLinear.of(node)
    order, start = None if isinstance(packed, PackedEmbedding) else packed.column_order(program.store), 0
    for approximation in packed.dense_rows(program.store):
        rows = floats.load_rows(key, start, start + approximation.shape[0]).float()
        start += approximation.shape[0]
        yield (rows if order is None else rows[:, order]), approximation
