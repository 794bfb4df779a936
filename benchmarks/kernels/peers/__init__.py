"""Other libraries' low-bit products, each in a file of its own; what is not installed is left out with the reason."""

import importlib
from collections.abc import Sequence

from benchmarks.kernels.contestant import Contestant, UnavailableError

_MODULES = ("onnxruntime", "ggml", "openvino", "torch")


def find() -> tuple[list[Contestant], list[str]]:
    """Every contestant of every library that is installed, and a sentence on each that is not."""
    found: list[Contestant] = []
    absent = []
    for name in _MODULES:
        try:
            contestants: Sequence[Contestant] = importlib.import_module(f"{__name__}.{name}").contestants()
        except (ImportError, OSError, UnavailableError) as error:
            absent.append(f"{name} is left out: {error}")
            continue
        found += contestants
    return found, absent
