"""The onnx-ir passes: what they make of a graph written by hand, that numbers stay, what they leave alone."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from hikui.backends.onnxruntime.attention_rotary import RotateInAttention
from hikui.backends.onnxruntime.group_query_attention import UseGroupQueryAttention
from hikui.backends.onnxruntime.normalization import (
    UseSimplifiedLayerNormalization,
    UseSkipSimplifiedLayerNormalization,
)

from .onnxruntime_support import Array, operators, relative_error, run

HEADER = '<ir_version: 10, opset_import: ["" : 21, "hikui" : 1, "com.microsoft" : 1]>'
CONTEXT, HEADS, KV_HEADS = 24, 4, 2


def model(body: str) -> ir.Model:
    """A model from ONNX text; shapes are inferred where ONNX can, as the exporter leaves them."""
    parsed = ir.from_onnx_text(f"{HEADER}\n{body}")
    shapes = {}
    for node in parsed.graph:
        if node.domain == "hikui" and node.op_type in ("Rotary", "Attention", "RmsNorm"):
            assert node.inputs[0] is not None
            shapes[node.outputs[0]] = node.inputs[0]
    for _ in range(len(shapes) + 1):
        ir.passes.common.ShapeInferencePass()(parsed)
        for made, like in shapes.items():
            made.shape, made.type = like.shape, like.type
    return parsed


def attention(size: int, *, rotary: bool = False, angles: str = "position") -> ir.Model:
    """The attention of one layer between its projections, as the exporter writes it."""
    width, kv_width = HEADS * size, KV_HEADS * size
    query, key = ("q_rotated", "k_rotated") if rotary else ("q_heads", "k_heads")
    rotation = f"""
        count = Shape <start = 1, end = 2> (tokens)
        length = Squeeze (count)
        steps = Range (zero, length, one)
        position = Add (past, steps)
        of_token = Squeeze (tokens, first)
        chosen = Identity ({"position" if angles == "position" else "of_token"})
        wide = Cast <to = 1> (chosen)
        column = Unsqueeze (wide, axes)
        angle = Mul (column, frequencies)
        both = Concat <axis = -1> (angle, angle)
        cos = Cos (both)
        sin = Sin (both)
        q_rotated = hikui.Rotary (q_heads, cos, sin)
        k_rotated = hikui.Rotary (k_heads, cos, sin)
    """
    frequencies = ", ".join(f"{10 ** (-2 * i / size):.6f}" for i in range(size // 2))
    return model(f"""
    layer (int64[1, T] tokens, int64[1] past, float[1, T, {width}] q, float[1, T, {kv_width}] k,
           float[1, T, {kv_width}] v,
           float[1, {KV_HEADS}, {CONTEXT}, {size}] key_cache, float[1, {KV_HEADS}, {CONTEXT}, {size}] value_cache)
        => (float[1, T, {width}] y, float[1, {KV_HEADS}, {CONTEXT}, {size}] new_key_cache,
            float[1, {KV_HEADS}, {CONTEXT}, {size}] new_value_cache)
    <int64 zero = {{0}}, int64 one = {{1}}, int64[1] first = {{0}}, int64[2] axes = {{0, 2}},
     float[{size // 2}] frequencies = {{{frequencies}}},
     int64[4] q_split = {{1, -1, {HEADS}, {size}}}, int64[4] kv_split = {{1, -1, {KV_HEADS}, {size}}},
     int64[3] merged = {{1, -1, {width}}}>
    {{
        q_rows = Reshape (q, q_split)
        k_rows = Reshape (k, kv_split)
        v_rows = Reshape (v, kv_split)
        q_heads = Transpose <perm = [0, 2, 1, 3]> (q_rows)
        k_heads = Transpose <perm = [0, 2, 1, 3]> (k_rows)
        v_heads = Transpose <perm = [0, 2, 1, 3]> (v_rows)
        {rotation if rotary else ""}
        out, new_key_cache, new_value_cache =
            hikui.Attention <scale = 0.3> ({query}, {key}, v_heads, key_cache, value_cache, past)
        out_rows = Transpose <perm = [0, 2, 1, 3]> (out)
        y = Reshape (out_rows, merged)
    }}
    """)


def attention_feed(size: int, tokens: int, past: int) -> dict[str, Array]:
    random = np.random.default_rng(size + tokens + past)

    def normal(*shape: int) -> Array:
        return random.standard_normal(shape).astype(np.float32)

    feed = {
        "tokens": random.integers(0, 9, (1, tokens)),
        "past": np.array([past]),
        "q": normal(1, tokens, HEADS * size),
        "k": normal(1, tokens, KV_HEADS * size),
        "v": normal(1, tokens, KV_HEADS * size),
    }
    for name in ("key_cache", "value_cache"):
        feed[name] = normal(1, KV_HEADS, CONTEXT, size)
        # Rows that hold nothing yet must not be read: anything that looks at them gives nan.
        feed[name][:, :, past:] = np.nan
    return feed


def agree(before: ir.Model, after: ir.Model, feed: dict[str, Array], tolerance: float = 3e-6) -> None:
    filled = int(feed["past"][0]) + feed["q"].shape[1]
    wanted, found = run(before, feed), run(after, feed)
    assert relative_error(found[0], wanted[0]) < tolerance
    for old, new in zip(wanted[1:], found[1:], strict=True):
        assert relative_error(new[:, :, :filled], old[:, :, :filled]) < tolerance


CASES = [(1, 0), (7, 0), (1, 11), (5, 9), (3, CONTEXT - 3)]


def test_attention_becomes_group_query_attention_without_transposes() -> None:
    changed = attention(16)
    assert UseGroupQueryAttention()(changed).modified
    ir.passes.common.RemoveUnusedNodesPass()(changed)
    assert operators(changed) == ["Shape", "Add", "Sub", "Cast", "Cast", "com.microsoft::GroupQueryAttention"]
    node = changed.graph[-1]
    assert [value.name for value in node.inputs[:5] if value is not None] == ["q", "k", "v", "key_cache", "value_cache"]
    assert node.attributes.get_int("num_heads") == HEADS
    assert node.attributes.get_int("kv_num_heads") == KV_HEADS
    assert node.attributes.get_float("scale") == pytest.approx(0.3)


@pytest.mark.parametrize(("tokens", "past"), CASES)
@pytest.mark.parametrize("size", [8, 16])
def test_group_query_attention_gives_the_same_numbers(size: int, tokens: int, past: int) -> None:
    changed = attention(size)
    UseGroupQueryAttention()(changed)
    agree(attention(size), changed, attention_feed(size, tokens, past))


def test_a_query_from_elsewhere_is_transposed() -> None:
    changed = attention(16, rotary=True)
    UseGroupQueryAttention()(changed)
    ir.passes.common.RemoveUnusedNodesPass()(changed)
    assert operators(changed).count("Transpose") == 4
    agree(attention(16, rotary=True), changed, attention_feed(16, 5, 9))


@pytest.mark.parametrize("size", [4, 12])
def test_a_head_size_that_onnxruntime_refuses_stays_with_our_kernel(size: int) -> None:
    unchanged = attention(size)
    assert not UseGroupQueryAttention()(unchanged).modified
    assert operators(unchanged) == operators(attention(size))


def rotating(size: int, angles: str = "position") -> tuple[ir.Model, bool]:
    changed = attention(size, rotary=True, angles=angles)
    UseGroupQueryAttention()(changed)
    modified = RotateInAttention(CONTEXT, _no_weight)(changed).modified
    ir.passes.common.RemoveUnusedNodesPass()(changed)
    return changed, modified


def _no_weight(name: str) -> Array:
    raise AssertionError(f"{name} is no weight of this model")


def test_rotary_moves_into_the_attention() -> None:
    changed, modified = rotating(16)
    assert modified
    assert operators(changed) == ["Shape", "Add", "Sub", "Cast", "Cast", "com.microsoft::GroupQueryAttention"]
    node = changed.graph[-1]
    assert node.attributes.get_int("do_rotary") == 1
    assert [str(value.shape) for value in node.inputs[7:] if value is not None] == [f"[{CONTEXT},8]"] * 2


@pytest.mark.parametrize(("tokens", "past"), CASES)
def test_rotary_in_the_attention_gives_the_same_numbers(tokens: int, past: int) -> None:
    agree(attention(16, rotary=True), rotating(16)[0], attention_feed(16, tokens, past))


@pytest.mark.parametrize(
    ("size", "angles"), [(24, "position"), (16, "token")], ids=["head size", "angles of the token"]
)
def test_rotary_stays_where_the_operator_cannot_do_it(size: int, angles: str) -> None:
    changed, modified = rotating(size, angles)
    assert not modified
    assert operators(changed).count("hikui::Rotary") == 2


NORM_INPUTS = "float[1, T, 20] x, float[1, T, 20] residual, float[20] weight, float[20] bias"


def norm(operator: str, outputs: str, addend: str = "residual") -> ir.Model:
    kinds = {"y": "float[1, T, 20]", "q": "int8[1, T, 128]", "scale": "float[1, T]", "sums": "int32[1, T, 4]"}
    results = ", ".join(f"{kinds[name]} {name}" for name in outputs.split(", "))
    return model(f"""
    norm ({NORM_INPUTS}) => (float[1, T, 20] total, {results})
    {{
        total = Add (x, {addend})
        {outputs} = hikui.{operator} <eps = 0.01> (total, weight)
    }}
    """)


def norm_feed(tokens: int) -> dict[str, Array]:
    random = np.random.default_rng(tokens)
    shapes = {"x": (1, tokens, 20), "residual": (1, tokens, 20), "weight": (20,), "bias": (20,)}
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


NORMS = [("RmsNorm", "y"), ("RmsNormQuantize", "y, q, scale, sums")]


@pytest.mark.parametrize(("operator", "outputs"), NORMS)
def test_a_norm_becomes_onnxruntimes(operator: str, outputs: str) -> None:
    changed = norm(operator, outputs)
    assert UseSimplifiedLayerNormalization()(changed).modified
    quantiser = ["hikui::QuantizeActivation"] if operator == "RmsNormQuantize" else []
    assert operators(changed) == ["Add", "SimplifiedLayerNormalization", *quantiser]
    assert [value.name for value in changed.graph.outputs] == ["total", *outputs.split(", ")]


@pytest.mark.parametrize(("operator", "outputs"), NORMS)
def test_an_addition_before_a_norm_is_taken_along(operator: str, outputs: str) -> None:
    changed = norm(operator, outputs)
    UseSimplifiedLayerNormalization()(changed)
    assert UseSkipSimplifiedLayerNormalization()(changed).modified
    assert operators(changed)[0] == "com.microsoft::SkipSimplifiedLayerNormalization"
    assert "Add" not in operators(changed)


def test_a_bias_before_a_norm_stays_an_addition() -> None:
    unchanged = norm("RmsNorm", "y", addend="bias")
    UseSimplifiedLayerNormalization()(unchanged)
    assert not UseSkipSimplifiedLayerNormalization()(unchanged).modified
    assert operators(unchanged) == ["Add", "SimplifiedLayerNormalization"]


PASSES: list[Callable[[], ir.passes.InPlacePass]] = [
    UseSimplifiedLayerNormalization,
    UseSkipSimplifiedLayerNormalization,
    UseGroupQueryAttention,
    lambda: RotateInAttention(CONTEXT, _no_weight),
]


@pytest.mark.parametrize("make", PASSES)
def test_a_graph_without_the_pattern_is_left_alone(make: Callable[[], ir.passes.InPlacePass]) -> None:
    unchanged = model("other (float[1, T, 20] x) => (float[1, T, 20] z) { y = Relu (x) z = Add (x, y) }")
    assert not make()(unchanged).modified
    assert operators(unchanged) == ["Relu", "Add"]


@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize(("operator", "outputs"), NORMS)
def test_norms_give_the_same_numbers(operator: str, outputs: str, tokens: int) -> None:
    changed = norm(operator, outputs)
    UseSimplifiedLayerNormalization()(changed)
    UseSkipSimplifiedLayerNormalization()(changed)
    wanted, found = run(norm(operator, outputs), norm_feed(tokens)), run(changed, norm_feed(tokens))
    for name, old, new in zip(("total", *outputs.split(", ")), wanted, found, strict=True):
        if name in ("q", "sums"):
            # A value within rounding of a half may fall to either side.
            assert np.abs(old.astype(int) - new).max() <= 1, name
        else:
            assert relative_error(new, old) < 1e-6, name
