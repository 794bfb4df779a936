"""Speeds of kinds of weights, and what products take by them."""

import math

import hypothesis.strategies as st
import pytest
from hypothesis import given

from hikui.lowering.errors import UsageError
from hikui.lowering.formats import KINDS, Format
from hikui.passes.precision.latency import Speeds


@given(of=st.dictionaries(st.sampled_from(sorted(KINDS)), st.floats(1e-3, 1e6), min_size=1))
def test_text_and_back(of: dict[str, float]) -> None:
    assert Speeds.parse(str(Speeds(of))) == Speeds(of)


@pytest.mark.parametrize("text", ["int4", "int9=3", "int4=0", "int4=-1", "int4=nan", "int4=inf", "int4=1|int4=2", "=3"])
def test_what_is_no_speed(text: str) -> None:
    with pytest.raises(UsageError, match="is no speed of a kind of weights; write"):
        Speeds.parse(text)


def test_time_is_weights_by_speed_and_padding_is_multiplied_too() -> None:
    speeds = Speeds({"int4": 10.0, "sign": 40.0})
    assert speeds.picoseconds(Format.parse("int4-channel"), 64, 100) == 64 * 128 * 100
    # 128 columns of int4 and 128 of signs, of which 28 are padding.
    assert speeds.picoseconds(Format.parse("mixed-g128-c128"), 64, 228) == 64 * 128 * (100 + 25)
    assert speeds.picoseconds(Format.parse("int4-g64"), 1, 32) == math.ceil(32 * 100)
    # Floats are read as int8's bytes are, and have no padding.
    assert Speeds({"int8": 20.0}).picoseconds(Format.parse("float16"), 64, 100) == 64 * 100 * 2 * 50


def test_kinds_without_a_speed_are_named() -> None:
    formats = [Format.parse(name) for name in ("int4-g64", "mixed-g128-c128", "int3-channel", "float16")]
    assert Speeds({"int4": 1.0}).lacks(formats) == ["int3", "int8", "sign"]
    assert Speeds({"int4": 1.0, "sign": 1.0}).lacks(formats[:2]) == []
