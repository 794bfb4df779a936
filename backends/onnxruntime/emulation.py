"""A foreign artefact behind the interface of a runner: `bin/ort_run.py` under qemu-user, asked over pipes."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from platformdirs import user_cache_path

from hikui.backends.onnxruntime.ort_run import describe
from hikui.lowering.errors import HikuiError

_CHECKOUT = Path(__file__).resolve().parents[2]


def find_sysroot(machine: str) -> Path:
    """The folder that scripts/sysroot.sh made for a machine such as `aarch64`.

    Raises:
        HikuiError: there is none; the sentence says how to make it.
    """
    name = f"sysroot-{machine}"
    for folder in (Path("build") / name, _CHECKOUT / "build" / name, user_cache_path("hikui") / name):
        if (folder / "stamp").is_file():
            return folder.resolve()
    raise HikuiError(
        f"Emulating {machine} takes a userland for it; make one with scripts/sysroot.sh in hikui's checkout."
    )


class ScriptModel:
    """A model in the artefact's own program, `bin/ort_run.py`, in a process of its own.

    Args:
        directory: the artefact.
        command: what runs Python.
        threads: threads for a step.

    Raises:
        HikuiError: the program is missing, or the model cannot be loaded there.
    """

    def __init__(self, directory: Path, command: Sequence[str] = (sys.executable,), threads: int = 1) -> None:
        script = directory / "bin" / "ort_run.py"
        if not script.is_file():
            raise HikuiError(f"{script} is missing; copy the artefact again.")
        # The other Python must not pick up packages or settings of this one.
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        self._process = subprocess.Popen(
            [*command, str(script), str(directory), "--serve", "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
        )
        try:
            self.context_length = int(self._answer()["context_length"])
        except HikuiError:
            self.close()
            raise

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None and self._process.stderr is not None, "both are pipes"
        line = self._process.stdout.readline()
        if not line:
            complaint = self._process.stderr.read().decode(errors="replace").strip().splitlines()
            raise HikuiError(f"The artefact's program stopped: {complaint[-1] if complaint else 'it said nothing'}")
        head: dict[str, Any] = json.loads(line)
        if "error" in head:
            raise HikuiError(str(head["error"]))
        return head

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None, "it is a pipe"
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer tells why
        return self._answer()

    def reset(self) -> None:
        """Forgets every token."""
        self._ask({})

    def forward(self, tokens: npt.NDArray[np.int64], past: int) -> npt.NDArray[np.float32]:
        """As `OrtModel.forward`, over the pipe.

        Raises:
            HikuiError: the tokens do not fit the cache, or a kernel fails.
        """
        rows, width = self._ask({"tokens": [int(token) for token in tokens], "past": past})["shape"]
        assert self._process.stdout is not None, "it is a pipe"
        body = self._process.stdout.read(rows * width * 4)
        return np.frombuffer(body, "<f4").reshape(rows, width)

    def close(self) -> None:
        """Ends the emulated process."""
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()
        self._process.wait()


class EmulatedModel(ScriptModel):
    """A model in an emulated process.

    Args:
        directory: the artefact.
        threads: threads for a step; None is one, which is what an emulator does best.

    Raises:
        LoadError: the artefact's description is missing or damaged.
        HikuiError: the emulator or the userland is missing, or the model cannot be loaded there.
    """

    def __init__(self, directory: Path, threads: int | None = None) -> None:
        description = describe(directory)
        machine, cpu = str(description["triple"]).split("-", 1)[0], description.get("emulator_cpu")
        emulator = shutil.which(f"qemu-{machine}")
        if emulator is None or cpu is None:
            raise HikuiError(
                f"Running {directory} here takes qemu-{machine}; install Debian's package qemu-user."
                if emulator is None
                else f"The target {description['target']} has no CPU that qemu emulates."
            )
        root = find_sysroot(machine) / str(cpu)
        command = [emulator, "-cpu", str(cpu), "-L", str(root), str(root / "usr/bin/python3")]
        super().__init__(directory, command, threads or 1)
