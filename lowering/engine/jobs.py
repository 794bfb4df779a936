"""Independent work, one task each, on this machine's cores or on a cluster.

The engine is somebody else's: Python's process pool, or Ray where it is installed (`pip install 'hikui[ray]'`), which
also reaches other machines once `ray start` has joined them. Tasks are plain functions of picklable arguments, so that
both can run them, and results come in the order of the tasks.
"""

import importlib.util
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from hikui.lowering.errors import HikuiError, UsageError

T = TypeVar("T")
R = TypeVar("R")

Progress = Callable[[int, int], None]
"""Called with how many tasks are done, and how many there are."""


@dataclass(frozen=True)
class Jobs:
    """How independent work is done.

    Attributes:
        workers: tasks at a time; 1 does them here, one after the other. For Ray, the machines' cores bound it too.
        engine: `processes`, or `ray`.
    """

    workers: int = 1
    engine: Literal["processes", "ray"] = "processes"

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise UsageError(f"{self.workers} jobs at a time cannot do anything; give 1 or more.")
        if self.engine == "ray" and importlib.util.find_spec("ray") is None:
            raise UsageError("Ray is not installed; install hikui[ray], or choose the engine 'processes'.")

    def map(self, function: Callable[[T], R], items: Sequence[T], progress: Progress | None = None) -> list[R]:
        """The function's result for each item, in their order.

        Args:
            function: importable by name, since other processes call it.
            items: picklable.
            progress: called whenever a task is done.

        Raises:
            HikuiError: a process died; or whatever the function raised.
        """
        out: dict[int, R] = {}
        for index, result in self.results(function, items):
            out[index] = result
            if progress is not None:
                progress(len(out), len(items))
        return [out[index] for index in range(len(items))]

    def results(self, function: Callable[[T], R], items: Sequence[T]) -> Iterator[tuple[int, R]]:
        """(index, result) of each item as soon as it is there."""
        if self.engine == "ray":
            yield from _with_ray(function, items, self.workers)
        elif self.workers == 1 or len(items) < 2:
            for index, item in enumerate(items):
                yield index, function(item)
        else:
            yield from _with_processes(function, items, min(self.workers, len(items)))


def _with_processes(function: Callable[[T], R], items: Sequence[T], workers: int) -> Iterator[tuple[int, R]]:
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    # Forking after torch has started its threads can hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_limit_threads, initargs=(threads,)) as pool:
        futures: dict[Future[R], int] = {pool.submit(function, item): index for index, item in enumerate(items)}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise HikuiError(
                "A process that did part of the work ended before it was done, and left no reason; fewer --jobs take "
                "less memory, and --jobs 1 shows an error where there is one."
            ) from error
        finally:
            for future in futures:
                future.cancel()


def _limit_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def _with_ray(function: Callable[[T], R], items: Sequence[T], workers: int) -> Iterator[tuple[int, R]]:
    ray: Any = importlib.import_module("ray")
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False)
    task = ray.remote(function)
    waiting: dict[Any, int] = {}
    todo = iter(enumerate(items))
    while True:
        while len(waiting) < workers and (entry := next(todo, None)) is not None:
            waiting[task.remote(entry[1])] = entry[0]
        if not waiting:
            return
        (done,), _ = ray.wait(list(waiting), num_returns=1)
        try:
            yield waiting.pop(done), ray.get(done)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
