"""Parts of rows, and matrices that must be finite."""

from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from hikui.lowering.errors import HikuiError
from hikui.lowering.formats import ROWS
from hikui.lowering.ir.program import Program
from hikui.passes.matrices import PART, finite_rows, load_finite, row_parts
from tests.passes.helpers import program_of, random


@given(n=st.integers(0, 5000), k=st.integers(0, 2 * PART // ROWS), times=st.integers(1, 3))
def test_parts_cover_all_rows_once_in_whole_blocks(n: int, k: int, times: int) -> None:
    parts = row_parts(n, k, times)
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(n))
    sizes = [part.stop - part.start for part in parts]
    assert all(size % ROWS == 0 for size in sizes[:-1])
    assert all(size * k <= times * PART or size <= ROWS for size in sizes)
    # No smaller than need be: one block more would not fit.
    assert all((size + ROWS) * k > times * PART for size in sizes[:-1])


@pytest.mark.parametrize(
    ("n", "k", "times", "first"),
    [(40000, 4096, 1, 1024), (40000, 4096, 2, 2048), (40000, 4097, 1, 1008), (64, PART, 1, 16), (64, PART, 2, 16)],
)
def test_the_size_of_a_part(n: int, k: int, times: int, first: int) -> None:
    """4 Mi weights: 1024 rows of 4096 columns; of rows that are too wide one block."""
    assert row_parts(n, k, times)[0] == slice(0, first)


def test_a_matrix_of_no_columns_is_one_part() -> None:
    assert row_parts(100, 0) == [slice(0, 100)]


def _program(weight: torch.Tensor) -> Program:
    body: Callable[..., torch.Tensor] = lambda x, a__weight: torch.nn.functional.linear(x, a__weight)  # noqa: E731
    return program_of(body, embedding=random(24, weight.shape[1]), a__weight=weight)


def test_rows_of_a_finite_matrix() -> None:
    weight = random(5, 8)
    program = _program(weight)
    node = next(node for node in program.weight_nodes() if program.weight_of(node) == "a.weight")
    assert torch.equal(load_finite(program, node, "s"), weight)
    assert torch.equal(load_finite(program, node, "s", slice(1, 4)), weight[1:4])
    program.store.put("half", weight.half())
    got = finite_rows(program.store, "half", "s", slice(3, 5))
    assert got.dtype == torch.float32 and torch.equal(got, weight[3:5].half().float())


def test_values_that_are_no_numbers_are_counted_and_named() -> None:
    weight = random(5, 8)
    weight[2, 3], weight[2, 4], weight[4, 0] = torch.nan, torch.inf, -torch.inf
    program = _program(weight)
    node = next(node for node in program.weight_nodes() if program.weight_of(node) == "a.weight")
    sentence = (
        r"^Site layers\.0\.up: {} of {} values of 'a\.weight' are NaN or infinite; mend or replace the checkpoint\.$"
    )
    with pytest.raises(HikuiError, match=sentence.format(3, 40)):
        load_finite(program, node, "layers.0.up")
    with pytest.raises(HikuiError, match=sentence.format(2, 16)):
        load_finite(program, node, "layers.0.up", slice(1, 3))
    assert torch.equal(load_finite(program, node, "layers.0.up", slice(0, 2)), weight[:2])
