"""Builds the program that replays kernel calls under AddressSanitizer and UndefinedBehaviorSanitizer."""

import subprocess
from pathlib import Path

from hikui.backends.kernels.build import HEADER, compiler
from hikui.backends.kernels.compile import c_source
from hikui.backends.kernels.isa import ISAS
from hikui.backends.kernels.table import c_includes
from hikui.lowering.artefact.target import machine_triple

_FLAGS = (
    "-std=gnu11", "-O1", "-g1", "-fno-math-errno", "-ffp-contract=off", "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-w", "-pthread",
)  # fmt: skip


def sanitised_program(directory: Path) -> Path:
    """The replay program with the portable kernels alone, all from C."""
    kernels, program = directory / "kernels.c", directory / "replay"
    kernels.write_text(c_source(ISAS["portable"]))
    for name, text in c_includes([ISAS["portable"]]).items():
        (directory / name).write_text(text)
    sources = [kernels, *sorted(HEADER.parent.glob("*.c"))]
    command = [*compiler(machine_triple()), *_FLAGS, f"-I{directory}", f"-I{HEADER.parent}", *map(str, sources)]
    subprocess.run([*command, "-o", str(program)], check=True)
    return program
