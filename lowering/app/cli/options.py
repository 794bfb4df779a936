"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated, Literal

import typer

Model = Annotated[
    str,
    typer.Argument(
        help="A Hugging Face folder or id, or `reference` for the model that comes with hikui.", metavar="MODEL"
    ),
]
ModelOrProgram = Annotated[
    str,
    typer.Argument(
        help="A Hugging Face folder or id, `reference` for the model that comes with hikui, or a program's text "
        "(FILE.ir, as --print-ir writes it).",
        metavar="MODEL",
    ),
]
ProgramWeights = Annotated[
    Path | None,
    typer.Option(
        "--weights",
        help="Safetensors file or checkpoint folder with the weights that FILE.ir names; without it they are made up.",
        show_default=False,
    ),
]
WeightSeed = Annotated[
    int | None,
    typer.Option(
        "--seed",
        help="Seed of the weights that are made up for FILE.ir, also where --weights has not all; 0 without --weights.",
        show_default=False,
    ),
]
WeightsFile = Annotated[
    Path | None,
    typer.Option(
        "--save-weights",
        help="Safetensors file for the weights that the printed program names.",
        metavar="FILE",
        show_default=False,
    ),
]
ArtefactFolder = Annotated[Path, typer.Argument(help="An artefact, as `hikui lower` writes it.", metavar="DIR")]
Context = Annotated[
    int | None, typer.Option(help="Context length; by default the model's own, at most 2048.", show_default=False)
]
CalibrationText = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        help="Text that calibrating passes read, documents separated by <|endoftext|>.",
        show_default=False,
    ),
]
TokenizerFolder = Annotated[
    Path | None,
    typer.Option("--tokenizer", help="Folder with a tokenizer, instead of the model's own.", show_default=False),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run Python files that come with the model, the tokenizer or a task; else refuse."
    ),
]
TargetBpw = Annotated[
    float | None,
    typer.Option("--target-bpw", help="Budget of the recipe's `assign` pass, in bits per weight.", show_default=False),
]
DumpFolder = Annotated[
    Path | None,
    typer.Option(
        "--debug-dump", help="Folder for the program's text and its diff after each pass.", show_default=False
    ),
]
Documents = Annotated[
    int | None, typer.Option(min=1, help="Read only the first N documents.", metavar="N", show_default=False)
]
Window = Annotated[
    int | None,
    typer.Option(
        min=2, help="Read the documents joined, in windows of so many tokens.", metavar="N", show_default=False
    ),
]
Stride = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Tokens that each window predicts after the ones before it; by default all of its own.",
        metavar="S",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout.")]
Emulate = Annotated[bool, typer.Option("--emulate", help="Run an artefact for another architecture under qemu-user.")]
Memory = Annotated[
    float | None,
    typer.Option(
        "--memory",
        help="Gigabytes that passes may take; by default what is free. What needs more is refused before it starts.",
        min=0.0,
        show_default=False,
    ),
]
JobCount = Annotated[int, typer.Option("--jobs", help="Independent tasks done at a time.", min=1)]
Engine = Annotated[
    Literal["processes", "ray"], typer.Option("--engine", help="What does them; ray reaches other machines.")
]


def nbytes(gigabytes: float | None) -> int | None:
    """Bytes of an option in gigabytes."""
    return None if gigabytes is None else int(gigabytes * 1e9)
