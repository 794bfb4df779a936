"""Threads and processes: order, laziness, errors, and results that do not depend on how many there are."""

import importlib.util
import os

import pytest
import torch

from hikui.lowering.engine.jobs import Jobs
from hikui.lowering.engine.workers import Workers
from hikui.lowering.errors import HikuiError, UsageError


def square(value: int) -> int:
    return value * value


def refuse(value: int) -> int:
    raise HikuiError(f"{value} is refused.")


def die(value: int) -> int:
    os._exit(9)


@pytest.mark.parametrize("count", [1, 3])
def test_results_come_in_order_and_torch_is_alone_in_its_thread(count: int) -> None:
    before = torch.get_num_threads()
    with Workers(count) as workers:
        assert list(workers.map(lambda item: (item, torch.get_num_threads(), torch.is_grad_enabled()), range(7))) == [
            (item, 1, False) for item in range(7)
        ]
    assert torch.get_num_threads() == before


def test_items_are_taken_as_they_are_needed() -> None:
    taken: list[int] = []

    def items() -> object:
        for item in range(9):
            taken.append(item)
            yield item

    with Workers(2) as workers:
        results = workers.map(square, items())  # type: ignore[arg-type]
        assert [next(results), next(results)] == [0, 1]
        assert len(taken) <= 4
        results.close()  # type: ignore[attr-defined]


def test_an_error_comes_out_and_no_worker_is_none() -> None:
    with Workers(2) as workers, pytest.raises(HikuiError, match="1 is refused"):
        workers.each(refuse, [1, 2, 3])
    with pytest.raises(ValueError, match="cannot do anything"):
        Workers(0)


def test_jobs_here() -> None:
    steps: list[tuple[int, int]] = []
    assert Jobs().map(square, [3, 1, 2], lambda *step: steps.append(step)) == [9, 1, 4]
    assert steps == [(1, 3), (2, 3), (3, 3)]
    with pytest.raises(HikuiError, match="3 is refused"):
        Jobs().map(refuse, [3])
    with pytest.raises(UsageError, match="0 jobs at a time"):
        Jobs(0)


def test_jobs_in_processes() -> None:
    assert Jobs(2).map(square, [3, 1, 2]) == [9, 1, 4]
    with pytest.raises(HikuiError, match="is refused"):
        Jobs(2).map(refuse, [3, 4])
    with pytest.raises(HikuiError, match="ended before it was done"):
        Jobs(2).map(die, [1, 2])


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_an_engine_that_is_not_there() -> None:
    with pytest.raises(UsageError, match="Ray is not installed; install hikui"):
        Jobs(2, "ray")


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'hikui[ray]'")
def test_jobs_with_ray() -> None:
    import ray

    try:
        assert Jobs(2, "ray").map(square, [3, 1, 2]) == [9, 1, 4]
        with pytest.raises(HikuiError, match="is refused"):
            Jobs(2, "ray").map(refuse, [3, 4])
    finally:
        ray.shutdown()
