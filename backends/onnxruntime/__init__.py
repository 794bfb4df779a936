"""The ONNX Runtime backend: an ONNX model with mapped weights, and hikui's kernels as custom operators.

`OnnxRuntimeBackend` needs torch and onnx; `OrtRunner` needs neither, so both are imported when they are asked for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hikui.backends.onnxruntime.backend import OnnxRuntimeBackend
    from hikui.backends.onnxruntime.runner import OrtRunner

__all__ = ["OnnxRuntimeBackend", "OrtRunner"]


def __getattr__(name: str) -> Any:
    if name == "OnnxRuntimeBackend":
        from hikui.backends.onnxruntime.backend import OnnxRuntimeBackend

        return OnnxRuntimeBackend
    if name == "OrtRunner":
        from hikui.backends.onnxruntime.runner import OrtRunner

        return OrtRunner
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
