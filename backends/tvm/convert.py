"""How each operator of the dialect enters Relax.

A converter receives the FX node and TVM's importer and returns the Relax value of the node. Operators with a kernel
become a destination-passing call of its symbol, which the virtual machine finds in the artefact's own library; the
others become functions in TIR. TVM's importer looks converters up by the operator's name without its namespace, so
`hikui::linear` and `aten::linear` share an entry.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import fx
from tvm import relax, te, tirx

from hikui.backends.tvm import tir
from hikui.lowering.errors import HikuiError
from hikui.lowering.formats import Format, activation_k, cache_format

Importer = Any
"""TVM's `ExportedProgramImporter`: `env` maps nodes to Relax values, `block_builder` emits bindings."""
Value = Any
"""A Relax expression, or a Python tuple of them."""
Converter = Callable[[fx.Node, Importer], Value]

SUM_WIDTH = 32
_FLOAT = "float32"


def _emit_kernel(importer: Importer, name: str, arguments: list[Value], outputs: list[relax.Type]) -> Value:
    call = relax.op.call_dps_packed(name, relax.Tuple(arguments), outputs if len(outputs) > 1 else outputs[0])
    return importer.block_builder.emit(call)


def _shape(value: Value) -> list[Any]:
    return list(value.ty.shape)


def _bias(importer: Importer, node: object) -> Value:
    """The bias, or the empty tensor that the kernels take for none."""
    return relax.const(np.zeros(0, np.float32)) if node is None else importer.env[node]


def _like(value: Value) -> relax.Type:
    return relax.TensorType(_shape(value), _FLOAT)


def _quantized(value: Value) -> list[relax.Type]:
    *lead, k = _shape(value)
    kq = activation_k(int(k))
    return [
        relax.TensorType([*lead, kq], "int8"),
        relax.TensorType(lead, _FLOAT),
        relax.TensorType([*lead, kq // SUM_WIDTH], "int32"),
    ]


def _linear(node: fx.Node, importer: Importer) -> Value:
    env = importer.env
    if node.target is not torch.ops.hikui.linear.default:
        x, weight = env[node.args[0]], env[node.args[1]]
        bias = node.args[2] if len(node.args) > 2 else None
        return _dense(importer, x, weight, None if bias is None else env[bias])
    x, weight, scale, bias, format_name, out_features = node.args
    fmt = Format.parse(str(format_name))
    y = relax.TensorType([*_shape(env[x])[:-1], out_features], _FLOAT)
    operands = [env[x], env[weight], *([env[scale]] if fmt.is_integer else []), _bias(importer, bias)]
    return _emit_kernel(importer, f"hikui_linear_{fmt.kind}", operands, [y])


def _dense(importer: Importer, x: Value, weight: Value, bias: Value | None) -> Value:
    """A product with an unpacked [N, K] matrix."""
    emit = importer.block_builder.emit
    *lead, k = _shape(x)
    n = int(weight.ty.shape[0])
    function = importer.block_builder.add_func(tir.dense(n, int(k)), "dense")
    rows = emit(relax.op.reshape(x, [-1, k]))
    y = emit(relax.call_tir(function, [rows, weight], relax.TensorType([rows.ty.shape[0], n], _FLOAT)))
    y = emit(relax.op.reshape(y, [*lead, n]))
    return y if bias is None else emit(relax.op.add(y, bias))


def _quantize_activation(node: fx.Node, importer: Importer) -> Value:
    """Any of the quantisers: the kernels are called like the operators."""
    assert isinstance(node.target, torch._ops.OpOverload)
    operands = [importer.env[argument] for argument in node.args]
    return _emit_kernel(importer, node.target.name().replace("::", "_"), operands, _quantized(operands[0]))


def _linear_a8(node: fx.Node, importer: Importer) -> Value:
    env = importer.env
    q, q_scale, q_sums, weight, scale, bias, *branch, format_name, out_features = node.args
    operands = [env[q], env[q_scale], env[q_sums], env[weight], env[scale], _bias(importer, bias)]
    operands += [env[argument] for argument in branch]
    kernel = f"hikui_linear_a8_{'branch_' if branch else ''}{Format.parse(str(format_name)).kind}"
    y = relax.TensorType([*_shape(env[q])[:-1], out_features], _FLOAT)
    return _emit_kernel(importer, kernel, operands, [y])


def _rms_norm(node: fx.Node, importer: Importer) -> Value:
    if node.target is torch.ops.aten.rms_norm.default:
        return _plain_rms_norm(node, importer)
    x, weight, eps = node.args
    x = importer.env[x]
    operands = [x, importer.env[weight], relax.prim_value(eps)]
    if node.target is torch.ops.hikui.rms_norm.default:
        return _emit_kernel(importer, "hikui_rms_norm", operands, [_like(x)])
    return _emit_kernel(importer, "hikui_rms_norm_quantize", operands, [_like(x), *_quantized(x)])


def _plain_rms_norm(node: fx.Node, importer: Importer) -> Value:
    """Torch's own, which may lack the weight and the epsilon."""
    x: Any
    shape: Any
    x, shape, weight, eps = (*node.args, None, None)[:4]
    size = [int(extent) for extent in shape]
    scale = relax.const(np.ones(size, np.float32)) if weight is None else importer.env[weight]
    epsilon = torch.finfo(torch.float32).eps if eps is None else eps
    axes = list(range(-len(size), 0))
    return importer.block_builder.emit(relax.op.nn.rms_norm(importer.env[x], scale, axes=axes, epsilon=epsilon))


def _reshape(node: fx.Node, importer: Importer) -> Value:
    """TVM's own compares symbolic sizes as if they were numbers."""
    x, sizes = node.args
    extents = [importer.env[size] if isinstance(size, fx.Node) else size for size in sizes]  # type: ignore[union-attr]
    return importer.block_builder.emit(relax.op.reshape(importer.env[x], extents))


def _swiglu(node: fx.Node, importer: Importer) -> Value:
    gate, up = (importer.env[argument] for argument in node.args)
    if node.target is torch.ops.hikui.swiglu.default:
        return _emit_kernel(importer, "hikui_swiglu", [gate, up], [_like(gate)])
    return _emit_kernel(importer, "hikui_swiglu_quantize", [gate, up], [_like(gate), *_quantized(gate)])


def _rotary(node: fx.Node, importer: Importer) -> Value:
    x, cos, sin = (importer.env[argument] for argument in node.args)
    return _emit_kernel(importer, "hikui_rotary", [x, cos, sin], [_like(x)])


def _attention(node: fx.Node, importer: Importer) -> Value:
    *tensors, scale = node.args
    q, k, v, key_cache, value_cache, past = (importer.env[tensor] for tensor in tensors)
    operands = [q, k, v, key_cache, value_cache, past, relax.prim_value(scale)]
    # The kernel writes the caches in place, so the new ones are the old ones; `module.check` has made sure that nobody
    # else reads them.
    out = _emit_kernel(importer, "hikui_attention", operands, [_like(q)])
    return relax.Tuple([out, key_cache, value_cache])


def _cache_kernel(name: str, codes: Value) -> str:
    """The kernel for a quantised cache, by the type of its codes."""
    return f"hikui_{name}_{cache_format(getattr(torch, str(codes.ty.dtype)))}"


def _attention_quantized(node: fx.Node, importer: Importer) -> Value:
    *tensors, scale = node.args
    q, k, v, *caches, past = (importer.env[tensor] for tensor in tensors)
    operands = [q, k, v, *caches, past, relax.prim_value(scale)]
    out = _emit_kernel(importer, _cache_kernel("attention", caches[0]), operands, [_like(q)])
    return relax.Tuple([out, *caches])


def _cache_update_quantized(node: fx.Node, importer: Importer) -> Value:
    codes, scale, new, past = (importer.env[argument] for argument in node.args)
    shape = [*_shape(codes)[:3], _shape(new)[3]]
    operands = [codes, scale, new, past]
    # In place, as in `_attention`; the values read are what orders the call.
    values = _emit_kernel(importer, _cache_kernel("cache_update", codes), operands, [relax.TensorType(shape, _FLOAT)])
    return relax.Tuple([values, codes, scale])


def _cache_update(node: fx.Node, importer: Importer) -> Value:
    cache, new, past = (importer.env[argument] for argument in node.args)
    _, heads, context, size = (int(extent) for extent in cache.ty.shape)
    function = importer.block_builder.add_func(tir.cache_update(heads, context, size), "cache_update")
    call = relax.op.call_tir_inplace(function, [cache, new, past], [0], [_like(cache)])
    return importer.block_builder.emit(call)


def _embedding(node: fx.Node, importer: Importer) -> Value:
    """Rows of a table. The runners check the ids; a packed table's kernel refuses others, a float one clips them."""
    if node.target is torch.ops.hikui.embedding.default:
        return _packed_embedding(node, importer)
    weight, tokens = importer.env[node.args[0]], importer.env[node.args[1]]
    return importer.block_builder.emit(relax.op.take(weight, tokens, axis=0, mode="clip"))


def _packed_embedding(node: fx.Node, importer: Importer) -> Value:
    ids, weight, scale, format_name, rows, columns = node.args
    fmt, env = Format.parse(str(format_name)), importer.env
    y = relax.TensorType([*_shape(env[ids]), columns], _FLOAT)
    operands = [env[ids], env[weight], *([env[scale]] if fmt.is_integer else []), relax.prim_value(rows)]
    return _emit_kernel(importer, f"hikui_embedding_{fmt.kind}", operands, [y])


def _index_select(node: fx.Node, importer: Importer) -> Value:
    """Columns in another order. The order is a permutation; without clipping TVM warns at every call."""
    x, axis, order = node.args
    return importer.block_builder.emit(relax.op.take(importer.env[x], importer.env[order], axis=axis, mode="clip"))


def _select(node: fx.Node, importer: Importer) -> Value:
    x, axis, at = node.args
    return importer.block_builder.emit(relax.op.take(importer.env[x], relax.const(at, "int64"), axis=axis, mode="wrap"))


def _index(node: fx.Node, importer: Importer) -> Value:
    """Elements that tensors of indices name; as in torch, negative ones count from the end."""
    data, indices = node.args
    emit = importer.block_builder.emit
    given: dict[int, fx.Node] = {axis: index for axis, index in enumerate(indices) if index is not None}  # type: ignore
    if any(index.meta["val"].dtype == torch.bool for index in given.values()):
        raise HikuiError(
            f"Node '{node.name}' chooses by truth values, whose number is not known beforehand; the tvm backend cannot "
            "express it."
        )
    if len(given) == 1:
        axis, index = given.popitem()
        return emit(relax.op.take(importer.env[data], importer.env[index], axis=axis, mode="wrap"))
    if len(given) < len(indices):  # type: ignore[arg-type]
        raise HikuiError(
            f"Node '{node.name}' indexes some dimensions together and leaves others, which the tvm backend cannot "
            "express; lower with --backend onnxruntime."
        )
    sizes = _shape(importer.env[data])
    wrapped = []
    for axis, index in given.items():
        value = importer.env[index]
        zero, size = (relax.const(number, str(value.ty.dtype)) for number in (0, int(sizes[axis])))
        behind = emit(relax.op.add(value, size))
        wrapped.append(emit(relax.op.where(emit(relax.op.less(value, zero)), behind, value)))
    return emit(relax.op.index_tensor(importer.env[data], wrapped))


def _repeat_interleave(node: fx.Node, importer: Importer) -> Value:
    """Each element several times over; the number is one for all."""
    x, times = node.args[:2]
    axis = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
    if not isinstance(times, int):
        raise HikuiError(
            f"Node '{node.name}' repeats by a number that is not fixed; the tvm backend cannot express it."
        )
    return importer.block_builder.emit(relax.op.repeat(importer.env[x], times, axis))


def _layer_norm(node: fx.Node, importer: Importer) -> Value:
    """Without weight, bias or both too."""
    x: Any
    shape: Any
    x, shape, weight, bias, eps = (*node.args, *(None, None, 1e-5)[max(0, len(node.args) - 2) :])[:5]
    size = [int(extent) for extent in shape]
    operands = [
        relax.const(np.full(size, default, np.float32)) if operand is None else importer.env[operand]
        for operand, default in ((weight, 1.0), (bias, 0.0))
    ]
    axes = list(range(-len(size), 0))
    return importer.block_builder.emit(relax.op.nn.layer_norm(importer.env[x], *operands, axes=axes, epsilon=eps))


def _power(node: fx.Node, importer: Importer) -> Value:
    """Small whole powers are products, which LLVM turns into vectors; a call of pow it does not."""
    x, exponent = importer.env[node.args[0]], node.args[1]
    if exponent in (2, 3):
        square = importer.block_builder.emit(relax.op.multiply(x, x))
        return square if exponent == 2 else importer.block_builder.emit(relax.op.multiply(square, x))
    return importer.block_builder.emit(relax.op.power(x, relax.const(exponent, _FLOAT)))


def attention_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of `aten::scaled_dot_product_attention`, by name."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _scaled_dot_product_attention(node: fx.Node, importer: Importer) -> Value:
    """Attention over a whole cache under a mask; unlike TVM's own translation it heeds `scale` and copies no cache."""
    arguments = attention_arguments(node)
    q, k, v = (importer.env[arguments[name]] for name in ("query", "key", "value"))
    _, heads, tokens, size = _shape(q)
    _, kv_heads, context, _ = (int(extent) for extent in _shape(k))
    scale = arguments.get("scale")
    scale = int(size) ** -0.5 if scale is None else float(scale)
    builder = importer.block_builder
    scores = builder.add_func(tir.attention_scores(int(heads), kv_heads, context, int(size), scale), "attention_scores")
    values = builder.add_func(tir.attention_values(int(heads), kv_heads, context, int(size)), "attention_values")
    s = builder.emit(relax.call_tir(scores, [q, k], relax.TensorType([1, heads, tokens, context], _FLOAT)))
    s = builder.emit(relax.op.add(s, importer.env[arguments["attn_mask"]]))
    p = builder.emit(relax.op.nn.softmax(s, axis=-1))
    return builder.emit(relax.call_tir(values, [p, v], _like(q)))


def _causal_mask(node: fx.Node, importer: Importer) -> Value:
    past, tokens, context = node.args
    count = importer.env[tokens] if isinstance(tokens, fx.Node) else tokens

    def mask(at: te.Tensor) -> te.Tensor:
        return te.compute(
            (1, 1, count, context),
            lambda _a, _b, row, column: tirx.if_then_else(
                column <= at[0] + row, tirx.const(0.0, _FLOAT), tirx.min_value(_FLOAT) * tirx.const(2.0, _FLOAT)
            ),
            name="causal_mask",
        )

    return importer.block_builder.emit_te(mask, importer.env[past], primfunc_name_hint="causal_mask")


CONVERTERS: dict[str, Converter] = {
    "attention.default": _attention,
    "attention_quantized.default": _attention_quantized,
    "cache_update.default": _cache_update,
    "cache_update_quantized.default": _cache_update_quantized,
    "causal_mask.default": _causal_mask,
    "embedding.default": _embedding,
    "index.Tensor": _index,
    "index_select.default": _index_select,
    "layer_norm.default": _layer_norm,
    "linear.default": _linear,
    "linear_a8.default": _linear_a8,
    "linear_a8_branch.default": _linear_a8,
    "pow.Tensor_Scalar": _power,
    "quantize_activation.default": _quantize_activation,
    "quantize_activation_int4.default": _quantize_activation,
    "quantize_activation_static.default": _quantize_activation,
    "repeat_interleave.self_int": _repeat_interleave,
    "reshape.default": _reshape,
    "rms_norm.default": _rms_norm,
    "rms_norm_quantize.default": _rms_norm,
    "rotary.default": _rotary,
    "scaled_dot_product_attention.default": _scaled_dot_product_attention,
    "select.int": _select,
    "swiglu.default": _swiglu,
    "swiglu_quantize.default": _swiglu,
}
