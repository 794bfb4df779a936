"""Runs the board's own program in a child process: natively, or under qemu-user for a foreign artefact."""

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt

from hikui.backends.tvm.index import read_index
from hikui.lowering.errors import HikuiError

_SYSROOT = Path("/usr")
_DEBIAN_SYSROOT_PACKAGES = {"aarch64-linux-gnu": "libc6-arm64-cross and libstdc++6-arm64-cross"}
_EMULATORS = {"aarch64-linux-gnu": "qemu-aarch64", "x86_64-linux-gnu": "qemu-x86_64"}


@dataclass(frozen=True)
class Board:
    """A machine to run artefacts on.

    Attributes:
        triple: of the artefact.
        emulator_cpu: qemu's name of the CPU; None runs natively.
        threads: None leaves the number to the runner.
    """

    triple: str
    emulator_cpu: str | None = None
    threads: int | None = None

    def command(self, directory: Path) -> list[str]:
        """The command that starts the artefact's runner.

        Raises:
            HikuiError: the runner is missing or not executable, or the emulator or its libraries are missing.
        """
        program = directory / "bin" / self.triple / "hikui-run"
        if not program.is_file():
            raise HikuiError(f"{program} is missing; copy the artefact again.")
        if not os.access(program, os.X_OK):
            raise HikuiError(f"{program} is not executable; copy the artefact with its modes, or run `chmod +x` on it.")
        threads = [] if self.threads is None else ["--threads", str(self.threads)]
        return [*self._emulator(), str(program), str(directory), *threads]

    def _emulator(self) -> list[str]:
        if self.emulator_cpu is None:
            return []
        if self.triple not in _EMULATORS:
            raise HikuiError(f"There is no emulator for {self.triple}; run the artefact on a machine of its kind.")
        emulator, sysroot = shutil.which(_EMULATORS[self.triple]), _SYSROOT / self.triple
        if emulator is None:
            raise HikuiError(f"{_EMULATORS[self.triple]} is not installed; install Debian's package qemu-user.")
        if not (sysroot / "lib" / "libstdc++.so.6").exists():
            packages = _DEBIAN_SYSROOT_PACKAGES.get(self.triple, "the C and C++ libraries")
            raise HikuiError(f"There are no libraries of {self.triple} for the emulator; install Debian's {packages}.")
        return [emulator, "-cpu", self.emulator_cpu, "-L", str(sysroot)]


@dataclass(frozen=True)
class BoardRun:
    """What the board's program wrote.

    Attributes:
        text: None where the artefact has no tokenizer.
        tokens_per_second: of the tokens after the first; None where there were none.
        logits: float32 [steps, V], one row for each choice of a token, that of the end included.
    """

    tokens: list[int]
    text: str | None
    first_token_seconds: float
    tokens_per_second: float | None
    logits: npt.NDArray[np.float32]


def _reason(stderr: str, status: int) -> str:
    lines = [line.removeprefix("hikui-run: ") for line in stderr.splitlines() if line.strip()]
    if status < 0:
        return f"it died of signal {-status}"
    return lines[-1].rstrip(".") if lines else "it died without a word"


def run_on_board(directory: Path, board: Board, tokens: Sequence[int], max_new_tokens: int) -> BoardRun:
    """Generates greedily with the artefact's own runner.

    Raises:
        HikuiError: the runner cannot start, or it fails; its own sentence is in the message.
    """
    with TemporaryDirectory() as scratch:
        prompt, dump = Path(scratch) / "prompt", Path(scratch) / "logits"
        prompt.write_text(",".join(map(str, tokens)))
        arguments = ["--tokens-file", prompt, "--max-new-tokens", max_new_tokens, "--dump-logits", dump, "--json"]
        command = [*board.command(directory), *map(str, arguments)]
        try:
            done = subprocess.run(command, capture_output=True, check=False)
        except OSError as error:
            raise HikuiError(f"{command[0]} cannot be started: {error.strerror}.") from None
        if done.returncode:
            raise HikuiError(
                f"The board's runner failed: {_reason(done.stderr.decode(errors='replace'), done.returncode)}."
            )
        result = json.loads(done.stdout)
        logits = np.fromfile(dump, np.float32)
    return BoardRun(**result, logits=logits.reshape(-1, read_index(directory).vocabulary))


class BoardRunner:
    """The board's program behind the interface of a runner, one request for each `forward`.

    Args:
        directory: the artefact.
        board: where it runs.

    Raises:
        HikuiError: the index, the runner, the emulator or its libraries are missing.
    """

    def __init__(self, directory: Path, board: Board) -> None:
        index = read_index(directory)
        self.context_length = index.context_length
        self.vocabulary = index.vocabulary
        command = [*board.command(directory), "--serve"]
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
        except OSError as error:
            raise HikuiError(f"{command[0]} cannot be started: {error.strerror}.") from None

    @property
    def pid(self) -> int:
        """The program's process."""
        return self._process.pid

    def reset(self) -> None:
        """Forgets every token; nothing reads beyond the tokens that the cache holds."""

    def forward(self, tokens: npt.NDArray[np.int64], past: int) -> npt.NDArray[np.float32]:
        """Logits float32 [T, V] of int64 tokens [T], with `past` tokens in the cache.

        Raises:
            HikuiError: the runner fails; its own sentence is in the message.
        """
        assert self._process.stdin is not None and self._process.stdout is not None, "both are pipes"
        request = np.array([past, tokens.size, *tokens.tolist()], dtype="<i8")
        try:
            self._process.stdin.write(request.tobytes())
            self._process.stdin.flush()
        except BrokenPipeError:
            self._fail()
        size = tokens.size * self.vocabulary * 4
        answer = self._process.stdout.read(size)
        if len(answer) < size:
            self._fail()
        return np.frombuffer(answer, np.float32).reshape(tokens.size, self.vocabulary)

    def _fail(self) -> None:
        _, stderr = self._process.communicate()
        reason = _reason(stderr.decode(errors="replace"), self._process.returncode)
        raise HikuiError(f"The board's runner failed: {reason}.")

    def close(self) -> None:
        """Ends the program."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            self._process.stdin.close()
        self._process.wait()
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()
