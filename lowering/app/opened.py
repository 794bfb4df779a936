"""What was built is opened and run before it is published: an artefact whose own runner refuses it is none."""

from pathlib import Path

from hikui.lowering.app.runners import open_runner
from hikui.lowering.artefact import verify
from hikui.lowering.artefact.manifest import Artefact
from hikui.lowering.errors import HikuiError


def require_working(directory: Path) -> None:
    """Opens a finished folder and holds it to its reference numbers, where this machine can run it.

    Weights are mapped, and the reference is a few tokens long, so this costs little beside the lowering.

    Raises:
        HikuiError: the runner cannot open it, or it gives other numbers than the program that it was built from.
    """
    artefact = Artefact.load(directory)
    try:
        verify.require_machine(artefact)
    except HikuiError:
        return
    backend = artefact.manifest.backend
    try:
        apart = verify.largest_difference(artefact, lambda: open_runner(artefact))
    except HikuiError as error:
        # The folder has a name of its own until it is whole, which says nothing to the user.
        reason = str(error).replace(str(directory), "it").rstrip(".")
        raise HikuiError(
            f"What the {backend} backend built of this model does not run ({reason}), so nothing was written; "
            f"{_way_out(backend)}."
        ) from error
    allowed = verify.tolerance(artefact)
    # Written so that a NaN fails.
    if not apart <= allowed:
        raise HikuiError(
            f"What the {backend} backend built of this model gives other numbers than the lowered program: its logits "
            f"differ by {apart:.2g} of the largest ({allowed:g} is allowed), so nothing was written; "
            f"{_way_out(backend)}."
        )


def _way_out(backend: str) -> str:
    return f"lower with --backend {'onnxruntime' if backend == 'tvm' else 'tvm'}, and report it"
