"""Formats: round trips, true bits, and the layout that kernels rely on."""

from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hikui.lowering import formats
from hikui.lowering.errors import UsageError
from hikui.lowering.formats import GROUPS, KINDS, Format

EVERY_GROUP = range(32, 257, 32)
PLAIN = [Format(kind, group) for kind in KINDS for group in (*EVERY_GROUP, None)]
MIXED = [Format("mixed", group, columns) for group, columns in ((32, 32), (32, 96), (64, 128), (128, 128))]
INTEGER = [*PLAIN, *MIXED]
FLOAT = [Format("float16"), Format("float32")]


def draw_codes(fmt: Format, n: int, k: int, generator: torch.Generator) -> Tensor:
    """Codes over all levels of each column: int64 [n, k]."""
    parts = []
    for part in fmt.segments(k):
        levels = torch.tensor(part.format.levels)
        parts.append(levels[torch.randint(0, len(levels), (n, part.stop - part.start), generator=generator)])
    return torch.cat(parts, 1)


@given(st.sampled_from(INTEGER), st.integers(1, 70), st.integers(1, 700), st.integers(0, 2**32))
@settings(max_examples=300, deadline=None)
def test_integer_round_trip(fmt: Format, n: int, k: int, seed: int) -> None:
    k = max(k, fmt.columns or 1)
    generator = torch.Generator().manual_seed(seed)
    codes = draw_codes(fmt, n, k, generator)
    scale = torch.rand((n, fmt.groups(k)), generator=generator).half().float()
    packed = formats.pack(fmt, codes, scale)
    assert packed.scale is not None
    assert tuple(packed.weight.shape) == fmt.weight_shape(n, k)
    assert tuple(packed.scale.shape) == fmt.scale_shape(n, k)
    assert packed.weight.dtype == fmt.weight_dtype and packed.weight.is_contiguous()
    assert (
        fmt.stored_columns(packed.weight.shape[1], packed.scale.shape[1])
        == fmt.padded_k(k)
        == fmt.groups(k) * fmt.group_size(k)
    )
    assert torch.equal(formats.unpack_codes(fmt, packed.weight, n, k), codes.to(torch.int8))
    assert torch.equal(formats.unpack_scale(fmt, packed.scale, n, k), scale)
    group = fmt.group_size(k)
    dense = torch.stack([codes[:, j] * scale[:, j // group] for j in range(k)], dim=1)
    assert torch.equal(formats.unpack(fmt, packed.weight, packed.scale, n, k), dense)
    stored = packed.weight.numel() * packed.weight.element_size() + packed.scale.numel() * 2
    assert fmt.nbytes(n, k) == stored
    order = 4 * k if fmt.is_mixed else 0
    assert fmt.true_bits(n, k) == pytest.approx(8 * (stored + order) / (n * k))


@given(st.sampled_from(FLOAT), st.integers(1, 40), st.integers(1, 80), st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_float_round_trip(fmt: Format, n: int, k: int, seed: int) -> None:
    weight = torch.randn((n, k), generator=torch.Generator().manual_seed(seed)).to(fmt.weight_dtype)
    packed = formats.pack(fmt, weight)
    assert packed.scale is None and tuple(packed.weight.shape) == fmt.weight_shape(n, k)
    assert torch.equal(formats.unpack(fmt, packed.weight, None, n, k), weight.float())


# Where the documented layout keeps each field of a step: for each of its bits, lowest first, (line of the step, bit).
THREE = {f: [(f // 2, 3 * (f % 2) + bit) for bit in range(3)] for f in range(6)}
THREE |= {6: [(0, 6), (0, 7), (1, 7)], 7: [(2, 6), (2, 7), (1, 6)]}
PLACES = {
    "sign": {f: [(0, f)] for f in range(8)},
    "int2": {f: [(f // 4, 2 * (f % 4) + bit) for bit in range(2)] for f in range(8)},
    "int3": THREE,
    "int4": {f: [(f // 2, 4 * (f % 2) + bit) for bit in range(4)] for f in range(8)},
}
PLACES |= {"nf4": PLACES["int4"], "fp4": PLACES["int4"]}


@pytest.mark.parametrize("kind", PLACES)
def test_layout_is_the_documented_one(kind: str) -> None:
    """Every bit of every column, read where the table of the layout says it is."""
    n, k = 19, 72
    fmt = Format(kind, 32)
    table, lines = KINDS[kind].codes, KINDS[kind].lines
    assert table is not None and lines is not None
    codes = draw_codes(fmt, n, k, torch.Generator().manual_seed(1))
    weight = formats.pack(fmt, codes, torch.ones(n, 3)).weight
    used = {place for places in PLACES[kind].values() for place in places}
    assert used == {(line, bit) for line in range(lines) for bit in range(8)}, "no bit is wasted"
    for row in (0, 7, 18):
        for column in range(k):
            step, field, lane = column // 32, column % 32 // 4, column % 4
            stored = 0
            for at, (line, bit) in enumerate(PLACES[kind][field]):
                byte = int(weight[row // 16, step * lines + line, row % 16, lane])
                stored |= (byte >> bit & 1) << at
            assert table[stored] == int(codes[row, column])


@pytest.mark.parametrize(("group", "k"), [(32, 72), (96, 192), (160, 300), (None, 72), (None, 576), (None, 1536)])
def test_ternary_codes_are_the_digits_of_a_byte(group: int | None, k: int) -> None:
    """A byte is a fraction of 256 whose balanced ternary digits are the codes of five quads, read exactly."""
    n, fmt = 19, Format("ternary", group)
    codes = draw_codes(fmt, n, k, torch.Generator().manual_seed(3))
    codes[:4] = torch.tensor([[-1], [0], [1], [-1]])
    codes[3, 1::2] = 1
    weight = formats.pack(fmt, codes, torch.ones(n, fmt.groups(k))).weight.view(torch.int8)
    width, lines = fmt.group_size(k), -(-fmt.group_size(k) // 20)
    assert weight.shape[1] == fmt.groups(k) * lines
    for row in (0, 1, 2, 3, 7, 18):
        for column in range(k):
            line, within = column // width * lines + column % width // 20, column % width % 20
            left, digit = Fraction(int(weight[row // 16, line, row % 16, column % 4]), 256), 0
            for _ in range(within // 4 + 1):
                digit = round(3 * left)
                left = 3 * left - digit
            assert digit == int(codes[row, column])


def test_the_last_line_of_a_ternary_group_ends_in_zeros() -> None:
    fmt = Format("ternary")
    weight = formats.pack(fmt, torch.full((1, 32), -1), torch.ones(1, 1)).weight.view(torch.int8)
    # Three of five quads are there: −(81 + 27 + 9) · 256 / 243.
    assert weight[0, :, 0].tolist() == [[round(-121 * 256 / 243)] * 4, [round(-117 * 256 / 243)] * 4]


def test_a_row_of_ternary_codes_that_no_kernel_adds_up_is_refused() -> None:
    assert Format("ternary").weight_shape(16, 32768) == (1, 1639, 16, 4)
    assert Format("ternary", 256).weight_shape(16, 32800) is not None
    with pytest.raises(UsageError, match="adds up 32768 columns at most, and the matrix has 32769; take ternary-g256"):
        Format("ternary").weight_shape(16, 32769)


def test_int8_is_stored_as_it_is() -> None:
    n, k = 19, 40
    codes = torch.arange(n * k).view(n, k) % 255 - 127
    weight = formats.pack(Format("int8", 32), codes, torch.ones(n, 2)).weight
    for row, line, lane in ((0, 0, 0), (18, 3, 2), (7, 4, 3)):
        assert int(weight[row // 16, line, row % 16, lane]) == int(codes[row, 4 * line + lane])


def test_padding_holds_code_zero_where_there_is_one() -> None:
    held = {}
    for kind in KINDS:
        fmt = Format(kind, 32)
        held[kind] = (
            int(formats.pack(fmt, torch.full((3, 8), fmt.levels[-1]), torch.ones(3, 1)).weight[0, 0, 5, 1]) & 255
        )
    # Fields of one line: code 0 of int4 is 8, of int3 4, of int2 2, of nf4 7, of fp4 0; of others the byte is 0.
    due = {"sign": 0, "int2": 0b10101010, "int3": 0b00100100, "int4": 0x88, "nf4": 0x77, "fp4": 0, "int8": 0}
    assert held == due | {"ternary": 0}


def test_every_kind_of_more_than_one_bit_has_a_zero() -> None:
    """Without one, every small weight moves by half a step away from zero, always to the side of its own sign.

    Where a column of inputs is a hundred times as large as the others these errors do not cancel: odd codes alone cost
    a real language model two bits a character at 3 bits, which Gaussian weights never showed.
    """
    for name, kind in KINDS.items():
        assert (0 in kind.levels) == (kind.bits > 1), name
        above = min(level for level in kind.levels if level > 0)
        below = max(level for level in kind.levels if level < 0)
        # The zero has neighbours as near as any two codes are, so that no weight is nearer to it than its step says.
        steps = [high - low for low, high in zip(kind.levels, kind.levels[1:], strict=False)]
        assert kind.bits == 1 or (kind.step == 0 or above == -below == min(steps) == kind.step), name


def test_the_levels_of_integer_kinds() -> None:
    """Two's complement but for int8: one level more below zero than above, which a negative scale turns round."""
    assert {name: (KINDS[name].levels[0], KINDS[name].levels[-1]) for name in ("int2", "int3", "int4", "int8")} == {
        "int2": (-2, 1), "int3": (-4, 3), "int4": (-8, 7), "int8": (-127, 127),
    }  # fmt: skip
    for name, offset in (("int2", 2), ("int3", 4), ("int4", 8)):
        assert KINDS[name].codes == tuple(field - offset for field in range(2 * offset))


def test_a_mixed_matrix_is_its_two_segments_one_after_the_other() -> None:
    fmt, n, k = Format.parse("mixed-g64-c128"), 21, 300
    generator = torch.Generator().manual_seed(2)
    codes, scale = draw_codes(fmt, n, k, generator), torch.rand((n, 6), generator=generator)
    whole = formats.pack(fmt, codes, scale)
    heavy = formats.pack(Format("int4", 64), codes[:, :128], scale[:, :2])
    light = formats.pack(Format("sign", 64), codes[:, 128:], torch.zeros(n, 3)).weight
    assert torch.equal(whole.weight[:, :16], heavy.weight)
    assert torch.equal(whole.weight[:, 16 : 16 + light.shape[1]], light)
    assert whole.weight.shape[1] == 16 + (384 - 128) // 32
    assert not whole.weight[:, 16 + light.shape[1] :].any(), "columns up to the activation's are padding"


def test_codebooks_are_the_published_ones() -> None:
    normal_float = [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]  # fmt: skip
    assert [round(127 * value) for value in normal_float] == list(formats.NF4)
    # Sign, two bits of exponent with bias 1, one of mantissa; exponent 0 is subnormal.
    small_float = []
    for field in range(16):
        exponent, mantissa = field >> 1 & 3, field & 1
        value = (1 + mantissa / 2) * 2 ** (exponent - 1) if exponent else mantissa / 2
        small_float.append(int(2 * value) * (-1 if field & 8 else 1))
    assert small_float == list(formats.FP4)


@pytest.mark.parametrize(
    ("text", "n", "k", "bits"),
    [
        ("int4-g64", 256, 256, 4.25),
        ("int8-g128", 64, 256, 8.125),
        ("sign-g128", 64, 256, 1.125),
        ("int2-g64", 64, 256, 2.25),
        ("int3-g128", 64, 256, 3.125),
        ("ternary-g128", 64, 256, 1.875),
        ("ternary-g256", 64, 256, 1.6875),
        ("ternary-channel", 64, 640, 1.625),
        ("nf4-g32", 64, 256, 4.5),
        # A quarter of the columns at 4 bits, the rest at 1, and 32 bits a column for 1024 rows.
        ("mixed-g128-c256", 1024, 1024, 0.25 * 4 + 0.75 + 0.125 + 32 / 1024),
        # Two bits for each of 32 × 64 signs, 16 for 64 + 32 scales, 32 for those of 64 columns.
        ("factors-r32", 64, 64, (2 * 32 * 64 + 16 * 96 + 32 * 64) / 64**2),
    ],
)
def test_true_bits_count_scales(text: str, n: int, k: int, bits: float) -> None:
    assert Format.parse(text).true_bits(n, k) == bits


def test_padding_is_counted_and_noted() -> None:
    fmt = Format.parse("int4-g64")
    assert fmt.padded_k(172) == 192
    assert fmt.true_bits(64, 172) == pytest.approx(192 / 172 * 4.25)
    assert fmt.notes(64, 172) == ["K=172 is padded to 192 to fill the last group of 64"]
    wide = Format.parse("int4-g128")
    assert wide.padded_k(576) == 576
    assert wide.true_bits(64, 576) == 4 + 16 / 96
    assert wide.notes(64, 576) == ["groups of 96 columns instead of 128, which does not divide K=576"]
    assert wide.notes(64, 570) == [
        "groups of 96 columns instead of 128, which does not divide K=570",
        "K=570 is padded to 576 to fill the last group of 96",
    ]
    assert Format.parse("int4-g128").notes(64, 100) == [
        "group 128 is wider than K=100: one group for the whole channel"
    ]
    assert fmt.notes(64, 128) == []
    assert Format.parse("mixed-g64-c64").notes(64, 192) == ["K=192 is padded to 256 to fill the last group of 128"]


UNKNOWN = ["int5-g64", "int4", "int4-g48", "float16-g64", "", "int8-g", "mixed-g64", "mixed-channel", "mixed-g48-c48"]
UNKNOWN += [
    "factors",
    "factors-",
    "factors-g64",
    "factors--1",
    "factors-channel",
    "mixed-g64-c96",
    "mixed-g64-c0",
    "int4-g64-c64",
    "int4-g६४",
    "nf4-channel-c64",
]


@pytest.mark.parametrize("text", UNKNOWN)
def test_unknown_formats_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="group|not known"):
        Format.parse(text)


def test_a_mixed_format_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UsageError, match="more int4 columns than the matrix has columns, 200"):
        Format.parse("mixed-g128-c256").nbytes(64, 200)


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 400))
def test_factors_have_the_largest_rank_that_fits(n: int, k: int, hundredths: int) -> None:
    fmt = Format("factors", rate=hundredths / 100)
    assert Format.parse(str(fmt)) == fmt
    rank = fmt.rank(n, k)

    def bits(rank: int) -> float:
        return Format("sign").nbytes(n, rank) + Format("sign").nbytes(rank, k) + 4 * k

    assert rank % 32 == 0 and fmt.nbytes(n, k) == bits(rank)
    assert rank == 32 or 8 * bits(rank) <= hundredths * n * k / 100 + 1e-6
    assert 8 * bits(rank + 32) > hundredths * n * k / 100 - 1e-6


def test_factors_of_a_given_rank() -> None:
    fmt = Format.parse("factors-r64")
    assert str(fmt) == "factors-r64" and fmt.rank(100, 200) == 64
    assert fmt.notes(100, 200) == [f"rank 64, {fmt.true_bits(100, 200):.3f} bits per weight"]
    with pytest.raises(UsageError, match="more than 4 bits for each weight of a matrix of 40×48; its rank is 32 at"):
        fmt.nbytes(40, 48)
    with pytest.raises(UsageError, match="'factors-r64' is of two matrices, which are stored as 'sign-channel' each"):
        fmt.weight_shape(100, 200)
    assert not fmt.is_integer and not fmt.is_plain and fmt.is_factors


@pytest.mark.parametrize("fmt", [*INTEGER, *FLOAT], ids=str)
def test_names_round_trip(fmt: Format) -> None:
    assert Format.parse(str(fmt)) == fmt


@pytest.mark.parametrize(
    ("text", "code", "sentence"),
    [
        ("int4-g32", 8, "int4-g32 takes codes from -8 to 7"),
        ("int8-g32", -128, "from -127 to 127"),
        ("ternary-g32", 2, "from -1 to 1"),
        ("sign-g32", 0, "takes the codes -1, 1"),
        ("int2-g32", 2, "takes codes from -2 to 1"),
        ("int3-g32", 300, "takes codes from -4 to 3"),
        ("fp4-g32", 5, "takes the codes -12, -8"),
        ("mixed-g32-c32", 2, "sign-g32 takes the codes -1, 1"),
    ],
)
def test_codes_outside_the_levels_are_refused(text: str, code: int, sentence: str) -> None:
    fmt = Format.parse(text)
    with pytest.raises(ValueError, match=sentence):
        formats.pack(fmt, torch.full((2, 64), code), torch.ones(2, fmt.groups(64)))


@given(
    st.integers(1, 5),
    st.integers(1, 300),
    st.integers(0, 2**32),
    st.sampled_from([1e-22, 1.0, 1e30]),
    st.sampled_from([8, 4]),
)
@settings(max_examples=60, deadline=None)
def test_activation_codes(m: int, k: int, seed: int, size: float, bits: int) -> None:
    x = torch.randn((m, k), generator=torch.Generator().manual_seed(seed)) * size
    q, scale, sums = formats.quantize_activation(x, bits)
    assert q.shape == (m, formats.activation_k(k)) and not q[:, k:].any()
    assert (q.abs().amax(-1) == {8: 127, 4: 7}[bits]).all()
    error = (q[:, :k].double() * scale.double()[:, None] - x.double()).abs()
    assert (error <= scale.double()[:, None] * 0.5001).all()
    assert torch.equal(sums.sum(-1), q.to(torch.int32).sum(-1, dtype=torch.int32))


@pytest.mark.parametrize("bits", [8, 4])
def test_an_all_zero_token_has_scale_zero(bits: int) -> None:
    q, scale, sums = formats.quantize_activation(torch.zeros(2, 7), bits)
    assert not q.any() and not scale.any() and not sums.any()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("size", [1e-31, 1e-38, 1e-45])
def test_tokens_whose_inverse_would_overflow_count_as_zero(size: float, bits: int) -> None:
    q, scale, sums = formats.quantize_activation(torch.full((1, 3), size), bits)
    assert not q.any() and not sums.any() and bool(scale.isfinite().all())


def test_a_static_step_clips_what_is_beyond_it() -> None:
    x = torch.tensor([[[0.5, -0.75, 1.0, 63.5, 64.0, -1e30]], [[0.25, -0.25, 0.0, 1.25, 1e30, 3.0]]])
    q, scale, sums = formats.quantize_activation_static(x, torch.tensor([0.5]))
    assert q.shape == (2, 1, 128) and not q[..., 6:].any()
    # Halves go to the even neighbour.
    assert q[..., :6].tolist() == [[[1, -2, 2, 127, 127, -127]], [[0, 0, 0, 2, 127, 6]]]
    assert torch.equal(scale, torch.full((2, 1), 0.5))
    assert sums[..., 0].tolist() == [[128], [135]] and not sums[..., 1:].any()


def test_a_static_step_of_zero_gives_zeros() -> None:
    q, scale, sums = formats.quantize_activation_static(torch.randn(2, 7), torch.zeros(1))
    assert not q.any() and not scale.any() and not sums.any()


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("fmt", [Format("int3", 32), Format("nf4", 32), Format("fp4", 32), Format("int8", 32)], ids=str)
def test_codes_may_be_of_any_integer_dtype(fmt: Format, dtype: torch.dtype) -> None:
    codes = draw_codes(fmt, 19, 70, torch.Generator().manual_seed(4))
    packed = formats.pack(fmt, codes.to(dtype), torch.ones(19, 3))
    assert torch.equal(formats.unpack_codes(fmt, packed.weight, 19, 70).long(), codes)


def test_what_is_stored_has_the_dtype_of_its_format() -> None:
    weight = torch.randn((5, 7), generator=torch.Generator().manual_seed(5))
    for name, dtype in (("float16", torch.float16), ("float32", torch.float32)):
        packed = formats.pack(Format(name), weight).weight
        assert packed.dtype == dtype
        assert torch.equal(formats.unpack(Format(name), packed, None, 5, 7), weight.to(dtype).float())
    assert formats.pack(Format("float32"), weight.half()).weight.dtype == torch.float32
    scale = torch.tensor([[1 / 3]])
    packed_scale = formats.pack(Format("int8"), torch.ones(1, 4, dtype=torch.int8), scale).scale
    assert packed_scale is not None and packed_scale.dtype == torch.float16
    assert packed_scale[0, 0, 0] == scale.half()


@pytest.mark.parametrize("scale", [None, torch.ones(5, 3), torch.ones(4, 2), torch.ones(10)])
def test_integer_formats_need_a_scale_for_each_row_and_group(scale: Tensor | None) -> None:
    sentence = r"^int4-g32 of a 5×40 matrix takes scales of shape \(5, 2\)$"
    with pytest.raises(ValueError, match=sentence):
        formats.pack(Format("int4", 32), torch.zeros(5, 40, dtype=torch.int8), scale)


def test_sizes_of_a_float_format() -> None:
    for name, width in (("float16", 2), ("float32", 4)):
        fmt = Format(name)
        assert fmt.padded_k(70) == 70
        assert fmt.weight_shape(21, 70) == (2, 70, 16)
        assert fmt.scale_shape(21, 70) is None
        assert fmt.nbytes(21, 70) == 2 * 70 * 16 * width
        assert fmt.notes(32, 70) == []


def test_a_group_wider_than_the_matrix_is_its_channel() -> None:
    """Padded to whole sums of 32 columns, not to the group."""
    for group, k, size in ((128, 40, 64), (128, 96, 96), (64, 64, 64), (64, 65, 96), (None, 40, 64)):
        fmt = Format("int4", group)
        assert fmt.group_size(k) == size
        assert fmt.padded_k(k) == -(-k // size) * size
    assert Format("mixed", 64, 64).group_size(64) == 64


@pytest.mark.parametrize(
    ("group", "k", "size", "stored"),
    [
        (128, 576, 96, 576),  # Of 96 and 192 the nearer.
        (128, 1536, 128, 1536),
        (128, 960, 96, 960),  # 96 and 160 are as near: the smaller.
        (128, 800, 160, 800),
        (128, 352, 128, 384),  # Nothing near 128 divides 352: padded, as the activation is.
        (64, 288, 96, 288),
        (64, 96, 96, 96),  # 32 is half, and that is too near to nothing.
        (64, 352, 64, 384),
        (32, 352, 32, 352),
        (96, 576, 96, 576),
        (128, 416, 128, 512),
        (96, 224, 64, 256),  # 288 columns would be more than the 256 of the activation.
        (96, 129, 96, 192),
        (192, 1184, 160, 1280),
        (256, 1664, 128, 1664),  # Nothing beyond half divides it, so the half.
        (256, 576, 288, 576),
        (160, 640, 160, 640),
    ],
)
def test_groups_fit_the_columns(group: int, k: int, size: int, stored: int) -> None:
    fmt = Format("int4", group)
    assert (fmt.group_size(k), fmt.padded_k(k)) == (size, stored)
    assert Format("mixed", 128, 128).group_size(k) == 128


@given(st.sampled_from(EVERY_GROUP), st.integers(1, 20000))
@settings(max_examples=500, deadline=None)
def test_a_fitting_group_is_the_nearest_one_that_pads_nothing(group: int, k: int) -> None:
    fmt, whole = Format("int3", group), -(-k // 32) * 32
    size, stored = fmt.group_size(k), fmt.padded_k(k)
    assert size % 32 == 0 and stored % size == 0 and k <= stored <= formats.activation_k(k)
    assert fmt.group_size(stored) == size and fmt.padded_k(stored) == stored, "stored columns are cut alike"
    if group > k:
        assert size == whole
        return
    near = [at for at in range(32, 400, 32) if group / 2 < at <= 1.5 * group and whole % at == 0]
    if near:
        assert size == min(near, key=lambda at: abs(at - group)) and stored == whole
    elif group in GROUPS:
        assert size == group, "padded as it always was"
    else:
        assert group / 2 <= size <= 1.5 * group


def test_a_mixed_matrix_may_be_int4_throughout() -> None:
    fmt = Format("mixed", 32, 96)
    assert fmt.segments(96) == ((Format("int4", 32), 0, 96),)
    assert fmt.segments(97) == ((Format("int4", 32), 0, 96), (Format("sign", 32), 96, 97))


def test_notes_say_what_is_padded() -> None:
    assert Format("int4", 64).notes(21, 64) == ["N=21 is padded to 32 rows"]
    assert Format("float32").notes(33, 5) == ["N=33 is padded to 48 rows"]
    assert Format("int4", 64).notes(17, 110) == [
        "K=110 is padded to 128 to fill the last group of 64", "N=17 is padded to 32 rows",
    ]  # fmt: skip


KNOWN = "sign, int2, ternary, int3, int4, nf4, fp4, int8, mixed, factors, float16, float32"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("int5",), f"Format 'int5' is not known; the formats are {KNOWN}."),
        (("int4", 48), "Format 'int4' cannot have a group of 48; integer formats take 32, 64, 128, another multiple of "
         "32 up to 256, or channel, float formats take none."),
        (("int4", 288), "Format 'int4' cannot have a group of 288; integer formats take 32, 64, 128, another multiple "
         "of 32 up to 256, or channel, float formats take none."),
        (("int4", 0), "Format 'int4' cannot have a group of 0; integer formats take 32, 64, 128, another multiple of "
         "32 up to 256, or channel, float formats take none."),
        (("float16", 64), "Format 'float16' cannot have a group of 64; integer formats take 32, 64, 128, another "
         "multiple of 32 up to 256, or channel, float formats take none."),
        (("mixed", 48, 48), "Format 'mixed' cannot have a group of 48; it takes 32, 64, 128."),
        (("mixed", None, 64), "Format 'mixed' cannot have a group of None; it takes 32, 64, 128."),
        (("mixed", 64, -64), "Format 'mixed' cannot have -64 int4 columns; it takes a multiple of its group 64, at "
         "least one."),
        (("mixed", 64), "Format 'mixed' cannot have None int4 columns; it takes a multiple of its group 64, at least "
         "one."),
        (("factors", None, 48), "Format 'factors' cannot have a rank of 48; it takes a multiple of 32."),
        (("factors", None, 0), "Format 'factors' cannot have a rank of 0; it takes a multiple of 32."),
        (("factors", 64, 64), "Format 'factors' takes either a rank or bits per weight, and no group."),
        (("factors",), "Format 'factors' takes either a rank or bits per weight, and no group."),
        (("factors", None, None, 5.0), "Format 'factors' cannot take 5 bits per weight; it takes up to 4."),
        (("factors", None, None, 0.0), "Format 'factors' cannot take 0 bits per weight; it takes up to 4."),
        (("sign", None, None, 1.0), "Format 'sign' has its bits of itself; only 'factors' takes a number of them."),
        (("int4", 64, 64), "Format 'int4' stores all columns alike; only 'mixed' takes a number of them."),
    ],
)  # fmt: skip
def test_the_sentences_of_what_is_no_format(arguments: tuple[Any, ...], sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        Format(*arguments)
    assert str(caught.value) == sentence


def test_the_sentence_of_a_text_that_is_no_format() -> None:
    with pytest.raises(UsageError) as caught:
        Format.parse("q4_k")
    assert str(caught.value) == (
        "Format 'q4_k' is not known; write for example int4-g64, int8-g128, int4-channel, sign-g128, ternary-g64, "
        "nf4-g64, mixed-g128-c768, factors-1.6, float16 or float32."
    )


@pytest.mark.parametrize("bits", [8, 4])
def test_each_token_of_a_batch_has_a_scale_of_its_own(bits: int) -> None:
    x = torch.randn((2, 3, 40), generator=torch.Generator().manual_seed(6)) * torch.tensor([1.0, 10.0, 0.1])[:, None]
    q, scale, sums = formats.quantize_activation(x, bits)
    assert (q.shape, scale.shape, sums.shape) == ((2, 3, 128), (2, 3), (2, 3, 4))
    assert (q.dtype, scale.dtype, sums.dtype) == (torch.int8, torch.float32, torch.int32)
    high = {8: 127, 4: 7}[bits]
    torch.testing.assert_close(scale, x.abs().amax(-1) / high, rtol=2**-22, atol=0)
    for batch in range(2):
        for token in range(3):
            alone = formats.quantize_activation(x[batch, token][None], bits)
            assert all(torch.equal(a[batch, token], b[0]) for a, b in zip((q, scale, sums), alone, strict=True))


def test_the_least_token_that_counts() -> None:
    """A largest magnitude of 2⁻¹⁰⁰ counts as zero, the next float32 does not."""
    least = torch.tensor([[2.0**-100, 0.0], [2.0**-100 * (1 + 2.0**-23), 0.0]])
    q, _, _ = formats.quantize_activation(least)
    assert q[:, 0].tolist() == [0, 127]


@pytest.mark.parametrize("static", [False, True])
def test_the_sums_of_a_quantised_activation_are_int32(static: bool) -> None:
    x = torch.full((1, 70), 3.0)
    both = formats.quantize_activation_static(x, torch.tensor([0.5])) if static else formats.quantize_activation(x)
    code = 6 if static else 127
    assert both[0].dtype == torch.int8 and both[2].dtype == torch.int32
    assert both[2].tolist() == [[32 * code, 32 * code, 6 * code, 0]]
