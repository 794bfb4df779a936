"""The operators of libhikui_ops.so, each alone in a model, against the reference kernels of the dialect."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from hikui.backends.onnxruntime import schemas
from hikui.lowering import formats
from hikui.lowering.artefact import elf
from hikui.lowering.formats import Format, Packed, pack

from .onnxruntime_support import Array, host_library, relative_error, run, session

ops = torch.ops.hikui


def single(
    operator: str,
    inputs: Mapping[str, Tensor | None],
    constants: Mapping[str, Tensor],
    outputs: int = 1,
    **attributes: Any,
) -> tuple[ir.Model, dict[str, Array]]:
    """A model of one operator whose inputs keep their order; the axis before an input's last one is symbolic."""
    values: dict[str, ir.Value | None] = {}
    for name, tensor in inputs.items():
        if tensor is None:
            values[name] = None
            continue
        shape: list[int | str] = list(tensor.shape)
        if name not in constants and len(shape) > 1:
            shape[-2] = "T"
        dtype = ir.DataType.from_numpy(tensor.numpy().dtype)
        values[name] = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
    for name, tensor in constants.items():
        value = values[name]
        assert value is not None
        value.const_value = ir.tensor(tensor.numpy(), name=name)
    node = ir.node(operator, list(values.values()), attributes, domain=schemas.DOMAIN, num_outputs=outputs)
    for index, output in enumerate(node.outputs):
        output.name = f"out{index}"
    fed = [value for name, value in values.items() if value is not None and name not in constants]
    graph = ir.Graph(
        fed,
        node.outputs,
        nodes=[node],
        initializers=[value for name in constants if (value := values[name]) is not None],
        opset_imports={"": 21, schemas.DOMAIN: 1},
        name="single",
    )
    feed = {str(value.name): inputs[str(value.name)] for value in fed}
    return ir.Model(graph, ir_version=10), {name: tensor.numpy() for name, tensor in feed.items() if tensor is not None}


def close(found: Array, wanted: Tensor, tolerance: float = 3e-6) -> None:
    assert relative_error(found, wanted.numpy()) < tolerance


def quantised_equal(found: list[Array], wanted: tuple[Tensor, Tensor, Tensor]) -> None:
    """q and sums may differ by one where a value lies within rounding of a half."""
    q, _, sums = (tensor.numpy() for tensor in wanted)
    assert found[0].dtype == np.int8
    assert np.abs(found[0].astype(int) - q).max() <= 1
    assert np.mean(found[0] != q) < 0.01
    close(found[1], wanted[1])
    np.testing.assert_array_equal(found[2], found[0].reshape(*sums.shape, 32).astype(np.int32).sum(-1))


@pytest.fixture(name="random")
def _random() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def weights(fmt: Format, n: int, k: int, random: torch.Generator) -> Packed:
    if not fmt.is_integer:
        return pack(fmt, torch.randn(n, k, generator=random))
    codes = []
    for part in fmt.segments(k):
        levels = torch.tensor(part.format.levels)
        codes.append(levels[torch.randint(0, len(levels), (n, part.stop - part.start), generator=random)])
    return pack(fmt, torch.cat(codes, 1), torch.rand(n, fmt.groups(k), generator=random) + 0.1)


OTHERS = ["sign-g32", "int2-g64", "ternary-channel", "int3-g32", "nf4-g64", "fp4-channel", "mixed-g32-c32"]
SHAPES = [(1, 1, 16, 32), (1, 7, 37, 100), (1, 5, 50, 172), (2, 3, 33, 260)]


@pytest.mark.parametrize(("batch", "tokens", "n", "k"), SHAPES)
@pytest.mark.parametrize("kind", ["int4-g32", "int4-channel", "int8-g64", *OTHERS])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_linear_a8(kind: str, bias: bool, batch: int, tokens: int, n: int, k: int, random: torch.Generator) -> None:
    fmt = Format.parse(kind)
    packed = weights(fmt, n, k, random)
    assert packed.scale is not None
    q, scale, sums = formats.quantize_activation(torch.randn(batch, tokens, k, generator=random))
    added = torch.randn(n, generator=random) if bias else None
    constants = {"weight": packed.weight, "scale": packed.scale} | ({"bias": added} if added is not None else {})
    model, feed = single(
        schemas.product("LinearA8", fmt.kind),
        {"q": q, "q_scale": scale, "q_sums": sums, "weight": packed.weight, "scale": packed.scale, "bias": added},
        constants,
        out_features=n,
    )
    close(run(model, feed)[0], ops.linear_a8(q, scale, sums, packed.weight, packed.scale, added, kind, n))


@pytest.mark.parametrize("kind", ["int4-g64", "int8-g32", *OTHERS])
@pytest.mark.parametrize("tokens", [1, 6])
def test_linear_a8_branch(kind: str, tokens: int, random: torch.Generator) -> None:
    n, k, rank, fmt = 45, 130, 5, Format.parse(kind)
    packed, half = weights(fmt, n, k, random), Format.parse("float16")
    assert packed.scale is not None
    x = torch.randn(1, tokens, k, generator=random)
    a, b = weights(half, rank, k, random).weight, weights(half, n, rank, random).weight
    q, scale, sums = formats.quantize_activation(x)
    inputs = {
        "q": q, "q_scale": scale, "q_sums": sums, "weight": packed.weight, "scale": packed.scale, "bias": None,
        "x": x, "a": a, "b": b,
    }  # fmt: skip
    constants = {"weight": packed.weight, "scale": packed.scale, "a": a, "b": b}
    model, feed = single(schemas.product("LinearA8Branch", fmt.kind), inputs, constants, out_features=n)
    wanted = ops.linear_a8_branch(q, scale, sums, packed.weight, packed.scale, None, x, a, b, kind, n)
    close(run(model, feed)[0], wanted)


@pytest.mark.parametrize(("batch", "tokens", "n", "k"), SHAPES)
@pytest.mark.parametrize("kind", ["int4-g32", "int8-channel", *OTHERS])
def test_weight_only(kind: str, batch: int, tokens: int, n: int, k: int, random: torch.Generator) -> None:
    fmt, bias = Format.parse(kind), torch.randn(n, generator=random)
    packed = weights(fmt, n, k, random)
    assert packed.scale is not None
    x = torch.randn(batch, tokens, k, generator=random)
    model, feed = single(
        schemas.product("Linear", fmt.kind),
        {"x": x, "weight": packed.weight, "scale": packed.scale, "bias": bias},
        {"weight": packed.weight, "scale": packed.scale, "bias": bias},
        out_features=n,
    )
    close(run(model, feed)[0], ops.linear(x, packed.weight, packed.scale, bias, kind, n))


@pytest.mark.parametrize(("batch", "tokens", "n", "k"), SHAPES)
@pytest.mark.parametrize("kind", ["float16", "float32"])
def test_linear_float(kind: str, batch: int, tokens: int, n: int, k: int, random: torch.Generator) -> None:
    weight, bias = weights(Format.parse(kind), n, k, random).weight, torch.randn(n, generator=random)
    x = torch.randn(batch, tokens, k, generator=random)
    model, feed = single(
        f"Linear{kind.capitalize()}",
        {"x": x, "weight": weight, "bias": bias},
        {"weight": weight, "bias": bias},
        out_features=n,
    )
    close(run(model, feed)[0], ops.linear(x, weight, None, bias, kind, n))


@pytest.mark.parametrize("kind", ["int4-g32", "int8-channel", *OTHERS[:-1], "float16", "float32"])
@pytest.mark.parametrize("tokens", [1, 6])
def test_embedding(kind: str, tokens: int, random: torch.Generator) -> None:
    rows, columns, fmt = 37, 100, Format.parse(kind)
    packed = weights(fmt, rows, columns, random)
    ids = torch.randint(0, rows, (1, tokens), generator=random)
    ids[0, 0] = rows - 1
    constants = {"weight": packed.weight} | ({} if packed.scale is None else {"scale": packed.scale})
    operator = schemas.product("Embedding", fmt.kind)
    model, feed = single(operator, {"ids": ids, **constants}, constants, rows=rows, out_features=columns)
    (found,) = run(model, feed)
    np.testing.assert_array_equal(found, ops.embedding(ids, packed.weight, packed.scale, kind, rows, columns).numpy())
    for wrong in (-1, rows):
        with pytest.raises(Exception, match=rf"id {wrong} is none of the 37 rows"):
            run(model, {"ids": np.full((1, tokens), wrong)})


@pytest.mark.parametrize(("tokens", "k"), [(1, 128), (4, 100), (3, 1)])
def test_quantisers(tokens: int, k: int, random: torch.Generator) -> None:
    x, up = torch.randn(1, tokens, k, generator=random), torch.randn(1, tokens, k, generator=random)
    x[0, 1:2] = 0
    model, feed = single("QuantizeActivation", {"x": x}, {}, outputs=3)
    quantised_equal(run(model, feed), formats.quantize_activation(x))

    model, feed = single("QuantizeActivationInt4", {"x": x}, {}, outputs=3)
    quantised_equal(run(model, feed), formats.quantize_activation(x, bits=4))
    step = torch.tensor([0.01])
    model, feed = single("QuantizeActivationStatic", {"x": x, "step": step}, {"step": step}, outputs=3)
    quantised_equal(run(model, feed), formats.quantize_activation_static(x, step))

    model, feed = single("SwiGluQuantize", {"gate": x, "up": up}, {}, outputs=4)
    found = run(model, feed)
    close(found[0], ops.swiglu(x, up))
    quantised_equal(found[1:], formats.quantize_activation(torch.from_numpy(found[0])))

    weight = torch.randn(k, generator=random)
    model, feed = single("RmsNormQuantize", {"x": x, "weight": weight}, {"weight": weight}, outputs=4, eps=1e-5)
    found = run(model, feed)
    close(found[0], ops.rms_norm(x, weight, 1e-5))
    quantised_equal(found[1:], formats.quantize_activation(torch.from_numpy(found[0])))


@pytest.mark.parametrize("tokens", [1, 5])
def test_float_operators(tokens: int, random: torch.Generator) -> None:
    x, up = torch.randn(1, tokens, 45, generator=random), torch.randn(1, tokens, 45, generator=random)
    close(run(*single("SwiGlu", {"gate": x, "up": up}, {}))[0], ops.swiglu(x, up))
    weight = torch.randn(45, generator=random)
    close(
        run(*single("RmsNorm", {"x": x, "weight": weight}, {"weight": weight}, eps=0.1))[0],
        ops.rms_norm(x, weight, 0.1),
    )
    heads = torch.randn(1, 3, tokens, 10, generator=random)
    angle = torch.randn(1, tokens, 5, generator=random).repeat(1, 1, 2)
    inputs = {"x": heads, "cos": angle.cos(), "sin": angle.sin()}
    close(run(*single("Rotary", inputs, {}))[0], ops.rotary(heads, angle.cos(), angle.sin()))


@pytest.mark.parametrize(("tokens", "past"), [(1, 0), (1, 9), (4, 0), (5, 3)])
def test_attention(tokens: int, past: int, random: torch.Generator) -> None:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    caches = {name: normal(1, 2, 10, 6) for name in ("key_cache", "value_cache")}
    operands = {"q": normal(1, 4, tokens, 6), "k": normal(1, 2, tokens, 6), "v": normal(1, 2, tokens, 6)}
    model, feed = single("Attention", {**operands, **caches, "past": torch.tensor([past])}, {}, outputs=3, scale=0.4)
    wanted = ops.attention(*operands.values(), *caches.values(), torch.tensor([past]), 0.4)
    for found, tensor in zip(run(model, feed), wanted, strict=True):
        close(found, tensor)
    np.testing.assert_array_equal(
        feed["key_cache"], caches["key_cache"].numpy(), "inputs are not outputs unless bound so"
    )


@pytest.mark.parametrize("fmt", ["int8", "int4"])
@pytest.mark.parametrize(("tokens", "past"), [(1, 0), (1, 9), (4, 0), (5, 3)])
def test_quantised_caches(fmt: str, tokens: int, past: int, random: torch.Generator) -> None:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    (keys, key_scale), (values, value_scale) = (formats.quantize_cache(normal(1, 2, 10, 6), fmt) for _ in range(2))
    caches = {"key_cache": keys, "value_cache": values, "key_scale": key_scale, "value_scale": value_scale}
    operands = {"q": normal(1, 4, tokens, 6), "k": normal(1, 2, tokens, 6), "v": normal(1, 2, tokens, 6)}
    position, kind = torch.tensor([past]), fmt.capitalize()
    model, feed = single(f"Attention{kind}", {**operands, **caches, "past": position}, {}, outputs=5, scale=0.4)
    out, *written = run(model, feed)
    wanted, *kept = ops.attention_quantized(*operands.values(), *caches.values(), position, 0.4)
    close(out, wanted)
    for found, tensor in zip(written, kept, strict=True):
        np.testing.assert_array_equal(found, tensor.numpy())
    np.testing.assert_array_equal(feed["key_cache"], keys.numpy(), "inputs are not outputs unless bound so")

    inputs = {"codes": keys, "scale": key_scale, "new": operands["k"], "past": position}
    model, feed = single(f"CacheUpdate{kind}", inputs, {}, outputs=3)
    for found, tensor in zip(run(model, feed), ops.cache_update_quantized(*inputs.values()), strict=True):
        np.testing.assert_array_equal(found, tensor.numpy())


def test_the_sessions_threads_give_the_same_numbers(random: torch.Generator) -> None:
    n, k = 2048, 512
    packed = weights(Format.parse("int4-g64"), n, k, random)
    assert packed.scale is not None
    q, scale, sums = formats.quantize_activation(torch.randn(1, 3, k, generator=random))
    inputs = {"q": q, "q_scale": scale, "q_sums": sums, "weight": packed.weight, "scale": packed.scale, "bias": None}
    constants = {"weight": packed.weight, "scale": packed.scale}
    model, feed = single("LinearA8Int4", inputs, constants, out_features=n)
    np.testing.assert_array_equal(run(model, feed, threads=3)[0], run(model, feed, threads=1)[0])


def test_shapes_are_inferred_with_their_symbols(random: torch.Generator) -> None:
    packed = weights(Format.parse("int8-g32"), 20, 40, random)
    assert packed.scale is not None
    q, scale, sums = formats.quantize_activation(torch.randn(1, 2, 40, generator=random))
    inputs = {"q": q, "q_scale": scale, "q_sums": sums, "weight": packed.weight, "scale": packed.scale, "bias": None}
    model, _ = single("LinearA8Int8", inputs, {"weight": packed.weight, "scale": packed.scale}, out_features=20)
    (output,) = session(model).get_outputs()
    assert (output.type, output.shape) == ("tensor(float)", [1, "T", 20])

    model, _ = single("QuantizeActivation", {"x": torch.zeros(1, 2, 40)}, {}, outputs=3)
    found = [(output.type, output.shape) for output in session(model).get_outputs()]
    assert found == [("tensor(int8)", [1, "T", 128]), ("tensor(float)", [1, "T"]), ("tensor(int32)", [1, "T", 4])]

    cache = torch.zeros(1, 2, 10, 6)
    operands = {"q": torch.zeros(1, 4, 1, 6), "k": torch.zeros(1, 2, 1, 6), "v": torch.zeros(1, 2, 1, 6)}
    attention = {**operands, "key_cache": cache, "value_cache": cache, "past": torch.tensor([0])}
    model, _ = single("Attention", attention, {}, outputs=3, scale=1.0)
    assert session(model).get_outputs()[0].shape == [1, 4, "T", 6]


def test_a_kernels_refusal_reaches_the_user(random: torch.Generator) -> None:
    weight = weights(Format.parse("float32"), 20, 40, random).weight
    x = torch.zeros(1, 2, 41)
    model, feed = single("LinearFloat32", {"x": x, "weight": weight, "bias": None}, {"weight": weight}, out_features=20)
    with pytest.raises(Exception, match=r"hikui_linear_float32: weight has 1280 elements where 1312 fit"):
        run(model, feed)


@pytest.mark.parametrize("kind", ["Sign", "Int2", "Ternary", "Int3", "Int4", "Nf4", "Fp4", "Int8", "Mixed"])
@pytest.mark.parametrize("form", ["LinearA8", "LinearA8Branch", "Linear"])
def test_a_weight_of_no_lines_in_a_model_is_refused(kind: str, form: str) -> None:
    weight = torch.zeros(2, 0, 16, 4, dtype=torch.int8 if kind == "Int8" else torch.uint8)
    x = {"x": torch.zeros(1, 2, 128)}
    inputs: dict[str, torch.Tensor | None] = (
        {**x}
        if form == "Linear"
        else {
            "q": torch.zeros(1, 2, 128, dtype=torch.int8),
            "q_scale": torch.zeros(1, 2),
            "q_sums": torch.zeros(1, 2, 4, dtype=torch.int32),
        }
    )
    inputs |= {"weight": weight, "scale": torch.zeros(2, 1, 16).half(), "bias": None}
    if form == "LinearA8Branch":
        inputs |= {**x, "a": torch.zeros(1, 128, 16).half(), "b": torch.zeros(2, 4, 16).half()}
    model, feed = single(f"{form}{kind}", inputs, {}, out_features=20)
    with pytest.raises(Exception, match="0 weight lines in 1 groups do not fit activations of 128"):
        run(model, feed)


@pytest.mark.parametrize("width", [0, -1, -(2**63), 2**59, 2**63 - 1])
def test_an_output_of_no_width_is_refused(width: int) -> None:
    weight = torch.zeros(2, 40, 16)
    model, _ = single(
        "LinearFloat32",
        {"x": torch.zeros(1, 2, 40), "weight": weight, "bias": None},
        {"weight": weight},
        out_features=width,
    )
    with pytest.raises(Exception, match="out_features must be a positive number"):
        session(model)


def test_an_attribute_that_is_missing_is_named(random: torch.Generator) -> None:
    weight = weights(Format.parse("float32"), 20, 40, random).weight
    model, _ = single("LinearFloat32", {"x": torch.zeros(1, 2, 40), "weight": weight, "bias": None}, {"weight": weight})
    with pytest.raises(Exception, match="out_features"):
        session(model)


def test_weights_of_another_type_are_refused(random: torch.Generator) -> None:
    weight = weights(Format.parse("float16"), 20, 40, random).weight
    inputs = {"x": torch.zeros(1, 2, 40), "weight": weight, "bias": None}
    model, _ = single("LinearFloat32", inputs, {"weight": weight}, out_features=20)
    with pytest.raises(Exception, match=r"tensor\(float16\)"):
        session(model)


def test_the_library_needs_only_an_old_libc() -> None:
    assert elf.read_elf(host_library()).glibc() <= (2, 17)
