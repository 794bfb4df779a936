"""onnx-ir pass: `hikui::Attention` becomes ONNX Runtime's `GroupQueryAttention`.

The operator reads [1, T, heads * size] rather than the dialect's [1, heads, T, size], so the transposes around the
attention mostly cancel. Caches keep their full length of C rows; how many of them count comes from `past` and T, once
for the whole graph, and a runner that binds one buffer as old and new cache has it updated in place.

ONNX Runtime takes head sizes that are multiples of 8; others stay with the kernel of `hikui::Attention`.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from hikui.backends.onnxruntime.schemas import DOMAIN

CONTRIB = "com.microsoft"
HEADS_INSIDE = (0, 2, 1, 3)
_SIZE_MULTIPLE = 8


def transposed_view(value: ir.Value | None) -> ir.Value | None:
    """The [1, T, heads * size] value that `value` [1, heads, T, size] is a reshaped and transposed view of, if any."""
    transpose = value.producer() if value is not None else None
    if (
        transpose is None
        or transpose.op_type != "Transpose"
        or transpose.attributes.get_ints("perm", ()) != HEADS_INSIDE
    ):
        return None
    reshaped = transpose.inputs[0]
    reshape = reshaped.producer() if reshaped is not None else None
    if reshape is None or reshape.op_type != "Reshape":
        return None
    source = reshape.inputs[0]
    _, heads, _, size = _dims(value)
    flat = source is not None and source.shape is not None and len(source.shape) == 3
    assert isinstance(heads, int) and isinstance(size, int), "heads and their size are no symbols"
    return source if flat and _dims(source)[2] == heads * size else None


class _Builder:
    """Collects the nodes that go in front of (or behind) one place of the graph."""

    def __init__(self, prefix: str) -> None:
        self.nodes: list[ir.Node] = []
        self._prefix = prefix

    def add(
        self,
        op_type: str,
        inputs: list[ir.Value | None],
        name: str,
        dtype: ir.DataType,
        shape: list[int | str],
        domain: str = "",
        **attributes: ir.Attr | int | float | list[int],
    ) -> ir.Value:
        node = ir.node(op_type, inputs, attributes, domain=domain, name=f"{self._prefix}_{name}")
        value = node.outputs[0]
        value.name, value.dtype, value.shape = f"{self._prefix}_{name}", dtype, ir.Shape(shape)
        self.nodes.append(node)
        return value


def initializer(graph: ir.Graph, name: str, data: npt.NDArray[Any]) -> ir.Value:
    """A constant inside the model file, shared by all who ask for that name."""
    if name not in graph.initializers:
        tensor = ir.tensor(data, name=name)
        value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(data.shape))
        graph.register_initializer(value)
    return graph.initializers[name]


def _constant(graph: ir.Graph, name: str, values: list[int]) -> ir.Value:
    return initializer(graph, name, np.array(values, np.int64))


def _dims(value: ir.Value | None) -> list[int | str]:
    assert value is not None and value.shape is not None, "the exporter infers the shapes that attention sees"
    return [dim if isinstance(dim, int) else str(dim) for dim in value.shape]


def _replaceable(node: ir.Node) -> bool:
    if node.domain != DOMAIN or node.op_type != "Attention":
        return False
    size = _dims(node.inputs[0])[-1]
    return isinstance(size, int) and size % _SIZE_MULTIPLE == 0


class UseGroupQueryAttention(ir.passes.InPlacePass):
    """Replaces every `hikui::Attention` whose head size ONNX Runtime takes."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        found = [node for node in graph if _replaceable(node)]
        if not found:
            return ir.passes.PassResult(model, modified=False)
        lengths = self._lengths(graph, found[0])
        for node in found:
            self._replace(graph, node, lengths)
        model.opset_imports.setdefault(CONTRIB, 1)
        return ir.passes.PassResult(model, modified=True)

    @staticmethod
    def _lengths(graph: ir.Graph, first: ir.Node) -> tuple[ir.Value, ir.Value]:
        """seqlens_k and total_sequence_length, both int32 [1], from `past` and T."""
        past, token_ids = first.inputs[5], graph.inputs[0]
        build = _Builder("attention")
        one = _constant(graph, "attention_one", [1])
        tokens = build.add("Shape", [token_ids], "tokens", ir.DataType.INT64, [1], start=1, end=2)
        total = build.add("Add", [past, tokens], "total", ir.DataType.INT64, [1])
        last = build.add("Sub", [total, one], "last", ir.DataType.INT64, [1])
        int32 = int(ir.DataType.INT32)
        total32 = build.add("Cast", [total], "total_sequence_length", ir.DataType.INT32, [1], to=int32)
        last32 = build.add("Cast", [last], "seqlens_k", ir.DataType.INT32, [1], to=int32)
        graph.insert_before(first, build.nodes)
        return last32, total32

    @staticmethod
    def _replace(graph: ir.Graph, node: ir.Node, lengths: tuple[ir.Value, ir.Value]) -> None:
        query, key, value, key_cache, value_cache, _ = node.inputs
        out, new_keys, new_values = node.outputs
        _, heads, tokens, size = _dims(query)
        kv_heads = _dims(key)[1]
        assert isinstance(heads, int) and isinstance(kv_heads, int) and isinstance(size, int)
        build = _Builder(node.name or "attention")
        rows: list[ir.Value | None] = []
        for name, operand in (("query", query), ("key", key), ("value", value)):
            assert operand is not None
            view = transposed_view(operand)
            if view is None:
                width = (heads if name == "query" else kv_heads) * size
                turned = build.add(
                    "Transpose", [operand], f"{name}_transposed", ir.DataType.FLOAT,
                    [1, tokens, width // size, size], perm=list(HEADS_INSIDE),
                )  # fmt: skip
                shape = _constant(graph, f"attention_rows_{width}", [1, -1, width])
                view = build.add("Reshape", [turned, shape], f"{name}_rows", ir.DataType.FLOAT, [1, tokens, width])
            rows.append(view)
        attention = ir.node(
            "GroupQueryAttention",
            [*rows, key_cache, value_cache, *lengths],
            {"num_heads": heads, "kv_num_heads": kv_heads, "scale": node.attributes.get_float("scale")},
            domain=CONTRIB,
            num_outputs=3,
            name=node.name,
        )
        result, keys, values = attention.outputs
        result.name, result.dtype = f"{out.name}_rows", ir.DataType.FLOAT
        result.shape = ir.Shape([1, tokens, heads * size])
        build.nodes.append(attention)
        shape = _constant(graph, f"attention_heads_{heads}_{size}", [1, -1, heads, size])
        split = build.add("Reshape", [result, shape], "split", ir.DataType.FLOAT, [1, tokens, heads, size])
        turned = build.add(
            "Transpose", [split], "out", ir.DataType.FLOAT, [1, heads, tokens, size], perm=list(HEADS_INSIDE)
        )
        ir.convenience.replace_nodes_and_values(
            graph, node, [node], build.nodes, [out, new_keys, new_values], [turned, keys, values]
        )
        UseGroupQueryAttention._cancel(result, turned, heads * size)

    @staticmethod
    def _cancel(result: ir.Value, turned: ir.Value, width: int) -> None:
        """Lets whoever transposes and flattens the heads again read the operator's own output."""
        for transpose, _ in tuple(turned.uses()):
            if transpose.op_type != "Transpose" or transpose.attributes.get_ints("perm", ()) != HEADS_INSIDE:
                continue
            for reshape, _ in tuple(transpose.outputs[0].uses()):
                merged = reshape.outputs[0]
                flat = merged.shape is not None and len(merged.shape) == 3 and merged.shape[2] == width
                if reshape.op_type == "Reshape" and flat:
                    result.name, merged.name = merged.name, f"{merged.name}_turned"
                    ir.convenience.replace_all_uses_with(merged, result, replace_graph_outputs=True)
