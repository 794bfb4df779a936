"""From the program to an ONNX model, one operator of the dialect at a time.

torch's exporter lowers the aten operators; each `hikui::` operator becomes its namesake in the ONNX domain `hikui`, or
standard ONNX where there is no kernel for it. Weights never reach the exporter: they are graph inputs there, and turn
into initialisers that point into the external data file.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset18
from onnxscript.values import Opset

from hikui.backends.onnxruntime import schemas
from hikui.lowering.errors import HikuiError
from hikui.lowering.formats import Format
from hikui.lowering.ir.program import Program

OPSET = 21
"""The newest operator set that ONNX Runtime 1.18, the floor, reads."""

TOKENS = "T"
"""The name of the symbolic token count in the model."""

# Translations run inside the exporter's own evaluator, whose values have none of the types that opset18 declares.
op: Any = opset18
_hikui = Opset(schemas.DOMAIN, schemas.VERSION)
_LAST = 2**63 - 1

_Value = Any


def _causal_mask(past: _Value, tokens: _Value, context: int) -> _Value:
    rows = op.Add(past, op.Range(op.Constant(value_int=0), tokens, op.Constant(value_int=1)))
    columns = op.Constant(value_ints=list(range(context)))
    hidden = op.Greater(op.Unsqueeze(columns, [0]), op.Unsqueeze(rows, [1]))
    mask = op.Where(hidden, op.Constant(value_float=float("-inf")), op.Constant(value_float=0.0))
    return op.Unsqueeze(mask, [0, 1])


def _cache_update(cache: _Value, new: _Value, past: _Value) -> _Value:
    end = op.Add(past, op.Shape(new, start=2, end=3))
    axis = op.Constant(value_ints=[2])
    before = op.Slice(cache, op.Constant(value_ints=[0]), past, axis)
    after = op.Slice(cache, end, op.Constant(value_ints=[_LAST]), axis)
    return op.Concat(before, new, after, axis=2)


def _product(form: str, format: str) -> Any:
    return getattr(_hikui, schemas.product(form, Format.parse(format).kind))


def _linear(
    x: _Value, weight: _Value, scale: _Value | None, bias: _Value | None, format: str, out_features: int
) -> _Value:
    scales = (scale,) if Format.parse(format).is_integer else ()
    return _product("Linear", format)(x, weight, *scales, bias, out_features=out_features)


def _linear_a8(
    q: _Value,
    q_scale: _Value,
    q_sums: _Value,
    weight: _Value,
    scale: _Value,
    bias: _Value | None,
    format: str,
    out: int,
) -> _Value:
    return _product("LinearA8", format)(q, q_scale, q_sums, weight, scale, bias, out_features=out)


def _linear_a8_branch(
    q: _Value, q_scale: _Value, q_sums: _Value, weight: _Value, scale: _Value, bias: _Value | None,
    x: _Value, a: _Value, b: _Value, format: str, out: int,
) -> _Value:  # fmt: skip
    return _product("LinearA8Branch", format)(q, q_scale, q_sums, weight, scale, bias, x, a, b, out_features=out)


def _embedding(ids: _Value, weight: _Value, scale: _Value | None, format: str, rows: int, columns: int) -> _Value:
    scales = (scale,) if Format.parse(format).is_integer else ()
    return _product("Embedding", format)(ids, weight, *scales, rows=rows, out_features=columns)


def _rms_norm(x: _Value, weight: _Value, eps: float) -> _Value:
    return _hikui.RmsNorm(x, weight, eps=eps)


def _rms_norm_quantize(x: _Value, weight: _Value, eps: float) -> _Value:
    return _hikui.RmsNormQuantize(x, weight, eps=eps)


def _attention(
    q: _Value, k: _Value, v: _Value, key_cache: _Value, value_cache: _Value, past: _Value, scale: float
) -> _Value:
    return _hikui.Attention(q, k, v, key_cache, value_cache, past, scale=scale)


def _over_cache(operator: str, codes: _Value) -> Any:
    """The operator for a quantised cache, by the type of its codes."""
    kind = {ir.DataType.INT8: "Int8", ir.DataType.UINT8: "Int4"}[codes.dtype]
    return getattr(_hikui, operator + kind)


def _attention_quantized(
    q: _Value, k: _Value, v: _Value, key_cache: _Value, value_cache: _Value, key_scale: _Value, value_scale: _Value,
    past: _Value, scale: float,
) -> _Value:  # fmt: skip
    operands = (q, k, v, key_cache, value_cache, key_scale, value_scale, past)
    return _over_cache("Attention", key_cache)(*operands, scale=scale)


def _cache_update_quantized(codes: _Value, scale: _Value, new: _Value, past: _Value) -> _Value:
    return _over_cache("CacheUpdate", codes)(codes, scale, new, past)


def _quantize_activation(x: _Value) -> _Value:
    return _hikui.QuantizeActivation(x)


def _quantize_activation_int4(x: _Value) -> _Value:
    return _hikui.QuantizeActivationInt4(x)


def _quantize_activation_static(x: _Value, step: _Value) -> _Value:
    return _hikui.QuantizeActivationStatic(x, step)


def _swiglu(gate: _Value, up: _Value) -> _Value:
    return _hikui.SwiGlu(gate, up)


def _swiglu_quantize(gate: _Value, up: _Value) -> _Value:
    return _hikui.SwiGluQuantize(gate, up)


def _rotary(x: _Value, cos: _Value, sin: _Value) -> _Value:
    return _hikui.Rotary(x, cos, sin)


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    ops = torch.ops.hikui
    return {
        ops.attention.default: _attention,
        ops.attention_quantized.default: _attention_quantized,
        ops.cache_update.default: _cache_update,
        ops.cache_update_quantized.default: _cache_update_quantized,
        ops.causal_mask.default: _causal_mask,
        ops.embedding.default: _embedding,
        ops.linear.default: _linear,
        ops.linear_a8.default: _linear_a8,
        ops.linear_a8_branch.default: _linear_a8_branch,
        ops.quantize_activation.default: _quantize_activation,
        ops.quantize_activation_int4.default: _quantize_activation_int4,
        ops.quantize_activation_static.default: _quantize_activation_static,
        ops.rms_norm.default: _rms_norm,
        ops.rms_norm_quantize.default: _rms_norm_quantize,
        ops.rotary.default: _rotary,
        ops.swiglu.default: _swiglu,
        ops.swiglu_quantize.default: _swiglu_quantize,
    }


@contextlib.contextmanager
def _quiet_exporter() -> Any:
    """Keeps the exporter's remarks on packages that hikui does not use off the terminal."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _name_values(model: ir.Model, program: Program) -> list[ir.Value]:
    """Gives inputs and outputs the names of the calling convention; returns the inputs that stand for weights."""
    graph = model.graph
    caches = [tensor.kind for tensor in program.config.cache_tensors()]
    weights = list(graph.inputs[: len(program.weight_nodes())])
    inputs = list(graph.inputs[len(weights) :])
    for value, name in zip(inputs, ["tokens", "past", *caches], strict=True):
        value.name = name
    for value, name in zip(graph.outputs, ["logits", *(f"new_{cache}" for cache in caches)], strict=True):
        value.name = name
    # torch names the symbol of the token count after its own counters.
    shape = inputs[0].shape
    assert shape is not None, "the exporter keeps input shapes"
    symbol = shape[1]
    for value in (*inputs, *(output for node in graph for output in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape(
                [TOKENS if dim == symbol and not isinstance(dim, int) else dim for dim in value.shape]
            )
    return weights


def to_onnx(program: Program) -> tuple[ir.Model, dict[str, ir.Value]]:
    """Translates a program.

    Returns:
        The model, whose graph inputs are tokens, past and the caches and whose weights are values without data, and
        those values under their keys in the store, in graph order.

    Raises:
        HikuiError: a node has no translation.
    """
    schemas.register()
    try:
        with _quiet_exporter():
            exported = torch.onnx.export(
                program.to_exported_program(),
                custom_translation_table=_translations(),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise HikuiError(f"The onnxruntime backend cannot translate the program: {reason}") from error
    assert exported is not None, "the exporter returns a program when it is given no file"
    model = exported.model
    values = _name_values(model, program)
    model.graph.inputs[:] = model.graph.inputs[len(values) :]
    weights: dict[str, ir.Value] = {}
    for node, value in zip(program.weight_nodes(), values, strict=True):
        key = program.weight_of(node)
        first = weights.setdefault(key, value)
        if first is not value:
            ir.convenience.replace_all_uses_with(value, first)
    for key, value in weights.items():
        value.name = key
    model.producer_name, model.producer_version = "hikui", ""
    return model, weights
