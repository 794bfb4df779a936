"""torch's weight-only products on the CPU, with bfloat16 activations, which is what they are made for."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.kernels.contestant import GROUP, Prepared, Step, Workload, activations, random_bytes


@dataclass(frozen=True)
class Int4Pack:
    """`aten::_weight_int4pack_mm_for_cpu`: a scale and a zero point a group."""

    name: str = "torch_int4pack"
    ours: bool = False

    def prepare(self, workload: Workload) -> Prepared:
        n, k = workload.n, workload.k
        nbytes = n * k // 2 + n * (k // GROUP) * 2 * 2
        torch.set_num_threads(workload.threads)
        codes = torch.from_numpy(random_bytes((n, k), 1)[0] & 15).int()
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        scales = torch.full((k // GROUP, n, 2), 2.0**-9, dtype=torch.bfloat16)
        weights = [packed.clone() for _ in range(workload.copies(nbytes))]
        x = torch.from_numpy(activations(workload)).bfloat16()
        steps = [
            partial(torch.ops.aten._weight_int4pack_mm_for_cpu, x, weight, GROUP, scales.clone()) for weight in weights
        ]
        return _prepared(steps, nbytes, workload)


@dataclass(frozen=True)
class Int8Pack:
    """`aten::_weight_int8pack_mm`: one scale a row."""

    name: str = "torch_int8pack"
    ours: bool = False

    def prepare(self, workload: Workload) -> Prepared:
        n, k = workload.n, workload.k
        nbytes = n * k + n * 2
        torch.set_num_threads(workload.threads)
        weights = torch.from_numpy(random_bytes((n, k), workload.copies(nbytes))).view(torch.int8)
        scales = torch.full((n,), 2.0**-9, dtype=torch.bfloat16)
        x = torch.from_numpy(activations(workload)).bfloat16()
        steps = [partial(torch.ops.aten._weight_int8pack_mm, x, weight, scales) for weight in weights]
        return _prepared(steps, nbytes, workload)


def _prepared(steps: "Sequence[partial[torch.Tensor]]", nbytes: int, workload: Workload) -> Prepared:
    def result() -> NDArray[np.float32]:
        return np.asarray(steps[0]().float().numpy(), np.float32)

    plain: list[Step] = list(steps)
    return Prepared(plain, 1, nbytes, 8 * nbytes / (workload.n * workload.k), result=result)


def contestants() -> Sequence[Int4Pack | Int8Pack]:
    """Both."""
    return [Int4Pack(), Int8Pack()]
