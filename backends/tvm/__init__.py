"""The backend `tvm`: a program becomes one library, one file of weights, and a runner that needs no Python."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hikui.backends.tvm.backend import TvmBackend
    from hikui.backends.tvm.runner import TvmRunner

__all__ = ["TvmBackend", "TvmRunner"]


def __getattr__(name: str) -> Any:
    # To run an artefact takes TVM's runtime alone; only the backend imports its compiler.
    if name == "TvmBackend":
        from hikui.backends.tvm.backend import TvmBackend

        return TvmBackend
    if name == "TvmRunner":
        from hikui.backends.tvm.runner import TvmRunner

        return TvmRunner
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
