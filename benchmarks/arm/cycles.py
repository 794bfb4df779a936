"""Cycles that llvm-mca estimates for the inner loop of a kernel, from the disassembly of its object file."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

MODELS = ("neoverse-n1", "cortex-a55")

# What an instruction computes of multiply-accumulates; two look-ups give the sum of 4 products for 16 rows.
_MACS = {"sdot": 16, "smmla": 32, "smull": 8, "smull2": 8, "smlal": 8, "smlal2": 8, "tbl": 32}
_LINE = re.compile(r"^\s*([0-9a-f]+):\s+(\S.*)$")
_BRANCH = re.compile(r"^(b\.\w+|cbn?z|tbn?z|b)\s+(.*?)([0-9a-f]+) <")


class Loop(NamedTuple):
    """An inner loop: its instructions, and how many multiply-accumulates an iteration is."""

    instructions: list[str]
    macs: int


class UnestimatedError(Exception):
    """Why there is no estimate, in a sentence."""


def _instructions(path: Path, symbol: str) -> list[tuple[int, str]]:
    objdump = shutil.which("aarch64-linux-gnu-objdump")
    if objdump is None:
        raise UnestimatedError("aarch64-linux-gnu-objdump is not installed")
    command = [objdump, "-d", "--no-show-raw-insn", f"--disassemble={symbol}", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = (_LINE.match(line) for line in text.splitlines())
    return [(int(match[1], 16), match[2].split("//")[0].strip()) for match in found if match]


def _macs(instructions: list[str]) -> int:
    names = [text.split()[0] for text in instructions]
    # A codebook's look-ups come before products and compute nothing themselves.
    multiplies = any(name in _MACS and name != "tbl" for name in names)
    return sum(_MACS.get(name, 0) for name in names if not (multiplies and name == "tbl"))


def inner_loop(path: Path, symbol: str) -> Loop:
    """The loop without a loop within that computes most.

    Args:
        path: an AArch64 object file.
        symbol: of the kernel.

    Raises:
        UnestimatedError: there is none, or no disassembler.
    """
    listing = _instructions(path, symbol)
    index = {address: i for i, (address, _) in enumerate(listing)}
    spans = []
    for i, (_, text) in enumerate(listing):
        branch = _BRANCH.match(text)
        first = index.get(int(branch[3], 16)) if branch else None
        if first is not None and first <= i:
            spans.append((first, i))
    loops = []
    for first, last in spans:
        if not any(span != (first, last) and first <= span[0] and span[1] <= last for span in spans):
            body = [text for _, text in listing[first : last + 1]]
            loops.append(Loop(body, _macs(body)))
    best = max(loops, key=lambda loop: loop.macs, default=None)
    if best is None or not best.macs:
        raise UnestimatedError(f"{symbol} has no loop with products")
    return best


def cycles_per_mac(loop: Loop, model: str) -> float:
    """Cycles of a loop's iteration in the long run, by multiply-accumulate.

    Raises:
        UnestimatedError: llvm-mca is not installed or does not know the CPU or an instruction on it.
    """
    mca = shutil.which("llvm-mca")
    if mca is None:
        raise UnestimatedError("llvm-mca is not installed")
    body = [_BRANCH.sub(lambda match: f"{match[1]} {match[2]}.Lloop //", text) for text in loop.instructions]
    source = ".Lloop:\n" + "".join(f"  {text}\n" for text in body)
    iterations = 200
    run = subprocess.run(
        [mca, "-mtriple=aarch64", f"-mcpu={model}", "-mattr=+dotprod,+i8mm", f"-iterations={iterations}"],
        input=source,
        capture_output=True,
        text=True,
    )
    total = re.search(r"^Total Cycles:\s+(\d+)", run.stdout, re.MULTILINE)
    if run.returncode or total is None:
        reason = run.stderr.strip().splitlines()
        raise UnestimatedError(f"llvm-mca gives no estimate for {model}: {reason[0] if reason else 'no reason given'}")
    return int(total[1]) / iterations / loop.macs
