"""ONNX Runtime's MatMulNBits."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx
import onnxruntime  # type: ignore[import-untyped]
from numpy.typing import NDArray

from benchmarks.kernels.contestant import GROUP, Prepared, Step, UnavailableError, Workload, activations, random_bytes


@dataclass(frozen=True)
class MatMulNBits:
    """Weights of `bits` bits with float32 scales.

    Attributes:
        accuracy: 4 quantises activations to int8, 0 leaves the choice to the library.
    """

    bits: int
    accuracy: int
    ours: bool = False

    @property
    def name(self) -> str:
        return f"ort_{self.bits}bit_acc{self.accuracy}"

    def prepare(self, workload: Workload) -> Prepared:
        blocks = workload.k // GROUP
        nbytes = workload.n * blocks * (GROUP * self.bits // 8 + 4)
        copies = workload.copies(nbytes)
        weights = random_bytes((workload.n, blocks, GROUP * self.bits // 8), copies)
        scale = np.full((workload.n, blocks), 2.0**-9, np.float32)
        x = onnxruntime.OrtValue.ortvalue_from_numpy(activations(workload))
        y = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((workload.m, workload.n), np.float32))
        steps: list[Step] = []
        for count in workload.chunks(copies):
            part, weights = weights[:count], weights[count:]
            steps.append(_bind(self._session(part, scale, workload), x, y, count))
        return Prepared(steps, copies // len(steps), nbytes, 8 * nbytes / (workload.n * workload.k), result=y.numpy)

    def _session(self, weights: NDArray[np.uint8], scale: NDArray[np.float32], workload: Workload) -> object:
        """Products that all read the same input, as the projections of one block do."""
        settings = {
            "K": workload.k, "N": workload.n, "bits": self.bits, "block_size": GROUP, "accuracy_level": self.accuracy,
        }  # fmt: skip
        nodes, tensors, outputs = [], [onnx.numpy_helper.from_array(scale, "scale")], []
        for i, weight in enumerate(weights):
            tensors.append(onnx.numpy_helper.from_array(weight, f"w{i}"))
            nodes.append(
                onnx.helper.make_node("MatMulNBits", ["x", f"w{i}", "scale"], [f"y{i}"], domain="com.microsoft")
            )
            nodes[-1].attribute.extend(onnx.helper.make_attribute(*setting) for setting in settings.items())
            outputs.append(
                onnx.helper.make_tensor_value_info(f"y{i}", onnx.TensorProto.FLOAT, [workload.m, workload.n])
            )
        inputs = [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [workload.m, workload.k])]
        graph = onnx.helper.make_graph(nodes, "products", inputs, outputs, tensors)
        opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
        model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = workload.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        try:
            return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the binding raises classes of its own without a common base
            raise UnavailableError(" ".join(str(error).split())) from error


def _bind(session: object, x: object, y: object, count: int) -> Step:
    binding = session.io_binding()  # type: ignore[attr-defined]
    binding.bind_ortvalue_input("x", x)
    for i in range(count):
        binding.bind_ortvalue_output(f"y{i}", y)
    return partial(session.run_with_iobinding, binding)  # type: ignore[attr-defined]


def contestants() -> Sequence[MatMulNBits]:
    """2, 4 and 8 bits with int8 activations, and 4 with what the library chooses."""
    return [MatMulNBits(2, 4), MatMulNBits(4, 4), MatMulNBits(8, 4), MatMulNBits(4, 0)]
