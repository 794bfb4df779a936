"""Threads for torch work whose results do not depend on how many there are.

A sum that a library splits among its threads changes in the last bit with their number, and a rounded weight with it.
So work is cut into fixed parts instead, each part is done by one thread with torch's own threads switched off, and
results are put together in the order of the parts.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


class Workers:
    """A pool of threads; while it is entered, torch uses one thread in each of them and in the caller's.

    Args:
        count: how many; by default as many as torch would use by itself (`OMP_NUM_THREADS` bounds it).

    Raises:
        ValueError: the count is below one.
    """

    def __init__(self, count: int | None = None) -> None:
        self.count = torch.get_num_threads() if count is None else count
        if self.count < 1:
            raise ValueError(f"{count} workers cannot do anything")
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> "Workers":
        self._before = torch.get_num_threads()
        torch.set_num_threads(1)
        if self.count > 1:
            self._pool = ThreadPoolExecutor(self.count, "hikui", initializer=torch.set_num_threads, initargs=(1,))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
        torch.set_num_threads(self._before)

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Results in the order of the items, at most `count` of them unread at a time; items are taken lazily.

        Gradients are off in the threads. Outside of `with`, and with one worker, everything happens in the caller's
        thread.
        """
        if self._pool is None:
            for item in items:
                yield _without_gradients(function, item)
            return
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                if len(waiting) == self.count:
                    yield waiting.popleft().result()
                waiting.append(self._pool.submit(_without_gradients, function, item))
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def each(self, function: Callable[[T], object], items: Iterable[T]) -> None:
        """As `map`, for what is done in place."""
        for _ in self.map(function, items):
            pass


def _without_gradients(function: Callable[[T], R], item: T) -> R:
    with torch.no_grad():
        return function(item)
