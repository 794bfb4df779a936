"""hikui's own products as contestants: int8 activations, quantised within the time as the other libraries do it."""

import ctypes
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import tvm
from numpy.typing import NDArray

from benchmarks.kernels.contestant import Prepared, Step, UnavailableError, Workload
from hikui.backends.kernels import SYMBOLS
from hikui.backends.kernels.standalone import Library, link
from hikui.backends.measurement import GROUP, Operands, format_of
from hikui.lowering.artefact.target import core_count, resolve

KINDS = ("sign", "mixed", "int2", "ternary", "int3", "int4", "nf4", "fp4", "int8")
RANK = 64
BRANCH_KINDS = ("int3", "int4")


@cache
def library() -> Library:
    """The kernels for this machine, built once."""
    target = resolve("host")
    with tempfile.TemporaryDirectory() as folder:
        return Library(link(target.triple, target.isas, Path(folder) / "kernels.so"))


def set_threads(threads: int) -> None:
    """Gives the kernels that many threads of TVM's pool."""
    launch = None
    if threads > 1:
        # TVM's own guess leaves half of the cores of an x86 idle, and it would bind the thread that all share.
        os.environ.setdefault("TVM_NUM_THREADS", str(core_count()))
        os.environ.setdefault("TVM_BIND_THREADS", "0")
        tvm.get_global_func("runtime.config_threadpool")(1, threads)
        runtime = ctypes.CDLL(next(str(p) for p in Path(tvm.__file__).parent.rglob("libtvm_runtime.so")))
        launch = ctypes.cast(runtime.TVMBackendParallelLaunch, ctypes.c_void_p).value
    library().set_launch(launch)


@dataclass(frozen=True)
class Product:
    """A product with weights of one kind in groups of 128.

    Attributes:
        branch: `fused` or `separate` for a low-rank branch of rank 64; empty without one.
    """

    kind: str
    branch: str = ""
    ours: bool = True

    @property
    def name(self) -> str:
        return f"{self.kind}_branch{RANK}_{self.branch}" if self.branch else self.kind

    def prepare(self, workload: Workload) -> Prepared:
        symbol = f"hikui_linear_a8_{'branch_' if self.branch == 'fused' else ''}{self.kind}"
        if symbol not in SYMBOLS:
            raise UnavailableError(f"the library has no {symbol}")
        set_threads(workload.threads)
        fmt = format_of(self.kind, workload.k, GROUP)
        nbytes = fmt.nbytes(workload.n, workload.k)
        rank = RANK if self.branch else 0
        operands = Operands.random(fmt, workload.m, workload.n, workload.k, workload.copies(nbytes), rank)
        quantise = operands.quantise(library())
        branch = operands.separate_branch(library()) if self.branch == "separate" else []
        steps = [
            _Together((quantise, product, *branch))
            for product in operands.products(library(), fused=self.branch == "fused")
        ]

        def result() -> NDArray[np.float32]:
            return np.asarray(operands.y.numpy(), np.float32)

        nbytes += 2 * rank * (workload.n + workload.k)
        bits = fmt.true_bits(workload.n, workload.k) + 16 * rank * (workload.n + workload.k) / (workload.n * workload.k)
        return Prepared(steps, 1, nbytes, bits, result=result)


@dataclass(frozen=True)
class Quantisation:
    """The quantisation of the activations alone."""

    name: str = "quantise"
    ours: bool = True

    def prepare(self, workload: Workload) -> Prepared:
        set_threads(workload.threads)
        operands = Operands.random(format_of("int4", workload.k), workload.m, 16, workload.k, 1)
        return Prepared([operands.quantise(library())], 1, 0, 0)


class _Together:
    """Steps taken one after another as one."""

    def __init__(self, steps: Iterable[Step]) -> None:
        self._steps = tuple(steps)

    def __call__(self) -> None:
        for step in self._steps:
            step()


def contestants() -> list[Product]:
    """Every kind, and the branch in both ways."""
    plain = [Product(kind) for kind in KINDS]
    return plain + [Product(kind, branch) for kind in BRANCH_KINDS for branch in ("fused", "separate")]
