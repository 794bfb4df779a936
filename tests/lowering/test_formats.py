"""Formats: round trips, true bits, and the layout that kernels rely on."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hikui.lowering import formats
from hikui.lowering.errors import UsageError
from hikui.lowering.formats import Format

INTEGER = [Format(kind, group) for kind in ("int4", "int8") for group in (32, 64, 128, None)]
FLOAT = [Format("float16"), Format("float32")]


@given(st.sampled_from(INTEGER), st.integers(1, 70), st.integers(1, 300), st.integers(0, 2**32))
@settings(max_examples=80, deadline=None)
def test_integer_round_trip(fmt: Format, n: int, k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    low, high = fmt.levels
    codes = torch.randint(low, high + 1, (n, k), generator=generator)
    scale = torch.rand((n, fmt.groups(k)), generator=generator).half().float()
    packed = formats.pack(fmt, codes, scale)
    assert packed.scale is not None
    assert tuple(packed.weight.shape) == fmt.weight_shape(n, k)
    assert tuple(packed.scale.shape) == fmt.scale_shape(n, k)
    assert packed.weight.dtype == fmt.weight_dtype
    assert torch.equal(formats.unpack_codes(fmt, packed.weight, n, k), codes.to(torch.int8))
    assert torch.equal(formats.unpack_scale(fmt, packed.scale, n, k), scale)
    group = fmt.group_size(k)
    dense = torch.stack([codes[:, j] * scale[:, j // group] for j in range(k)], dim=1)
    assert torch.equal(formats.unpack(fmt, packed.weight, packed.scale, n, k), dense)
    stored = packed.weight.numel() * packed.weight.element_size() + packed.scale.numel() * 2
    assert fmt.nbytes(n, k) == stored
    assert fmt.true_bits(n, k) == pytest.approx(8 * stored / (n * k))


@given(st.sampled_from(FLOAT), st.integers(1, 40), st.integers(1, 80), st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_float_round_trip(fmt: Format, n: int, k: int, seed: int) -> None:
    weight = torch.randn((n, k), generator=torch.Generator().manual_seed(seed)).to(fmt.weight_dtype)
    packed = formats.pack(fmt, weight)
    assert packed.scale is None and tuple(packed.weight.shape) == fmt.weight_shape(n, k)
    assert torch.equal(formats.unpack(fmt, packed.weight, None, n, k), weight.float())


def test_layout_is_the_documented_one() -> None:
    n, k = 19, 40
    codes = torch.arange(n * k).view(n, k) % 16 - 8
    int4 = formats.pack(Format("int4", 32), codes, torch.ones(n, 2)).weight
    int8 = formats.pack(Format("int8", 32), codes, torch.ones(n, 2)).weight
    for row, line, lane in ((0, 0, 0), (18, 3, 2), (7, 4, 3)):
        assert int(int4[row // 16, line, row % 16, lane] & 15) == int(codes[row, 8 * line + lane]) + 8
        assert int(int8[row // 16, line, row % 16, lane]) == int(codes[row, 4 * line + lane])
    assert int(int4[0, 0, 5, 1] >> 4) == int(codes[5, 5]) + 8
    assert int(int4[1, 0, 3, 0]) == 0x88, "rows beyond n hold code 0"


@pytest.mark.parametrize(("text", "n", "k", "bits"), [("int4-g64", 256, 256, 4.25), ("int8-g128", 64, 256, 8.125)])
def test_true_bits_count_scales(text: str, n: int, k: int, bits: float) -> None:
    assert Format.parse(text).true_bits(n, k) == bits


def test_padding_is_counted_and_noted() -> None:
    fmt = Format.parse("int4-g64")
    assert fmt.padded_k(172) == 192
    assert fmt.true_bits(64, 172) == pytest.approx(192 / 172 * 4.25)
    assert fmt.notes(64, 172) == ["K=172 is padded to 192 to fill the last group of 64"]
    assert Format.parse("int4-g128").notes(64, 100) == [
        "group 128 is wider than K=100: one group for the whole channel"
    ]
    assert fmt.notes(64, 128) == []


@pytest.mark.parametrize("text", ["int5-g64", "int4", "int4-g48", "float16-g64", "", "int8-g"])
def test_unknown_formats_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="group|not known"):
        Format.parse(text)


@pytest.mark.parametrize("fmt", [*INTEGER, *FLOAT], ids=str)
def test_names_round_trip(fmt: Format) -> None:
    assert Format.parse(str(fmt)) == fmt


def test_codes_outside_the_levels_are_refused() -> None:
    with pytest.raises(ValueError, match="from -8 to 7"):
        formats.pack(Format("int4", 32), torch.full((2, 32), 8), torch.ones(2, 1))


@given(st.integers(1, 5), st.integers(1, 300), st.integers(0, 2**32), st.sampled_from([1e-30, 1.0, 1e30]))
@settings(max_examples=60, deadline=None)
def test_activation_codes(m: int, k: int, seed: int, size: float) -> None:
    x = torch.randn((m, k), generator=torch.Generator().manual_seed(seed)) * size
    q, scale, sums = formats.quantize_activation(x)
    assert q.shape == (m, formats.activation_k(k)) and not q[:, k:].any()
    error = (q[:, :k].double() * scale.double()[:, None] - x.double()).abs()
    assert (error <= scale.double()[:, None] * 0.5001).all()
    assert torch.equal(sums.sum(-1), q.to(torch.int32).sum(-1, dtype=torch.int32))


def test_an_all_zero_token_has_scale_zero() -> None:
    q, scale, sums = formats.quantize_activation(torch.zeros(2, 7))
    assert not q.any() and not scale.any() and not sums.any()
