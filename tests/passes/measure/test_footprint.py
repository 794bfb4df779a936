"""What a walk will need: numbers worked out by hand for a program of two tied groups."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hikui.lowering.errors import HikuiError
from hikui.lowering.ir.program import SITE, Program
from hikui.lowering.pipeline.contract import PassContext
from hikui.passes.graph import blocks, float_sites
from hikui.passes.measure import footprint as module
from hikui.passes.measure.footprint import Footprint, estimate, gigabytes, refuse_what_cannot_fit, value_nbytes
from tests.passes.helpers import lower, program_of, random

K, N, V = 32, 48, 24
LENGTHS = (5, 3)


@cache
def program(rows: int = V) -> Program:
    """x·a and x·b are tied, relu(x·a)·c is a group of its own; g is read twice before them."""

    def body(x: Tensor, a: Tensor, b: Tensor, c: Tensor, g: Tensor) -> Tensor:
        x = x * g + g
        hidden, beside = F.linear(x, a), F.linear(x, b)
        return F.linear(F.relu(hidden), c) + beside

    held = {"a": random(N, K), "b": random(V, K, seed=1), "c": random(V, N), "g": random(K)}
    return lower(program_of(body, embedding=random(rows, K), **held), "canonicalise")


def found(lengths: tuple[int, ...] = LENGTHS, rows: int = V, **options: int) -> Footprint:
    chosen = {"streams": 1, "matrices": 1, "spare": 0, "corrected": False, "workers": 1, **options}
    texts = [torch.zeros(1, length, dtype=torch.int64) for length in lengths]
    return estimate(program(rows), blocks(float_sites(program(rows))), texts, **chosen)  # type: ignore[arg-type]


def test_the_program_is_the_one_that_the_numbers_are_of() -> None:
    groups = [[node.meta[SITE] for node in group] for block in blocks(float_sites(program())) for group in block]
    assert groups == [["a", "b"], ["c"]]
    called = [str(node.target) for node in program().graph.nodes if node.op == "call_function"]
    assert [name.split(".")[1] for name in called] == [
        "embedding", "mul", "add", "mul", "add", "linear", "linear", "relu", "linear", "add",
    ]  # fmt: skip


# Read before a: the table and g, 4·24·32 + 4·32 = 3200; at once alive for 5 tokens at most x, 0·past and their sum,
# 640 + 4 + 640 = 1284. Before c: a and b, 4·48·32 + 4·24·32 = 9216; relu's operand and result, 2·4·5·48 = 1920.
# A K×K matrix: 8·32² = 8192 and 8·48² = 18432. Packed at most a byte a weight: 48·32 + 24·32 = 2304 and 24·48 = 1152.
# A part of the rows, 32 bytes a weight: 48·32·32 = 49152 and 24·48·32 = 36864.
# In float32: 4·2304 = 9216 and 4·1152 = 4608.
# Alive between stages: x before a, 4·8·32 = 1024 for both texts; before c relu's result and x·b, 4·8·(48 + 24) = 2304.
ALIVE = 2304

PEAKS: dict[str, tuple[Mapping[str, Any], int, str, int]] = {
    # Measuring takes 3200 + 1284 + 8192 = 12676 and 9216 + 1920 + 18432 = 29568, rounding c 56448.
    "a's rounding": ({}, 8192 + 49152 + 2304, "a", 8192),
    "c's rounding, by the spare matrix": ({"spare": 1}, 2 * 18432 + 36864 + 1152, "c", 18432),
    "three spare matrices": ({"spare": 3}, 4 * 18432 + 36864 + 1152, "c", 18432),
    "two threads": ({"workers": 2}, 8192 + 2 * 49152 + 2304, "a", 8192),
    # The cross term is used up before rounding begins, and the corrected matrices are held.
    "corrected": ({"corrected": True, "matrices": 2}, 8192 + 9216 + 49152 + 2304, "a", 2 * 8192),
    "corrected, without a Gram matrix": ({"corrected": True}, 9216 + 49152 + 2304, "a", 8192),
    "no matrices": ({"matrices": 0}, 49152 + 2304, "a", 0),
    # Of a large table what is measured at a counts most: 4·5000·32 + 128 + 1284 + 8192; g is counted once.
    "a's measuring": ({"rows": 5000}, 640000 + 128 + 1284 + 8192, "a", 8192),
    "with two threads": ({"rows": 5000, "workers": 2}, 640000 + 128 + 2 * 1284 + 8192, "a", 8192),
    "with two matrices": ({"rows": 5000, "matrices": 2}, 640000 + 128 + 1284 + 2 * 8192, "a", 2 * 8192),
}


@pytest.mark.parametrize("name", PEAKS)
def test_the_peak(name: str) -> None:
    options, peak, site, matrices = PEAKS[name]
    assert found(**options) == Footprint(peak + ALIVE, 0, site, matrices, ALIVE)


def test_long_texts_count_where_they_are_widest() -> None:
    """1000 tokens: relu's two tensors, 2·4·1000·48, in each thread; kept are relu's result and x·b."""
    kept = 4 * 1000 * (48 + 24) + 4 * 3 * (48 + 24)
    assert found((1000, 3)) == Footprint(9216 + 384000 + 18432 + kept, 0, "c", 18432, kept)
    assert found((3, 1000), workers=3).memory == 9216 + 3 * 384000 + 18432 + kept


def test_each_text_is_kept_though_lengths_are_alike() -> None:
    assert found((5, 5, 5, 3)).activations == 4 * 18 * (48 + 24)


def test_parts_of_the_rows_bound_what_is_rounded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of one block: 16·32·32 and 16·48·32 bytes."""
    monkeypatch.setattr("hikui.passes.matrices.PART", 16 * K)
    assert found() == Footprint(18432 + 16 * 48 * 32 + 1152 + ALIVE, 0, "c", 18432, ALIVE)
    # With nothing of K×K, a takes more in spite of it: 16·32·32 + 2304 is less than 9216 + 1920 before c.
    assert found(matrices=0).memory == 16 * 48 * 32 + 1152 + ALIVE


def test_activations_beyond_what_memory_keeps_go_to_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ACTIVATION_MEMORY", 1000)
    rounding = 8192 + 49152 + 2304
    assert found(streams=2) == Footprint(rounding + 2000, 2 * ALIVE - 2000, "a", 8192, 2000)
    monkeypatch.setattr(module, "ACTIVATION_MEMORY", ALIVE)
    assert found(streams=2) == Footprint(rounding + 2 * ALIVE, 0, "a", 8192, 2 * ALIVE)


def test_bytes_of_a_value() -> None:
    nodes = {node.name: node for node in program().graph.nodes}
    assert value_nbytes(nodes["tokens"], 7) == 8 * 7
    assert value_nbytes(nodes["past"], 7) == 8
    assert value_nbytes(nodes["embedding"], 7) == 4 * 7 * K
    with program().fake_mode:
        several = (torch.empty(3, dtype=torch.int8), 4, torch.empty(2, 5, dtype=torch.float64))
    assert value_nbytes(SimpleNamespace(meta={"val": several}), 7) == 3 + 80  # type: ignore[arg-type]
    assert value_nbytes(SimpleNamespace(meta={"val": 4}), 7) == 0  # type: ignore[arg-type]


def test_what_it_says() -> None:
    assert gigabytes(1_234_567_890) == "1.23 GB"
    said = "about 2.00 GB of memory{}, most at s (0.25 GB of K×K matrices, 1.00 GB of activations)"
    assert str(Footprint(2 * 10**9, 0, "s", 25 * 10**7, 10**9)) == said.format("")
    assert str(Footprint(2 * 10**9, 3 * 10**9, "s", 25 * 10**7, 10**9)) == said.format(" and 3.00 GB on disk")


def test_only_what_does_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def usage(folder: Path) -> SimpleNamespace:
        asked.append(folder)
        return SimpleNamespace(free=500)

    monkeypatch.setattr("shutil.disk_usage", usage)
    context = PassContext(memory=1000, scratch=tmp_path / "not" / "there")
    refuse_what_cannot_fit(Footprint(1000, 500, "s", 0, 0), context)
    assert asked == [tmp_path], "the nearest folder that exists tells how much is free"
    with pytest.raises(HikuiError, match=r"^It needs about .* of memory.*, and 0.00 GB of memory are there; use fewer"):
        refuse_what_cannot_fit(Footprint(1001, 0, "s", 0, 0), context)
    with pytest.raises(HikuiError, match=rf"on disk.*, and 0.00 GB are free at {tmp_path}; use fewer or shorter"):
        refuse_what_cannot_fit(Footprint(1000, 501, "s", 0, 0), context)
    monkeypatch.setattr(module, "available_memory", lambda: 700)
    with pytest.raises(HikuiError, match="of memory are there"):
        refuse_what_cannot_fit(Footprint(701, 0, "s", 0, 0), PassContext(scratch=tmp_path))
    refuse_what_cannot_fit(Footprint(700, 0, "s", 0, 0), PassContext(scratch=tmp_path))
    monkeypatch.setattr(module, "available_memory", lambda: None)
    refuse_what_cannot_fit(Footprint(10**15, 0, "s", 0, 0), PassContext(scratch=tmp_path))
