"""OpenVINO's CPU plugin with compressed weights: integer constants that the model itself widens and scales."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino  # type: ignore[import-not-found,unused-ignore]
from numpy.typing import NDArray
from openvino import opset13

from benchmarks.kernels.contestant import GROUP, Prepared, Step, UnavailableError, Workload, activations, random_bytes

_ZERO_POINTS = {"u2": 1.5, "i4": None, "i8": None}


@dataclass(frozen=True)
class Compressed:
    """Weights of one of OpenVINO's integer types with float16 scales.

    Attributes:
        kind: `u2`, `i4` or `i8`.
        bits: of one stored value.
    """

    kind: str
    bits: int
    ours: bool = False

    @property
    def name(self) -> str:
        return f"openvino_{self.kind}"

    def prepare(self, workload: Workload) -> Prepared:
        n, groups = workload.n, workload.k // GROUP
        nbytes = n * groups * (GROUP * self.bits // 8 + 2)
        copies = workload.copies(nbytes)
        weights = random_bytes((n * groups * GROUP * self.bits // 8,), copies)
        core = openvino.Core()
        settings = {"INFERENCE_NUM_THREADS": workload.threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
        x = openvino.Tensor(activations(workload))
        requests = []
        chunks = workload.chunks(copies)
        for count in chunks:
            part, weights = weights[:count], weights[count:]
            try:
                compiled = core.compile_model(self._model(part, workload, groups), "CPU", settings)
            except RuntimeError as error:
                raise UnavailableError(str(error).strip().splitlines()[-1]) from error
            request = compiled.create_infer_request()
            request.set_input_tensor(0, x)
            requests.append(request)

        def result() -> NDArray[np.float32]:
            return np.asarray(requests[0].get_output_tensor(0).data, np.float32)

        # `request.infer()` copies outputs into Python objects; these two do not.
        steps: list[Step] = [_Infer(request) for request in requests]
        return Prepared(steps, chunks[0], nbytes, 8 * nbytes / (n * workload.k), result=result)

    def _model(self, weights: NDArray[np.uint8], workload: Workload, groups: int) -> openvino.Model:
        x = opset13.parameter([workload.m, workload.k], np.float32)
        kind = getattr(openvino.Type, self.kind)
        scale = opset13.constant(np.full((workload.n, groups, 1), 2.0**-9, np.float16))
        outputs: list[Any] = []
        for weight in weights:
            packed = openvino.Tensor(weight, [workload.n, groups, GROUP], kind)
            wide = opset13.convert(opset13.constant(packed), "f16")
            zero = _ZERO_POINTS[self.kind]
            if zero is not None:
                wide = opset13.subtract(wide, opset13.constant(np.full((1, 1, 1), zero, np.float16)))
            flat = opset13.reshape(
                opset13.multiply(wide, scale), opset13.constant(np.array([workload.n, workload.k])), False
            )
            outputs.append(opset13.matmul(x, opset13.convert(flat, "f32"), False, True))
        return openvino.Model(outputs, [x])


@dataclass(frozen=True)
class _Infer:
    request: Any

    def __call__(self) -> None:
        self.request.start_async()
        self.request.wait()


def contestants() -> Sequence[Compressed]:
    """2, 4 and 8 bits."""
    return [Compressed("u2", 2), Compressed("i4", 4), Compressed("i8", 8)]
