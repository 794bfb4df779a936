"""Checks every CUDA kernel on the GPU that is here, then times the products.

    python -m benchmarks.cuda [--checks] [--size 8192] [--rows 1 4 8] [--rounds 21] [--fatbin FILE] [--json FILE]

Times are of a CUDA graph that walks over copies of the weights, together several times the L2 cache, so every weight
comes from memory. A product's bandwidth (weights and scales read) is given as a share of a device-to-device copy's
(bytes read and written) measured in the same run, and its time beside cuBLAS's float16 product where cuBLAS is here.
Without a GPU it says so and ends with 1.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.cuda import cublas
from benchmarks.cuda.cases import cases
from benchmarks.cuda.driver import Device, Memory
from hikui.backends.kernels.cuda import ARCHITECTURES, build_fatbin, launch
from hikui.backends.kernels.cuda.kernels import KINDS, makers
from hikui.lowering.errors import HikuiError
from hikui.lowering.formats import Format, quantize_activation

GROUP = 128


def check(device: Device) -> list[dict[str, Any]]:
    """Runs every kernel once for each of its cases; gives the worst error of each as a share of what is allowed."""
    worst: dict[str, float] = {}
    for case in cases():
        memories = [device.upload(a) for a in case.launch.arguments if isinstance(a, torch.Tensor)]
        device.start(case.launch, memories)
        share = case.worst({position: device.download(memories[position]) for position in case.expected})
        device.free(*memories)
        worst[case.launch.symbol] = max(worst.get(case.launch.symbol, 0.0), share)
    missing = set(makers()) - set(worst)
    assert not missing, f"no case runs {sorted(missing)}"
    return [{"kernel": symbol, "error": share, "passes": share <= 1} for symbol, share in sorted(worst.items())]


def seconds(device: Device, rounds: int, count: int, work: Callable[[int], None]) -> float:
    """Median time of one of `count` pieces of work, run one after the other in a graph."""

    def everything() -> None:
        for i in range(count):
            work(i)

    work(0)  # Whatever is loaded at the first use is there before the recording.
    with device.graph(everything) as run:
        for _ in range(3):
            run()
        return statistics.median(run() for _ in range(rounds)) / count


def copy_bandwidth(device: Device, rounds: int, nbytes: int) -> float:
    """Bytes read and written a second by a copy within the device."""
    blocks = [device.upload(torch.ones(nbytes, dtype=torch.uint8)) for _ in range(2)]
    time = seconds(device, rounds, 1, lambda _: device.copy(*blocks))
    device.free(*blocks)
    return 2 * nbytes / time


def time_product(device: Device, kind: str, m: int, size: int, rounds: int) -> dict[str, Any]:
    """Time of one size × size product with weights of a kind, from memory."""
    fmt = Format(kind, GROUP, size // 8 // GROUP * GROUP or GROUP) if kind == "mixed" else Format(kind, GROUP)
    generator = torch.Generator().manual_seed(1)
    # Any bytes are valid codes, but of int8 −128 and of ternary the field 3: neither takes other time.
    weight = torch.randint(0, 256, fmt.weight_shape(size, size), generator=generator, dtype=torch.uint8)
    scale = torch.rand(fmt.scale_shape(size, size) or (), generator=generator).half()
    q, q_scale, sums = quantize_activation(torch.randn(m, size, generator=generator))
    tensors = (q, q_scale, sums, weight, scale, torch.empty(0), torch.full((m, size), torch.nan))
    call = launch.integer(kind, *tensors)
    nbytes = weight.numel() + 2 * scale.numel()
    count = max(2, -(-4 * device.cache_size // nbytes))
    shared: list[Memory] = [device.upload(a) for a in call.arguments if isinstance(a, torch.Tensor)]
    weights = [device.upload(weight) for _ in range(count)]
    scales = [device.upload(scale) for _ in range(count)]
    time = seconds(
        device, rounds, count, lambda i: device.start(call, [*shared[:3], weights[i], scales[i], *shared[5:]])
    )
    device.free(*shared, *weights, *scales)
    row = {"kind": kind, "m": m, "n": size, "k": size, "bits": fmt.true_bits(size, size), "bytes": nbytes}
    return {**row, "copies": count, "microseconds": time * 1e6, "gigabytes_per_second": nbytes / time / 1e9}


def time_cublas(device: Device, size: int, rounds: int) -> float | None:
    """Seconds of cuBLAS's float16 product at M = 1, from memory; None without cuBLAS."""
    product = cublas.product(device)
    if product is None:
        return None
    count = max(2, -(-4 * device.cache_size // (2 * size * size)))
    weights = [device.upload(torch.randn(size, size).half()) for _ in range(count)]
    x, y = device.upload(torch.randn(size).half()), device.upload(torch.zeros(size).half())
    time = seconds(device, rounds, count, lambda i: product(weights[i], x, y))
    device.free(*weights, x, y)
    return time


def measure(device: Device, size: int, rows: list[int], rounds: int) -> dict[str, Any]:
    """Copy bandwidth, cuBLAS and every kind of weights."""
    copied = copy_bandwidth(device, rounds, max(16 * device.cache_size, 1 << 20))
    dense = time_cublas(device, size, rounds)
    products = []
    for m in rows:
        for kind in KINDS:
            row = time_product(device, kind, m, size, rounds)
            row["share_of_copy"] = row["gigabytes_per_second"] * 1e9 / copied
            row["speed_over_cublas_float16"] = dense * 1e6 / row["microseconds"] if dense and m == 1 else None
            products.append(row)
    return {
        "copy_gigabytes_per_second": copied / 1e9,
        "cublas_float16_microseconds": dense * 1e6 if dense else None,
        "products": products,
    }


def print_report(report: dict[str, Any]) -> None:
    """The report as text."""
    failed = [row["kernel"] for row in report["checks"] if not row["passes"]]
    print(f"{report['device']} (compute capability {report['capability']}): ", end="")
    print(f"{len(report['checks'])} kernels checked, {len(failed)} failed {' '.join(failed)}")
    if "products" not in report:
        return
    print(f"copy {report['copy_gigabytes_per_second']:.0f} GB/s, read and written")
    dense = report["cublas_float16_microseconds"]
    print(f"cuBLAS float16, M=1: {dense:.1f} us" if dense else "cuBLAS is not here")
    print(f"{'kind':8} {'M':>3} {'bits':>6} {'us':>8} {'GB/s':>7} {'of copy':>8} {'over cuBLAS':>12}")
    for row in report["products"]:
        over = row["speed_over_cublas_float16"]
        print(
            f"{row['kind']:8} {row['m']:3} {row['bits']:6.3f} {row['microseconds']:8.1f} "
            f"{row['gigabytes_per_second']:7.0f} {row['share_of_copy']:8.2f} {f'{over:.2f}' if over else '-':>12}"
        )


def main(arguments: list[str] | None = None) -> int:
    """The command; 1 where there is no GPU or a check fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda", description=__doc__.split("\n")[0])
    parser.add_argument("--checks", action="store_true", help="check only, as under compute-sanitizer")
    parser.add_argument("--size", type=int, default=8192)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--fatbin", type=Path, help="kernels built elsewhere; needs neither nvcc nor TVM")
    parser.add_argument("--driver", default="libcuda.so.1", help="the driver's library")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    try:
        device = Device(options.driver)
        with tempfile.TemporaryDirectory() as folder:
            device.load(options.fatbin or build_fatbin(ARCHITECTURES, Path(folder)))
        report: dict[str, Any] = {"device": device.name, "capability": device.capability, "checks": check(device)}
        if not options.checks:
            report |= measure(device, options.size, options.rows, options.rounds)
    except HikuiError as error:
        print(error, file=sys.stderr)
        return 1
    print_report(report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if all(row["passes"] for row in report["checks"]) else 1


if __name__ == "__main__":
    sys.exit(main())
