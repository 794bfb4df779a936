"""The hikui ops: opcheck, and each reference against a plain computation in float64."""

import math

import pytest
import torch
from torch import Tensor

import hikui.lowering.ir.dialect  # noqa: F401
from hikui.lowering import formats
from hikui.lowering.formats import KINDS, Format

ops = torch.ops.hikui
G = torch.Generator().manual_seed(0)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=G)


def packed(fmt: Format, n: int, k: int) -> formats.Packed:
    if not fmt.is_integer:
        return formats.pack(fmt, random(n, k))
    codes = []
    for part in fmt.segments(k):
        levels = torch.tensor(part.format.levels)
        codes.append(levels[torch.randint(0, len(levels), (n, part.stop - part.start), generator=G)])
    return formats.pack(fmt, torch.cat(codes, 1), torch.rand((n, fmt.groups(k)), generator=G) + 0.1)


INT4 = packed(Format("int4", 32), 21, 100)
A, B = packed(Format("float16"), 3, 100), packed(Format("float16"), 21, 3)
X = random(1, 5, 100)
Q = formats.quantize_activation(X)
CACHE = (random(1, 2, 16, 8), random(1, 2, 16, 8))
CODES, SCALES = zip(*(formats.quantize_cache(cache, "int4") for cache in CACHE), strict=True)

IDS = torch.tensor([[3, 0, 20, 3, 16]])

CASES = {
    "embedding": (IDS, INT4.weight, INT4.scale, "int4-g32", 21, 100),
    "causal_mask": (torch.tensor([2]), 3, 16),
    "cache_update": (CACHE[0], random(1, 2, 3, 8), torch.tensor([4])),
    "cache_update_quantized": (CODES[0], SCALES[0], random(1, 2, 3, 8), torch.tensor([4])),
    "linear": (X, INT4.weight, INT4.scale, random(21), "int4-g32", 21),
    "quantize_activation": (X,),
    "quantize_activation_int4": (X,),
    "quantize_activation_static": (X, torch.tensor([0.01])),
    "linear_a8": (*Q, INT4.weight, INT4.scale, random(21), "int4-g32", 21),
    "linear_a8_branch": (*Q, INT4.weight, INT4.scale, None, X, A.weight, B.weight, "int4-g32", 21),
    "rms_norm": (X, random(100), 1e-5),
    "rms_norm_quantize": (X, random(100), 1e-5),
    "swiglu": (X, random(1, 5, 100)),
    "swiglu_quantize": (X, random(1, 5, 100)),
    "rotary": (random(1, 4, 5, 8), random(1, 5, 8), random(1, 5, 8)),
    "attention": (random(1, 4, 3, 8), random(1, 2, 3, 8), random(1, 2, 3, 8), *CACHE, torch.tensor([6]), 0.3),
    "attention_quantized": (
        random(1, 4, 3, 8),
        random(1, 2, 3, 8),
        random(1, 2, 3, 8),
        *CODES,
        *SCALES,
        torch.tensor([6]),
        0.3,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(ops, name).default, CASES[name])


PLAIN = [f"{kind}-{group}" for kind in KINDS for group in ("g32", "g64", "g128", "channel")]
MIXED = ["mixed-g32-c32", "mixed-g64-c64", "mixed-g32-c96"]


@pytest.mark.parametrize("text", [f"{kind}-g32" for kind in KINDS] + ["mixed-g32-c64", "sign-channel"])
def test_opcheck_of_every_kind(text: str) -> None:
    weight, scale = packed(Format.parse(text), 21, 100)
    torch.library.opcheck(ops.linear.default, (X, weight, scale, None, text, 21))
    torch.library.opcheck(ops.linear_a8.default, (*Q, weight, scale, None, text, 21))
    torch.library.opcheck(ops.linear_a8_branch.default, (*Q, weight, scale, None, X, A.weight, B.weight, text, 21))


@pytest.mark.parametrize("text", [*(f"{kind}-g64" for kind in KINDS), "int8-channel", "float16", "float32"])
def test_embedding_looks_rows_up(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, scale = packed(Format.parse(text), 21, 100)
    torch.library.opcheck(ops.embedding.default, (IDS, weight, scale, text, 21, 100))
    dense = formats.unpack(Format.parse(text), weight, scale, 21, 100)
    assert torch.equal(ops.embedding(IDS, weight, scale, text, 21, 100), dense[IDS])
    monkeypatch.setattr("hikui.lowering.ir.dialect._LOOKUPS", 2)
    assert torch.equal(ops.embedding(IDS[0], weight, scale, text, 21, 100), dense[IDS[0]])
    assert ops.embedding(IDS[:, :0], weight, scale, text, 21, 100).shape == (1, 0, 100)
    for wrong in (-1, 21):
        with pytest.raises(IndexError, match="is none of the embedding's 21 rows"):
            ops.embedding(torch.tensor([2, wrong]), weight, scale, text, 21, 100)


def test_opcheck_of_int8_caches() -> None:
    (keys, key_scale), (values, value_scale) = (formats.quantize_cache(cache, "int8") for cache in CACHE)
    new, past = random(1, 2, 3, 8), torch.tensor([4])
    torch.library.opcheck(ops.cache_update_quantized.default, (keys, key_scale, new, past))
    operands = (random(1, 4, 3, 8), new, new, keys, values, key_scale, value_scale, past, 0.3)
    torch.library.opcheck(ops.attention_quantized.default, operands)


@pytest.mark.parametrize("shape", [(5,), (1, 7), (2, 3, 130)])
def test_a_static_step_is_no_alias(shape: tuple[int, ...]) -> None:
    torch.library.opcheck(ops.quantize_activation_static.default, (random(*shape), torch.tensor([0.01])))


@pytest.mark.parametrize("text", [*PLAIN, *MIXED])
def test_linear_dequantises(text: str) -> None:
    fmt, n, k = Format.parse(text), 21, 100
    weight, scale = packed(fmt, n, k)
    assert scale is not None
    bias, group = random(n), fmt.group_size(k)
    codes, scales = formats.unpack_codes(fmt, weight, n, k).double(), formats.unpack_scale(fmt, scale, n, k).double()
    want = bias.double().expand(1, 5, n).clone()
    for column in range(k):
        want += X[..., column, None].double() * codes[:, column] * scales[:, column // group]
    got = ops.linear(X, weight, scale, bias, text, n)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("text", [*PLAIN, *MIXED])
@pytest.mark.parametrize(("n", "k"), [(21, 100), (16, 128), (5, 1200)])
def test_linear_a8_is_the_exact_integer_product(text: str, n: int, k: int) -> None:
    fmt = Format.parse(text)
    weight, scale = packed(fmt, n, k)
    assert scale is not None
    x, bias = random(1, 4, k) * 3, random(n)
    q, q_scale, q_sums = formats.quantize_activation(x)
    dense = formats.unpack(fmt, weight, scale, n, k).double()
    want = q[..., :k].double() * q_scale[..., None].double() @ dense.T + bias.double()
    got = ops.linear_a8(q, q_scale, q_sums, weight, scale, bias, text, n)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-5 * float(want.abs().max()))


def test_the_branch_is_added_in_float() -> None:
    q, q_scale, q_sums = Q
    plain = ops.linear_a8(q, q_scale, q_sums, INT4.weight, INT4.scale, None, "int4-g32", 21)
    a = formats.unpack(Format("float16"), A.weight, None, 3, 100).double()
    b = formats.unpack(Format("float16"), B.weight, None, 21, 3).double()
    got = ops.linear_a8_branch(q, q_scale, q_sums, INT4.weight, INT4.scale, None, X, A.weight, B.weight, "int4-g32", 21)
    torch.testing.assert_close(got.double(), plain.double() + X.double() @ a.T @ b.T, rtol=1e-5, atol=1e-4)


def test_attention_is_causal_and_leaves_other_rows_of_the_cache() -> None:
    q, k, v, keys, values, past, scale = CASES["attention"]
    out, new_keys, new_values = ops.attention(q, k, v, keys, values, past, scale)
    start, tokens = int(past), q.shape[2]
    assert torch.equal(new_keys[:, :, start : start + tokens], k)
    assert torch.equal(new_keys[:, :, :start], keys[:, :, :start])
    assert torch.equal(new_values[:, :, start + tokens :], values[:, :, start + tokens :])
    for head in range(4):
        for row in range(tokens):
            seen = start + row + 1
            score = new_keys[0, head // 2, :seen].double() @ q[0, head, row].double() * scale
            want = torch.softmax(score, 0) @ new_values[0, head // 2, :seen].double()
            torch.testing.assert_close(out[0, head, row].double(), want, rtol=1e-5, atol=1e-6)


def test_rotary_turns_pairs_of_halves() -> None:
    x, angle = random(1, 2, 3, 8), random(1, 3, 4)
    both = torch.cat((angle, angle), -1)
    got = ops.rotary(x, both.cos(), both.sin())
    complex_x = torch.complex(x[..., :4].double(), x[..., 4:].double())
    want = complex_x * torch.polar(torch.ones_like(angle).double(), angle.double()).unsqueeze(1)
    torch.testing.assert_close(got.double(), torch.cat((want.real, want.imag), -1), rtol=1e-5, atol=1e-6)


def test_rms_norm_and_swiglu() -> None:
    x, weight, up = X.double(), CASES["rms_norm"][1].double(), CASES["swiglu"][1].double()
    want = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    torch.testing.assert_close(ops.rms_norm(X, weight.float(), 1e-5).double(), want, rtol=1e-5, atol=1e-6)
    want = x / (1 + torch.exp(-x)) * up
    torch.testing.assert_close(ops.swiglu(X, up.float()).double(), want, rtol=1e-5, atol=1e-6)
    y, q, scale, sums = ops.swiglu_quantize(X, up.float())
    for got, due in zip((q, scale, sums), formats.quantize_activation(y), strict=True):
        assert torch.equal(got, due)


def test_the_mask_hides_what_comes_later() -> None:
    mask = ops.causal_mask(torch.tensor([2]), 3, 8)[0, 0]
    for row in range(3):
        assert mask[row].tolist() == [0.0 if column <= 2 + row else -math.inf for column in range(8)]


def test_a_tall_matrix_is_multiplied_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, scale = packed(Format("int4", 32), 100, 64)
    assert scale is not None
    q = formats.quantize_activation(random(3, 64))
    whole = ops.linear_a8(*q, weight, scale, None, "int4-g32", 100)
    monkeypatch.setattr("hikui.lowering.ir.dialect._BLOCKS", 2)
    assert torch.equal(ops.linear_a8(*q, weight, scale, None, "int4-g32", 100), whole)
