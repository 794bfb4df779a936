"""Quantised caches: their numbers, their layout, their bytes."""

import math

import pytest
import torch

import hikui.lowering.ir.dialect  # noqa: F401
from hikui.lowering.formats import CODE_TYPES, cache_format, dequantize_cache, quantize_cache
from hikui.lowering.ir.cache_shape import CACHE_FORMATS, CacheShape

G = torch.Generator().manual_seed(0)
LEVELS = {"int8": (-127, 127), "int4": (-8, 7)}


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=G) * 10.0 ** torch.randint(-3, 3, (*shape[:-1], 1), generator=G)


def codes_of(codes: torch.Tensor, fmt: str) -> list[list[int]]:
    """Codes a row, unpacked byte by byte from what the layout says."""
    if fmt == "int8":
        return [list(row) for row in codes.tolist()]
    return [[(byte & 15) - 8 for byte in row] + [(byte >> 4) - 8 for byte in row] for row in codes.tolist()]


def nearest_half(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float64).to(torch.float16))


@pytest.mark.parametrize("fmt", ["int8", "int4"])
@pytest.mark.parametrize("size", [2, 8, 10, 34])
def test_codes_are_the_nearest_for_the_stored_scale(fmt: str, size: int) -> None:
    x = rows(50, size)
    codes, scale = quantize_cache(x, fmt)
    least, most = LEVELS[fmt]
    assert (codes.dtype, scale.dtype, scale.shape) == (CODE_TYPES[fmt], torch.float16, (50,))
    assert codes.shape == (50, size if fmt == "int8" else size // 2)
    for row, found, factor in zip(x.double().tolist(), codes_of(codes, fmt), scale.double().tolist(), strict=True):
        extreme = max(row, key=lambda value: (abs(value), value))
        due = abs(extreme) / 127 if fmt == "int8" else -extreme / 8
        assert factor == pytest.approx(nearest_half(due), rel=2**-10)
        for value, code in zip(row, found, strict=True):
            assert least <= code <= most
            best = min(range(least, most + 1), key=lambda level: abs(level * factor - value))
            # x · (1 / scale) is not x / scale: next to a half either neighbour may be taken.
            assert abs(code * factor - value) <= abs(best * factor - value) * (1 + 1e-5) + 1e-5 * abs(factor)
    back = dequantize_cache(codes, scale).double()
    wanted = torch.tensor(codes_of(codes, fmt)).double() * scale.double()[:, None]
    torch.testing.assert_close(back, wanted, rtol=1e-7, atol=0)


def test_the_extra_level_is_where_the_largest_magnitude_is() -> None:
    x = torch.tensor([[4.0, -1.0], [-4.0, 1.0], [4.0, -4.0], [1.0, 2.0]])
    codes, scale = quantize_cache(x, "int4")
    assert scale.tolist() == [-0.5, 0.5, -0.5, -0.25]
    assert codes_of(codes, "int4") == [[-8, 2], [-8, 2], [-8, 7], [-4, -8]]


@pytest.mark.parametrize("fmt", ["int8", "int4"])
def test_nothing_next_to_nothing_and_too_much(fmt: str) -> None:
    x = torch.tensor([[0.0, -0.0], [1e-9, -1e-9], [3e38, -1e38], [-0.0, -0.0]])
    codes, scale = quantize_cache(x, fmt)
    assert [math.copysign(1, value) for value in scale[[0, 1, 3]].tolist()] == [1, 1, 1]
    assert scale[[0, 1, 3]].tolist() == [0, 0, 0]
    assert all(row == [0, 0] for at, row in enumerate(codes_of(codes, fmt)) if at != 2)
    assert abs(float(scale[2])) == 65504
    assert bool(dequantize_cache(codes, scale).isfinite().all())


def test_the_update_writes_its_rows_and_shows_only_those_that_are_there() -> None:
    new = rows(1, 2, 3, 8)
    for fmt, dtype in CODE_TYPES.items():
        codes, scale = quantize_cache(rows(1, 2, 9, 8), fmt)
        scale[:, :, 7:] = torch.nan
        values, after, scales = torch.ops.hikui.cache_update_quantized(codes, scale, new, torch.tensor([4]))
        fresh, fresh_scale = quantize_cache(new, fmt)
        assert after.dtype == dtype
        assert torch.equal(after[:, :, 4:7], fresh)
        assert torch.equal(scales[:, :, 4:7], fresh_scale)
        assert torch.equal(after[:, :, :4], codes[:, :, :4])
        assert torch.equal(after[:, :, 7:], codes[:, :, 7:])
        assert torch.equal(values[:, :, :7], dequantize_cache(after, scales)[:, :, :7])
        assert not bool(values[:, :, 7:].any())


def test_attention_over_codes_is_attention_over_what_they_stand_for() -> None:
    q, k, v = rows(1, 4, 3, 8), rows(1, 2, 3, 8), rows(1, 2, 3, 8)
    for fmt in CODE_TYPES:
        (keys, key_scale), (values, value_scale) = (quantize_cache(rows(1, 2, 9, 8), fmt) for _ in range(2))
        past = torch.tensor([5])
        out, *caches = torch.ops.hikui.attention_quantized(q, k, v, keys, values, key_scale, value_scale, past, 0.3)
        seen_keys, keys, key_scale = torch.ops.hikui.cache_update_quantized(keys, key_scale, k, past)
        seen_values, values, value_scale = torch.ops.hikui.cache_update_quantized(values, value_scale, v, past)
        for found, due in zip(caches, (keys, values, key_scale, value_scale), strict=True):
            assert torch.equal(found, due)
        for head in range(4):
            for row in range(3):
                columns = 5 + row + 1
                score = seen_keys[0, head // 2, :columns].double() @ q[0, head, row].double() * 0.3
                want = torch.softmax(score, 0) @ seen_values[0, head // 2, :columns].double()
                size = max(1.0, float(seen_values.abs().max()))
                # Keys of thousands make scores of thousands, so a weight is known to some 1e-4.
                torch.testing.assert_close(out[0, head, row].double(), want, rtol=1e-3, atol=1e-3 * size)


def test_tensors_and_bytes() -> None:
    assert {"float32", *CODE_TYPES} == set(CACHE_FORMATS)
    assert [(t.kind, t.shape, t.dtype) for t in CacheShape(2, 8).tensors(16)] == [
        ("key_cache", (1, 2, 16, 8), "float32"),
        ("value_cache", (1, 2, 16, 8), "float32"),
    ]
    for fmt, dtype in CODE_TYPES.items():
        shape = CacheShape(2, 8, fmt)
        codes, scale = quantize_cache(torch.zeros(1, 2, 16, 8), fmt)
        kinds = ("key_cache", "value_cache", "key_scale", "value_scale")
        for tensor, kind, due in zip(shape.tensors(16), kinds, (codes, codes, scale, scale), strict=True):
            assert (tensor.kind, tensor.shape, getattr(torch, tensor.dtype)) == (kind, tuple(due.shape), due.dtype)
            assert tensor.nbytes == due.nbytes
        assert shape.nbytes(16) == 2 * (codes.nbytes + scale.nbytes)
        assert cache_format(dtype) == fmt
    with pytest.raises(ValueError, match=r"no quantised cache holds torch\.int32"):
        cache_format(torch.int32)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_codes_are_clipped_where_the_scale_of_a_tiny_row_is_rounded_down(sign: float) -> None:
    """The smallest half is 2⁻²⁴: a row whose scale would be 1.4 of it gets it, and its largest element 1.4 too much."""
    step = 2.0**-24
    x = torch.tensor([1.4 * 127, -1.4 * 127, 100.0, -3.0]) * step * sign
    codes, scale = quantize_cache(x, "int8")
    assert float(scale) == step
    assert codes.tolist() == [int(sign) * 127, int(sign) * -127, int(sign) * 100, int(sign) * -3]
    x = torch.tensor([1.4 * 8, -1.3 * 8, 5.0, -3.0]) * step * sign
    codes, scale = quantize_cache(x, "int4")
    assert float(scale) == -step * sign, "the largest element lies at −8"
    want = torch.tensor([-8.0, 7.0, -5.0, 3.0]) * (-step * sign)
    assert torch.equal(dequantize_cache(codes, scale), want)
