"""hikui lowers large language models to low-bit artefacts that many small machines run."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hikui.lowering.app.lower import lower
    from hikui.lowering.app.request import Execution
    from hikui.lowering.app.runners import load
    from hikui.lowering.trace import trace

__version__ = "0.1.0"
__all__ = ["Execution", "load", "lower", "trace"]

_HOMES = {
    "Execution": "hikui.lowering.app.request",
    "load": "hikui.lowering.app.runners",
    "lower": "hikui.lowering.app.lower",
    "trace": "hikui.lowering.trace",
}


def __getattr__(name: str) -> object:
    """The public verbs, imported when they are first used, so that `import hikui` stays quick."""
    if name not in _HOMES:
        raise AttributeError(f"module 'hikui' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
