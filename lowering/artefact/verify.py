"""Checks an artefact: its files, where its libraries can run, what the machine offers, and the numbers it gives.

The tolerance of the numbers stands in the manifest, which is part of what is checked: whatever it says, no more is
allowed than `MOST_TOLERANCE`, the most that any model is given.
"""

import math
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hikui.lowering.artefact import target as targets
from hikui.lowering.artefact.elf import is_elf, read_elf, version
from hikui.lowering.artefact.generate import Runner
from hikui.lowering.artefact.manifest import MANIFEST, REFERENCE_TOLERANCE, Artefact, Reference, inventory
from hikui.lowering.artefact.signature import signer_comment
from hikui.lowering.errors import HikuiError

TOLERANCE = 1e-3
"""Largest difference of a logit from the interpreter's, relative to the largest logit, where activations are floats."""

ROUNDED_TOLERANCE = 5e-2
"""The same where activations are rounded to integers: the last bit of a sum can round one of them the other way, and
that alone moves logits by a percent or so; a wrong kernel moves them by far more than this."""

_NOISES = 3
"""How many times a program's own noise is allowed where that is more: what was seen of the noise is a small sample."""

MOST_TOLERANCE = 0.5
"""What is allowed at most: beyond it equal numbers say nothing."""


@dataclass(frozen=True)
class Check:
    """One thing that was checked and how it came out; `passed` is None where it could not be checked here."""

    name: str
    passed: bool | None
    detail: str


def check_files(artefact: Artefact) -> Check:
    """Every file has its hash, and there is no other.

    Raises:
        HikuiError: the first file that is not as the manifest says.
    """
    found, due = inventory(artefact.directory), artefact.manifest.files
    for name in sorted(due.keys() | found.keys()):
        path = artefact.directory / name
        if name not in found:
            raise HikuiError(f"{path} is missing from the artefact; copy the whole folder again.")
        if name not in due:
            raise HikuiError(f"{path} is not listed in {MANIFEST}; remove it, or lower the model again.")
        if found[name].sha256 != due[name].sha256:
            raise HikuiError(f"{path} is damaged: its sha256 is not the manifest's; copy the folder again.")
    holding = {parent for name in due for parent in (artefact.directory / name).parents}
    for path in sorted(path for path in artefact.directory.rglob("*") if path.is_dir()):
        if path not in holding:
            raise HikuiError(f"{path} is a folder that holds no file of the artefact; remove it.")
    return Check("files", True, f"{len(due)} files as the manifest lists them")


def check_signature(artefact: Artefact, public_key: Path) -> Check:
    """The manifest is signed with a key.

    Raises:
        UsageError: the key cannot be read.
        HikuiError: it is not signed, or not with this key.
    """
    return Check("signature", True, f"by the owner of {public_key}: {signer_comment(artefact.directory, public_key)}")


def check_modes(artefact: Artefact) -> Check:
    """The board's program may be executed.

    Raises:
        HikuiError: it may not.
    """
    programs = [name for name in artefact.manifest.files if name.startswith("bin/") and name.endswith("/hikui-run")]
    for name in programs:
        path = artefact.directory / name
        if not os.access(path, os.X_OK):
            raise HikuiError(f"{path} is not executable; copy the artefact with its modes, or run `chmod +x` on it.")
    return Check("modes", True, f"{len(programs)} programs are executable")


def check_libraries(artefact: Artefact) -> Check:
    """Every library and program is of the target's architecture and asks for no newer glibc than the manifest says.

    Raises:
        HikuiError: the first that is not.
    """
    triple = artefact.manifest.target.triple
    floor = artefact.manifest.requires.get("glibc")
    count = 0
    newest: tuple[int, ...] = (0,)
    for name in artefact.manifest.files:
        path = artefact.directory / name
        if not is_elf(path):
            continue
        found = read_elf(path)
        if found.triple != triple:
            raise HikuiError(f"{path} is for {found.triple}, but the artefact is for {triple}; lower the model again.")
        if floor is not None and found.glibc() > version(floor):
            asked = ".".join(map(str, found.glibc()))
            raise HikuiError(f"{path} needs glibc {asked}, but the manifest promises {floor}; lower the model again.")
        count, newest = count + 1, max(newest, found.glibc())
    return Check("libraries", True, f"{count} for {triple}, glibc {'.'.join(map(str, newest))} or later")


def require_machine(artefact: Artefact) -> None:
    """Checks that this machine can run the artefact.

    Raises:
        HikuiError: it is another architecture, its CPU lacks a feature, or its glibc is too old.
    """
    target = artefact.manifest.target
    if target.triple != targets.machine_triple():
        raise HikuiError(
            f"The artefact is for {target.triple} ({target.name}), but this machine is {targets.machine_triple()}; "
            "run it on such a board, or here with --emulate."
        )
    missing = sorted(set(target.features) - targets.cpu_features())
    if missing:
        raise HikuiError(
            f"This machine's CPU lacks {', '.join(missing)}, which the artefact for {target.name} needs; lower the "
            "model for a target that this CPU fits (`hikui targets`)."
        )
    library, found = platform.libc_ver()
    floor = artefact.manifest.requires.get("glibc")
    if floor is not None and library == "glibc" and version(found) < version(floor):
        raise HikuiError(f"This machine has glibc {found}, but the artefact needs {floor} or later.")


def logits(runner: Runner, reference: Reference) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """What a runner gives for the reference's tokens, as `Reference.logits` has them: float32 [1 + T − prompt, V]."""
    runner.reset()
    rows = [runner.forward(reference.tokens[: reference.prompt], 0)[-1:]]
    for at in range(reference.prompt, reference.tokens.size):
        rows.append(runner.forward(reference.tokens[at : at + 1], at))
    return np.concatenate(rows)


def difference(got: np.ndarray[tuple[int, ...], np.dtype[np.float32]], reference: Reference) -> float:
    """Largest absolute difference of two sets of logits, relative to the largest absolute logit of the reference."""
    return float(np.abs(got - reference.logits).max() / np.abs(reference.logits).max())


def allowed_difference(noise: float) -> float:
    """How far logits of a program with rounded activations may be from the reference's.

    Args:
        noise: how far the program is from itself (`assemble.rounding_noise`).
    """
    return min(max(ROUNDED_TOLERANCE, _NOISES * noise), MOST_TOLERANCE)


def tolerance(artefact: Artefact) -> float:
    """How far logits may be from the reference's.

    Raises:
        HikuiError: the manifest does not say it, or allows more than any recipe is given.
    """
    allowed = artefact.manifest.metrics.get(REFERENCE_TOLERANCE)
    if allowed is None:
        raise HikuiError(f"{artefact.directory / MANIFEST} lacks '{REFERENCE_TOLERANCE}'; lower the model again.")
    if not 0 < allowed <= MOST_TOLERANCE:
        raise HikuiError(
            f"{artefact.directory / MANIFEST} allows logits to differ by {allowed:g} of the largest, where hikui "
            f"allows {MOST_TOLERANCE:g} at most; copy the folder again, or lower the model again."
        )
    return allowed


def largest_difference(artefact: Artefact, open_runner: Callable[[], Runner]) -> float:
    """How far a runner's logits are from the reference's, relative to the largest; infinite where shapes differ.

    Raises:
        HikuiError: the runner cannot be opened, or stops.
    """
    reference, runner = artefact.reference(), open_runner()
    try:
        got = logits(runner, reference)
    finally:
        runner.close()
    return difference(got, reference) if got.shape == reference.logits.shape else math.inf


def check_numbers(artefact: Artefact, open_runner: Callable[[], Runner], name: str = "numbers") -> Check:
    """The runner gives the reference's logits.

    Raises:
        HikuiError: it gives others, or the manifest and the reference contradict each other.
    """
    reference, model = artefact.reference(), artefact.manifest.model
    allowed = tolerance(artefact)
    if reference.logits.shape[1] != model.vocabulary or reference.tokens.size > model.context_length:
        raise HikuiError(
            f"{artefact.directory / MANIFEST} and its reference numbers do not belong together: a vocabulary of "
            f"{model.vocabulary} and {reference.logits.shape[1]} logits; copy the folder again."
        )
    error = largest_difference(artefact, open_runner)
    # Written so that a NaN fails.
    if not error <= allowed:
        raise HikuiError(
            f"{artefact.directory} gives other numbers than it should: its logits differ by {error:.2g} of the largest "
            f"({allowed:g} is allowed); lower the model again, and report it if that does not help."
        )
    return Check(
        name,
        True,
        f"{len(reference.logits)} positions, largest difference {error:.1e} of the largest logit ({allowed:g} allowed)",
    )
