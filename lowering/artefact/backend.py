"""What every backend offers; `generate.Runner` says what a runner does."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from hikui.lowering.artefact.target import Target
from hikui.lowering.ir.program import Program
from hikui.lowering.progress import Progress


@dataclass(frozen=True)
class BuildResult:
    """What a backend wrote.

    Attributes:
        files: every file written, relative to the build's directory, sorted, with forward slashes.
        entry: what the manifest says of the program, for whoever loads the artefact.
        requirements: what the board must offer beside the target's CPU features, such as `glibc: 2.28`.
        notices: sentences on what the artefact cannot do, for whoever lowers it.
    """

    files: tuple[str, ...]
    entry: dict[str, object] = field(default_factory=dict)
    requirements: dict[str, str] = field(default_factory=dict)
    notices: tuple[str, ...] = ()


class Backend(Protocol):
    """Turns a program into files that run on a target."""

    name: str

    def nbytes_beside_weights(self, target: Target) -> int:
        """About how many bytes of an artefact are runtime and program, rather too many than too few.

        Raises:
            HikuiError: the runtime for the target is not here and cannot be fetched.
        """
        ...

    def build(self, program: Program, target: Target, directory: Path, progress: Progress) -> BuildResult:
        """Writes the model's files under an existing `directory`.

        Raises:
            HikuiError: the program holds something that the backend cannot express, or a tool is missing.
        """
        ...
