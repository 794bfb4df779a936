"""Arguments and options that several commands share."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer

MOST = (1 << 31) - 1
"""More than any count or seed that is meant; what is larger is a slip of the keyboard, and does not fit the machine."""


def above(least: float) -> Callable[[float | None], float | None]:
    """A check of an option: the number is finite and above `least`."""

    def check(value: float | None) -> float | None:
        if value is not None and not (math.isfinite(value) and value > least):
            raise typer.BadParameter(f"{value} is no finite number above {least:g}.")
        return value

    return check


def at_least(least: float) -> Callable[[float | None], float | None]:
    """A check of an option: the number is finite and not below `least`."""

    def check(value: float | None) -> float | None:
        if value is not None and not (math.isfinite(value) and value >= least):
            raise typer.BadParameter(f"{value} is no finite number from {least:g} on.")
        return value

    return check


Model = Annotated[
    str,
    typer.Argument(
        help="A Hugging Face folder or id, a GGUF file, `reference` for the model that comes with hikui, or `smollm2` "
        "for the one that `hikui fetch smollm2` puts here.",
        metavar="MODEL",
    ),
]
ModelOrProgram = Annotated[
    str,
    typer.Argument(
        help="A Hugging Face folder or id, a GGUF file, `reference` for the model that comes with hikui, `smollm2` for "
        "the one that `hikui fetch smollm2` puts here, or a program's text (FILE.ir, as --print-ir writes it).",
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
        min=0,
        max=MOST,
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
    int | None,
    typer.Option(min=2, max=MOST, help="Context length; by default the model's own, at most 2048.", show_default=False),
]
CalibrationText = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        help="Text that calibrating passes read, documents separated by <|endoftext|>; by default the prose and code "
        "that come with hikui.",
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
    typer.Option(
        "--target-bpw",
        callback=above(0),
        help="Budget of the recipe's `assign` pass, in bits per weight.",
        show_default=False,
    ),
]
TargetSize = Annotated[
    float | None,
    typer.Option(
        "--target-size",
        callback=above(0),
        help="Budget of the recipe's `assign` pass, in megabytes of the whole artefact.",
        show_default=False,
    ),
]
TargetLatency = Annotated[
    float | None,
    typer.Option(
        "--target-latency",
        callback=above(0),
        help="Budget of the recipe's `assign` pass, in milliseconds that a token's products take on one thread.",
        show_default=False,
    ),
]
Speeds = Annotated[
    Path | None,
    typer.Option(
        "--speeds",
        help="What `hikui bench --json` wrote on the machine it is for, for --target-latency and --dry-run.",
        metavar="FILE.json",
        show_default=False,
    ),
]
DumpFolder = Annotated[
    Path | None,
    typer.Option(
        "--debug-dump", help="Folder for the program's text and its diff after each pass.", show_default=False
    ),
]
Documents = Annotated[
    int | None, typer.Option(min=1, max=MOST, help="Read only the first N documents.", metavar="N", show_default=False)
]
Window = Annotated[
    int | None,
    typer.Option(
        min=2,
        max=MOST,
        help="Read the documents joined, in windows of so many tokens.",
        metavar="N",
        show_default=False,
    ),
]
Stride = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=MOST,
        help="Tokens that each window predicts after the ones before it; by default all of its own.",
        metavar="S",
        show_default=False,
    ),
]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, max=MOST, help="Stop after so many tokens.")]
Temperature = Annotated[float, typer.Option(callback=at_least(0), help="0 takes the most likely token, more draws.")]
TopK = Annotated[int, typer.Option("--top-k", min=0, max=MOST, help="Draw among so many tokens; 0 is all.")]
DrawSeed = Annotated[int, typer.Option(min=0, max=MOST, help="Of the drawing.")]
TaskLimit = Annotated[
    int | None,
    typer.Option(min=1, max=MOST, help="Only the first N documents of each task.", metavar="N", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout.")]
Emulate = Annotated[bool, typer.Option("--emulate", help="Run an artefact for another architecture under qemu-user.")]
Memory = Annotated[
    float | None,
    typer.Option(
        "--memory",
        help="Gigabytes that passes may take; by default what is free. What needs more is refused before it starts.",
        callback=above(0),
        show_default=False,
    ),
]
JobCount = Annotated[int, typer.Option("--jobs", help="Independent tasks done at a time.", min=1, max=4096)]
Engine = Annotated[
    Literal["processes", "ray"], typer.Option("--engine", help="What does them; ray reaches other machines.")
]


def nbytes(gigabytes: float | None) -> int | None:
    """Bytes of an option in gigabytes."""
    return None if gigabytes is None else int(gigabytes * 1e9)
