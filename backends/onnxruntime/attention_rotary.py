"""onnx-ir pass: `GroupQueryAttention` rotates queries and keys itself.

The operator takes tables of cosines and sines by position, so the graph's own computation of them is run once, here,
for every position of the cache. That it depends on nothing but the position is checked, not assumed.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from hikui.backends.onnxruntime.group_query_attention import CONTRIB, HEADS_INSIDE, initializer, transposed_view
from hikui.backends.onnxruntime.schemas import DOMAIN

LoadWeight = Callable[[str], npt.NDArray[np.generic]]
"""Gives the weight of that name."""

_SIZE_MULTIPLE = 16
_MAX_WEIGHT = 1 << 16
"""Elements of a weight that a computation of angles may read; it is a handful of frequencies."""

_Table = npt.NDArray[np.float32]


def _rotated(value: ir.Value | None) -> ir.Node | None:
    """The `hikui::Rotary` whose result, transposed and flattened, is `value`."""
    reshape = value.producer() if value is not None else None
    transpose = reshape.inputs[0] if reshape is not None and reshape.op_type == "Reshape" else None
    node = transpose.producer() if transpose is not None else None
    if node is None or node.op_type != "Transpose" or node.attributes.get_ints("perm", ()) != HEADS_INSIDE:
        return None
    source = node.inputs[0]
    rotary = source.producer() if source is not None else None
    return rotary if rotary is not None and (rotary.domain, rotary.op_type) == (DOMAIN, "Rotary") else None


def _ancestors(value: ir.Value) -> tuple[list[ir.Node], list[ir.Value]]:
    """The nodes that compute a value, in order, and the values without producer that they read."""
    nodes: dict[ir.Node, None] = {}
    leaves: dict[ir.Value, None] = {}

    def visit(current: ir.Value) -> None:
        node = current.producer()
        if node is None:
            leaves[current] = None
        elif node not in nodes:
            for operand in node.inputs:
                if operand is not None:
                    visit(operand)
            nodes[node] = None

    visit(value)
    return list(nodes), list(leaves)


class _Angles:
    """The computation of one cosine or sine, as a model of its own."""

    def __init__(self, value: ir.Value, graph: ir.Graph, load: LoadWeight) -> None:
        nodes, leaves = _ancestors(value)
        tokens, past = graph.inputs[:2]
        copies = {leaf: ir.Value(name=leaf.name, type=leaf.type, shape=leaf.shape) for leaf in leaves}
        for leaf, copied in copies.items():
            if leaf in (tokens, past):
                continue
            data = leaf.const_value
            copied.const_value = data if data is not None else ir.tensor(load(str(leaf.name)), name=leaf.name)
        made_nodes = []
        for node in nodes:
            made = ir.node(
                node.op_type,
                [None if operand is None else copies[operand] for operand in node.inputs],
                dict(node.attributes),
                domain=node.domain,
                num_outputs=len(node.outputs),
            )
            for old, new in zip(node.outputs, made.outputs, strict=True):
                new.name, new.type, new.shape = old.name, old.type, old.shape
                copies[old] = new
            made_nodes.append(made)
        self._inputs = [leaf for leaf in leaves if leaf in (tokens, past)]
        part = ir.Graph(
            [copies[leaf] for leaf in self._inputs],
            [copies[value]],
            nodes=made_nodes,
            initializers=[copies[leaf] for leaf in leaves if leaf not in (tokens, past)],
            opset_imports=dict(graph.opset_imports),
        )
        import onnxruntime  # type: ignore[import-untyped]

        model = ir.to_proto(ir.Model(part, ir_version=10)).SerializeToString()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def at(self, past: int, tokens: int, token: int = 0) -> _Table:
        """The values for `tokens` positions after `past`: [tokens, size]."""
        known = {"tokens": np.full((1, tokens), token, np.int64), "past": np.array([past], np.int64)}
        feed = {str(value.name): known[str(value.name)] for value in self._inputs}
        result: _Table = self._session.run(None, feed)[0]
        return result.reshape(tokens, -1)


def _table(value: ir.Value, graph: ir.Graph, context: int, load: LoadWeight) -> _Table | None:
    """The first halves of a cosine's or sine's rows for every position, or None where that is not what they are."""
    _, leaves = _ancestors(value)
    inputs = graph.inputs[:2]
    for leaf in leaves:
        shape = leaf.shape
        small = (
            shape is not None
            and np.prod([dim if isinstance(dim, int) else _MAX_WEIGHT + 1 for dim in shape]) <= _MAX_WEIGHT
        )
        if leaf not in inputs and (leaf in graph.inputs or not small):
            return None
    angles = _Angles(value, graph, load)
    rows = angles.at(0, context)
    half = rows.shape[1] // 2
    if not np.array_equal(rows[:, :half], rows[:, half:]):
        return None
    for past in {0, context // 2, context - 1}:
        if not np.allclose(angles.at(past, 1, token=1), rows[past : past + 1], rtol=0, atol=1e-6):
            return None
    return np.ascontiguousarray(rows[:, :half])


class RotateInAttention(ir.passes.InPlacePass):
    """Moves `hikui::Rotary` into the `GroupQueryAttention` that reads it.

    Args:
        context: rows of the cache, hence positions.
        load: gives the data of weights, which the model does not hold yet.
    """

    def __init__(self, context: int, load: LoadWeight) -> None:
        self._context = context
        self._load = load

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, modified = model.graph, False
        tables: dict[ir.Value, ir.Value | None] = {}
        for node in graph:
            if (node.domain, node.op_type) != (CONTRIB, "GroupQueryAttention") or len(node.inputs) > 7:
                continue
            query, key = _rotated(node.inputs[0]), _rotated(node.inputs[1])
            if query is None or key is None or query.inputs[1:] != key.inputs[1:]:
                continue
            sources = [transposed_view(rotary.inputs[0]) for rotary in (query, key)]
            cosine_sine = [self._initializer(graph, value, tables) for value in query.inputs[1:]]
            if None in sources or None in cosine_sine or self._size(query) % _SIZE_MULTIPLE:
                continue
            node.resize_inputs(9)
            for index, value in ((0, sources[0]), (1, sources[1]), (7, cosine_sine[0]), (8, cosine_sine[1])):
                node.replace_input_with(index, value)
            node.attributes.add(ir.AttrInt64("do_rotary", 1))
            modified = True
        return ir.passes.PassResult(model, modified)

    @staticmethod
    def _size(rotary: ir.Node) -> int:
        shape = rotary.outputs[0].shape
        assert shape is not None and isinstance(shape[3], int), "the exporter infers the shapes that attention sees"
        return shape[3]

    def _initializer(
        self, graph: ir.Graph, value: ir.Value | None, tables: dict[ir.Value, ir.Value | None]
    ) -> ir.Value | None:
        assert value is not None, "Rotary has no optional inputs"
        if value not in tables:
            table = _table(value, graph, self._context, self._load)
            tables[value] = None if table is None else initializer(graph, f"{value.name}_by_position", table)
        return tables[value]
