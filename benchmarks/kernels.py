"""Times the int4 product with one row of activations against ONNX Runtime's MatMulNBits.

Both multiply a vector with 4096×4096 weights of 4.25 true bits (block 128), quantising the activations themselves
(ONNX Runtime at accuracy_level 4). "Cold" walks over so many copies of the weights that they come from memory each
time, as in a model; "cached" repeats one product. One thread is timed by the CPU time it takes, which other processes
disturb least, two by the clock. The two libraries take turns, round by round; a figure is the median over the rounds,
with the quartiles beside it, and the ratio is the median of the rounds' ratios. A second table has the same product
with a low-rank branch of rank 16, as one fused call and as separate ones, weights cold.

    python benchmarks/kernels.py --json out.json
"""

import argparse
import ctypes
import gc
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime  # type: ignore[import-untyped]
import torch
import tvm

from hikui.backends.kernels.standalone import Call, Library, link
from hikui.lowering.formats import Format, Packed, activation_k, pack
from hikui.lowering.target import resolve

SIZE = 4096
GROUP = 128
COPIES = 20
"""20 copies of 8.9 MB: no cache of this class of machine holds them."""

CACHED_RUNS = 60
RANK = 16


@dataclass(frozen=True)
class Timing:
    """Microseconds a product: the median over the rounds and the quartiles around it."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class BranchRow:
    """One line of the table of the branch."""

    threads: int
    fused: Timing
    separate: Timing
    ratio: float


@dataclass(frozen=True)
class Row:
    """One line of the table against ONNX Runtime."""

    threads: int
    weights: str
    hikui: Timing
    onnxruntime: Timing
    ratio: float


Clock = Callable[[], float]


def onnxruntime_product(copies: int, runs: int, threads: int, clock: Clock) -> Callable[[], float]:
    """A chain of MatMulNBits nodes, as in a model; returns a function that gives the seconds of one product."""
    generator = np.random.default_rng(0)
    nodes, initialisers = [], []
    for i in range(copies):
        weight = generator.integers(0, 256, (SIZE, SIZE // GROUP, GROUP // 2), dtype=np.uint8)
        scale = np.full((SIZE, SIZE // GROUP), 1 / (4.6 * SIZE**0.5), np.float32)
        initialisers += [onnx.numpy_helper.from_array(weight, f"w{i}"), onnx.numpy_helper.from_array(scale, f"s{i}")]
        node = onnx.helper.make_node("MatMulNBits", [f"x{i}", f"w{i}", f"s{i}"], [f"x{i + 1}"], domain="com.microsoft")
        for name, value in (("K", SIZE), ("N", SIZE), ("bits", 4), ("block_size", GROUP), ("accuracy_level", 4)):
            node.attribute.append(onnx.helper.make_attribute(name, value))
        nodes.append(node)
    ends = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, SIZE]) for name in ("x0", f"x{copies}")
    ]
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    graph = onnx.helper.make_graph(nodes, "chain", ends[:1], ends[1:], initialisers)
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_cpu_input("x0", generator.standard_normal((1, SIZE), np.float32))
    binding.bind_output(f"x{copies}")

    def run() -> float:
        start = clock()
        for _ in range(runs):
            session.run_with_iobinding(binding)
        return (clock() - start) / (runs * copies)

    return run


@dataclass(frozen=True)
class Operands:
    """A vector, its quantised form, copies of packed weights, and a branch that all of them share."""

    x: torch.Tensor
    quantised: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    weights: tuple[Packed, ...]
    branch: tuple[torch.Tensor, torch.Tensor]
    y: torch.Tensor

    @staticmethod
    def random(copies: int) -> "Operands":
        """Operands whose product is about as large as the vector."""
        generator = torch.Generator().manual_seed(0)
        fmt, half = Format("int4", GROUP), Format("float16")
        padded = activation_k(SIZE)
        quantised = (
            torch.empty(1, padded, dtype=torch.int8),
            torch.empty(1),
            torch.empty(1, padded // 32, dtype=torch.int32),
        )
        scale = torch.full((SIZE, SIZE // GROUP), 1 / (4.6 * SIZE**0.5))
        weights = tuple(
            pack(fmt, torch.randint(-8, 8, (SIZE, SIZE), generator=generator, dtype=torch.int8), scale)
            for _ in range(copies)
        )
        a, b = (pack(half, torch.randn(shape, generator=generator) * 0.01) for shape in ((RANK, SIZE), (SIZE, RANK)))
        x = torch.randn(1, SIZE, generator=generator)
        return Operands(x, quantised, weights, (a.weight, b.weight), torch.empty(1, SIZE))


Step = Callable[[], object]


def repeat(steps: list[Step], products: int, runs: int, clock: Clock) -> Callable[[], float]:
    """Returns a function that takes all the steps `runs` times and gives the seconds of one product."""

    def run() -> float:
        start = clock()
        for _ in range(runs):
            for step in steps:
                step()
        return (clock() - start) / (runs * products)

    return run


def linear(library: Library, operands: Operands) -> list[Step]:
    """Quantisation and product for each copy of the weights, as in a model."""
    steps: list[Step] = []
    for packed in operands.weights:
        assert packed.scale is not None
        quantise = Call(operands.x, *operands.quantised)
        product = Call(*operands.quantised, packed.weight, packed.scale, torch.empty(0), operands.y)
        steps.append(partial(library.run, "hikui_quantize_activation", quantise))
        steps.append(partial(library.run, "hikui_linear_a8_int4", product))
    return steps


def fused_branch(library: Library, operands: Operands) -> list[Step]:
    """Quantisation, then product and branch in one call."""
    steps: list[Step] = []
    for packed in operands.weights:
        assert packed.scale is not None
        quantise = Call(operands.x, *operands.quantised)
        weights = (packed.weight, packed.scale, torch.empty(0), operands.x, *operands.branch)
        steps.append(partial(library.run, "hikui_quantize_activation", quantise))
        steps.append(
            partial(library.run, "hikui_linear_a8_branch_int4", Call(*operands.quantised, *weights, operands.y))
        )
    return steps


def separate_branch(library: Library, operands: Operands) -> list[Step]:
    """The same in separate calls: product, A x, B t and the sum."""
    inner, outer, none = torch.empty(1, RANK), torch.empty(1, SIZE), torch.empty(0)
    a, b = operands.branch
    branch: list[Step] = [
        partial(library.run, "hikui_linear_float16", Call(operands.x, a, none, inner)),
        partial(library.run, "hikui_linear_float16", Call(inner, b, none, outer)),
        partial(torch.add, operands.y, outer, out=operands.y),
    ]
    plain = linear(library, operands)
    return [step for i in range(0, len(plain), 2) for step in (*plain[i : i + 2], *branch)]


def timing(seconds: list[float]) -> Timing:
    """Median and quartiles, in microseconds."""
    low, median, high = (round(1e6 * value, 1) for value in statistics.quantiles(seconds, n=4))
    return Timing(median, low, high)


def alternate(ours: Callable[[], float], theirs: Callable[[], float], rounds: int) -> tuple[list[float], list[float]]:
    """Times the two in turns; the first round of each only warms up."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds + 1):
        for run, measured in zip((ours, theirs), times, strict=True):
            # Both libraries' threads spin a while after their work: let them fall asleep.
            time.sleep(0.05)
            measured.append(run())
    return times[0][1:], times[1][1:]


def set_threads(library: Library, threads: int) -> Clock:
    """Gives the kernels that many threads of TVM's pool; returns the clock to time them by."""
    launch = None
    if threads > 1:
        tvm.get_global_func("runtime.config_threadpool")(1, threads)
        runtime = ctypes.CDLL(next(str(p) for p in Path(tvm.__file__).parent.rglob("libtvm_runtime.so")))
        launch = ctypes.cast(runtime.TVMBackendParallelLaunch, ctypes.c_void_p).value
    library.set_launch(launch)
    return time.perf_counter if threads > 1 else time.process_time


def measure(library: Library, threads: int, rounds: int) -> list[Row]:
    """Against ONNX Runtime, with one number of threads."""
    clock = set_threads(library, threads)
    rows = []
    for weights, copies, runs in (("cold", COPIES, 2), ("cached", 1, CACHED_RUNS)):
        ours = repeat(linear(library, Operands.random(copies)), copies, runs, clock)
        times = alternate(ours, onnxruntime_product(copies, runs, threads, clock), rounds)
        rows.append(Row(threads, weights, timing(times[0]), timing(times[1]), ratio(*times)))
        gc.collect()
    return rows


def measure_branch(library: Library, threads: int, rounds: int) -> BranchRow:
    """One call against separate ones, with one number of threads."""
    clock = set_threads(library, threads)
    operands = Operands.random(COPIES)
    fused, separate = (repeat(make(library, operands), COPIES, 2, clock) for make in (fused_branch, separate_branch))
    times = alternate(fused, separate, rounds)
    return BranchRow(threads, timing(times[0]), timing(times[1]), ratio(*times))


def ratio(first: list[float], second: list[float]) -> float:
    """The median over the rounds."""
    return round(statistics.median(a / b for a, b in zip(first, second, strict=True)), 3)


def table(names: tuple[str, str], rows: Sequence[Row | BranchRow]) -> str:
    """The rows in Markdown."""
    lines = [
        f"| threads | weights | {names[0]} µs (quartiles) | {names[1]} µs (quartiles) | ratio |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        pair = (row.hikui, row.onnxruntime) if isinstance(row, Row) else (row.fused, row.separate)
        cells = " | ".join(f"{t.median} ({t.low}–{t.high})" for t in pair)
        weights = row.weights if isinstance(row, Row) else "cold"
        lines.append(f"| {row.threads} | {weights} | {cells} | {row.ratio} |")
    return "\n".join(lines)


def main() -> None:
    """Measures, prints the table and writes the file that was asked for."""
    parser = argparse.ArgumentParser(description="Times the int4 product against ONNX Runtime's MatMulNBits.")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--rounds", type=int, default=15, help="rounds in which the two take turns")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    target = resolve("host")
    with tempfile.TemporaryDirectory() as folder:
        library = Library(link(target.triple, target.isas, Path(folder) / "kernels.so"))
        rows = [row for threads in arguments.threads for row in measure(library, threads, arguments.rounds)]
        branch = [measure_branch(library, threads, arguments.rounds) for threads in arguments.threads]
        report = {
            "cpu": next((line.split(":")[1].strip() for line in cpuinfo() if line.startswith("model name")), "unknown"),
            "isa": library.isa(),
            "machine": platform.machine(),
            "onnxruntime": onnxruntime.__version__,
            "rows": [asdict(row) for row in rows],
            "branch": [asdict(row) for row in branch],
        }
    print(f"{report['cpu']}, {report['isa']}; M=1, N=K={SIZE}, int4 group {GROUP}, {arguments.rounds} rounds\n")
    print(table(("hikui", "onnxruntime"), rows))
    print(f"\nWith a branch of rank {RANK}\n")
    print(table(("fused", "separate"), branch))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


def cpuinfo() -> list[str]:
    """What the kernel says of the CPU."""
    return Path("/proc/cpuinfo").read_text().splitlines()


if __name__ == "__main__":
    main()
