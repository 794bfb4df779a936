"""The machine's own limits: reading memory, and multiply-accumulates of each unit. limits.c does the work."""

import ctypes
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.kernels.contestant import Prepared, Workload
from hikui.backends.kernels.build import compiler
from hikui.lowering.artefact.target import machine_triple

STREAMS = 8
"""Streams a thread in the read that cold products are given as a share of."""

_MEMORY = 256 << 20
_L2 = 384 << 10
_ROUNDS = 300_000
_FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread")


class Limits:
    """The compiled measurements.

    Raises:
        CalledProcessError: the C compiler fails.
    """

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "limits.so"
            source = Path(__file__).with_name("limits.c")
            subprocess.run([*compiler(machine_triple()), *_FLAGS, str(source), "-o", str(path)], check=True)
            self._library = ctypes.CDLL(str(path))
        self._library.limits_peak.restype = ctypes.c_double
        self._library.limits_peak_name.restype = ctypes.c_char_p
        self.units: tuple[str, ...] = ()
        while name := self._library.limits_peak_name(len(self.units)):
            self.units += (name.decode(),)
        # From the allocator that holds the kernels' weights, so that pages are of the same size; written, so that
        # they are there.
        self._data = torch.ones(_MEMORY, dtype=torch.uint8)

    def read(self, nbytes: int, streams: int, threads: int, repeats: int = 1) -> None:
        """Reads so many bytes `repeats` times."""
        address, size = ctypes.c_void_p(self._data.data_ptr()), ctypes.c_size_t(nbytes)
        self._library.limits_read(address, size, streams, ctypes.c_size_t(0), threads, ctypes.c_int64(repeats))

    def compute(self, unit: int, rounds: int, threads: int) -> float:
        """Keeps a unit busy; returns the multiply-accumulates."""
        return float(self._library.limits_peak(unit, ctypes.c_int64(rounds), threads))

    def survey(self, repeats: int = 5) -> dict[str, float]:
        """Every limit for one and two threads: GB/s and GMAC/s, the median of `repeats`."""
        found = {}
        for threads in (1, 2):
            for streams in (1, 2, 4, 8, 16) if threads == 1 else (1, STREAMS):
                seconds = _seconds(partial(self.read, _MEMORY, streams, threads), threads, repeats)
                found[f"read_{streams}_streams_{threads}t_gbs"] = round(_MEMORY / seconds / 1e9, 1)
            again = 200
            seconds = _seconds(partial(self.read, _L2 * threads, STREAMS, threads, again), threads, repeats)
            found[f"read_l2_{threads}t_gbs"] = round(_L2 * threads * again / seconds / 1e9, 1)
            for unit, name in enumerate(self.units):
                done = self.compute(unit, _ROUNDS, threads)
                seconds = _seconds(partial(self.compute, unit, _ROUNDS, threads), threads, repeats)
                found[f"{name}_{threads}t_gmacs"] = round(done / seconds / 1e9, 1)
        return found


def _seconds(work: Callable[[], object], threads: int, repeats: int) -> float:
    clock = clock_of(threads)
    times = []
    for _ in range(repeats + 1):
        start = clock()
        work()
        times.append(clock() - start)
    return float(np.median(times[1:]))


def clock_of(threads: int) -> Callable[[], float]:
    """What a number of threads is timed by: the process's CPU time for one, which others disturb least."""
    return time.process_time if threads == 1 else time.perf_counter


@dataclass(frozen=True)
class ReadLimit:
    """Reading the memory, as a contestant: its `nbytes` a step."""

    limits: Limits
    name: str = f"read_{STREAMS}_streams"
    ours: bool = False

    def prepare(self, workload: Workload) -> Prepared:
        return Prepared([partial(self.limits.read, _MEMORY, STREAMS, workload.threads)], 1, _MEMORY, 0)


@dataclass(frozen=True)
class PeakLimit:
    """The best integer unit, as a contestant."""

    limits: Limits
    unit: int = 0
    ours: bool = False

    @property
    def name(self) -> str:
        return self.limits.units[self.unit]

    def prepare(self, workload: Workload) -> Prepared:
        macs = self.limits.compute(self.unit, _ROUNDS, workload.threads)
        step = partial(self.limits.compute, self.unit, _ROUNDS, workload.threads)
        return Prepared([step], 1, 0, 0, macs=macs)
