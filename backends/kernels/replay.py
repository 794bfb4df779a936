"""Runs a batch of kernel calls in a process of its own, on this machine or under emulation of another (replay.c)."""

import os
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hikui.backends.kernels.build import HEADER, build, compiler
from hikui.backends.kernels.standalone import DTYPES, Argument
from hikui.lowering.errors import HikuiError


@dataclass(frozen=True)
class Result:
    """What a call did.

    Attributes:
        error: the sentence with which it refused its arguments, or "".
        whole: whether the bytes around every tensor are untouched.
        tensors: every tensor argument after the call, in order.
    """

    error: str
    whole: bool
    tensors: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Recorded:
    """A call to make: `misalignment` shifts every tensor by so many bytes off 64-byte alignment."""

    symbol: str
    arguments: tuple[Argument, ...]
    misalignment: int = 0

    def encode(self) -> bytes:
        name = self.symbol.encode()
        parts = [struct.pack("<i", len(name)), name, struct.pack("<i", len(self.arguments))]
        for argument in self.arguments:
            if isinstance(argument, torch.Tensor):
                data = argument.contiguous().numpy().tobytes()
                parts.append(struct.pack("<iiiii", 7, *DTYPES[argument.dtype], argument.dim(), self.misalignment))
                parts.append(struct.pack(f"<{argument.dim()}qq", *argument.shape, len(data)))
                parts.append(data)
            elif isinstance(argument, float):
                parts.append(struct.pack("<id", 3, argument))
            else:
                parts.append(struct.pack("<iq", 1, argument))
        return b"".join(parts)

    def decode(self, data: memoryview, offset: int) -> tuple[Result, int]:
        status, whole, length = struct.unpack_from("<iii", data, offset)
        offset += 12
        error = bytes(data[offset : offset + length]).decode()
        offset += length
        tensors = []
        for argument in self.arguments:
            if isinstance(argument, torch.Tensor):
                size = argument.numel() * argument.element_size()
                raw = bytearray(data[offset : offset + size])
                flat = torch.frombuffer(raw, dtype=argument.dtype) if size else torch.empty(0, dtype=argument.dtype)
                tensors.append(flat.view(argument.shape))
                offset += size
        return Result(error if status else "", bool(whole), tuple(tensors)), offset


@dataclass(frozen=True)
class Machine:
    """Where calls run: the program and what goes before it on the command line (an emulator), if anything."""

    program: Path
    emulator: tuple[str, ...] = ()

    def run(self, calls: Sequence[Recorded], isa: str = "", threads: int = 1) -> list[Result]:
        """Makes the calls one after the other.

        Args:
            calls: what to call.
            isa: the instruction set to force, or "" for the best.
            threads: how many threads a parallel region has.

        Raises:
            HikuiError: the program fails, for example by an instruction that the machine does not have.
        """
        with tempfile.TemporaryDirectory() as folder:
            recorded, results = Path(folder) / "calls", Path(folder) / "results"
            recorded.write_bytes(b"".join(call.encode() for call in calls))
            self._start(isa, str(recorded), str(results), str(threads))
            return list(_decoded(calls, memoryview(results.read_bytes())))

    def isa(self, asked: str = "") -> str:
        """The instruction set that the program uses.

        Raises:
            HikuiError: the asked one is not there.
        """
        return self._start(asked).strip()

    def _start(self, isa: str, *arguments: str) -> str:
        done = subprocess.run(
            [*self.emulator, str(self.program), *arguments],
            env={**os.environ, "HIKUI_ISA": isa},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise HikuiError(f"The replay of kernel calls ended with {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout


def _decoded(calls: Sequence[Recorded], data: memoryview) -> Iterator[Result]:
    offset = 0
    for call in calls:
        result, offset = call.decode(data, offset)
        yield result


def link_program(triple: str, isas: Sequence[str], directory: Path) -> Path:
    """Builds the program that replays calls.

    Args:
        triple: as in `build`.
        isas: as in `build`.
        directory: where it and the objects go.
    """
    objects = build(triple, isas, directory)
    program = directory / "replay"
    source = HEADER.parent / "replay.c"
    # Static, so that an emulator needs no C library of the other machine.
    flags = ["-std=gnu11", "-O1", "-Wall", "-Wextra", "-pthread", "-static", "-o", str(program)]
    subprocess.run([*compiler(triple), *flags, str(source), *map(str, objects.paths)], check=True)
    return program
