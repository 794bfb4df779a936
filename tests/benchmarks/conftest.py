"""What benchmarks set for the whole process is put back for the other tests."""

from collections.abc import Iterator

import pytest
import torch
from benchmarks.kernels import ours


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    if ours.library.cache_info().currsize:
        ours.set_threads(1)
