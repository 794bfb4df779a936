"""ONNX nodes with operands of any shape are refused or run; a signal would end the test run."""

from contextlib import suppress

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.backends.onnxruntime_support import run
from tests.backends.test_onnxruntime_ops import single

from .factor import FACTOR

SIZE = st.sampled_from([0, 1, 2, 3, 4, 15, 16, 17, 32, 33, 64, 128, 129, 256])
SHAPE = st.lists(SIZE, min_size=0, max_size=4)
KINDS = ("Sign", "Int2", "Ternary", "Int3", "Int4", "Nf4", "Fp4", "Int8", "Mixed")
WIDTH = st.sampled_from([-1, 0, 1, 15, 16, 17, 32, 2**31, 2**59, 2**63 - 1])
LARGEST = 1 << 16
"""Elements of one operand: hostile are the shapes, not their size."""


def zeros(shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    while torch.Size(shape).numel() > LARGEST:
        shape = shape[:-1]
    return torch.zeros(shape, dtype=dtype)


@settings(
    max_examples=150 * FACTOR, deadline=None, derandomize=FACTOR == 1,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
@given(st.sampled_from(KINDS), st.sampled_from(["LinearA8", "LinearA8Branch", "Linear"]), WIDTH, st.data())
def test_products_of_any_shapes(kind: str, form: str, width: int, data: st.DataObject) -> None:
    def operand(dtype: torch.dtype, likely: list[int]) -> torch.Tensor:
        return zeros(data.draw(st.one_of(st.just(likely), SHAPE)), dtype)

    x = {"x": operand(torch.float32, [1, 2, 128])}
    inputs: dict[str, torch.Tensor | None] = {**x}
    if form != "Linear":
        inputs = {
            "q": operand(torch.int8, [1, 2, 128]),
            "q_scale": operand(torch.float32, [1, 2]),
            "q_sums": operand(torch.int32, [1, 2, 4]),
        }
    lines = data.draw(SIZE)
    inputs["weight"] = operand(torch.int8 if kind == "Int8" else torch.uint8, [2, lines, 16, 4])
    inputs["scale"] = operand(torch.float16, [2, data.draw(SIZE), 16])
    inputs["bias"] = data.draw(st.sampled_from([None, zeros([17], torch.float32), zeros([0], torch.float32)]))
    if form == "LinearA8Branch":
        inputs |= {**x, "a": operand(torch.float16, [1, 128, 16]), "b": operand(torch.float16, [2, 4, 16])}
    # ONNX Runtime raises a class of its own for each status; what counts is that it is an error and no signal.
    with suppress(Exception):
        model, feed = single(f"{form}{kind}", inputs, {}, out_features=width)
        run(model, feed)


@pytest.mark.parametrize("kind", KINDS)
def test_the_usual_shapes_run(kind: str) -> None:
    """What the shapes above are drawn around is really taken, so that not everything is refused for one reason."""
    from hikui.lowering.formats import Format

    fmt = Format.parse("mixed-g32-c32" if kind == "Mixed" else f"{kind.lower()}-g32")
    weight = torch.zeros(fmt.weight_shape(17, 128), dtype=fmt.weight_dtype)
    scale = fmt.scale_shape(17, 128)
    assert scale is not None
    inputs = {"x": torch.zeros(1, 2, 128), "weight": weight, "scale": torch.zeros(scale).half(), "bias": None}
    extra = {"int4_columns": 32} if kind == "Mixed" else {}
    model, feed = single(f"Linear{kind}", inputs, {}, out_features=17, **extra)
    assert run(model, feed)[0].shape == (1, 2, 17)
