"""The little of ELF that says where a library can run: its machine, and the versions of the symbols that it needs."""

import re
import struct
from dataclasses import dataclass
from pathlib import Path

from hikui.lowering.errors import HikuiError

MACHINES = {62: "x86_64-linux-gnu", 183: "aarch64-linux-gnu"}
_MAGIC = b"\x7fELF"
_VERNEED = 0x6FFFFFFE


@dataclass(frozen=True)
class ElfFile:
    """A library or program.

    Attributes:
        triple: of the userland that it runs in; `machine N` where that is not known here.
        needs: symbol versions that it asks of shared libraries, such as `GLIBC_2.17`, sorted.
    """

    triple: str
    needs: tuple[str, ...]

    def glibc(self) -> tuple[int, ...]:
        """The newest glibc that it asks for, (0,) for none."""
        found = (re.fullmatch(r"GLIBC_(\d+(?:\.\d+)*)", need) for need in self.needs)
        return max((version(match[1]) for match in found if match), default=(0,))


def version(text: str) -> tuple[int, ...]:
    """`2.28` as (2, 28)."""
    return tuple(int(part) for part in text.split("."))


def is_elf(path: Path) -> bool:
    """Whether a file is a library or a program of ELF."""
    with path.open("rb") as file:
        return file.read(4) == _MAGIC


def read_elf(path: Path) -> ElfFile:
    """Reads a 64-bit little-endian ELF file.

    Raises:
        HikuiError: it is another kind of ELF, or cut short.
    """
    data = path.read_bytes()
    if data[:4] != _MAGIC or data[4:6] != b"\x02\x01":
        raise HikuiError(f"{path} is not a 64-bit little-endian ELF file.")
    try:
        (machine,) = struct.unpack_from("<H", data, 18)
        return ElfFile(MACHINES.get(machine, f"machine {machine}"), tuple(sorted(_needs(data))))
    except (struct.error, IndexError, ValueError):
        raise HikuiError(
            f"{path} ends, or points outside itself, before its tables are read; lower the model again."
        ) from None


def _needs(data: bytes) -> set[str]:
    (table,) = struct.unpack_from("<Q", data, 40)
    size, count = struct.unpack_from("<HH", data, 58)
    sections = [struct.unpack_from("<IIQQQQII", data, table + size * index) for index in range(count)]
    found: set[str] = set()
    left = len(data) // 16  # as many entries as fit: a list that leads back into itself has more
    for _, kind, _, _, offset, _, link, entries in sections:
        if kind != _VERNEED:
            continue
        strings = sections[link][4]
        for _ in range(entries):
            left -= 1
            if left < 0:
                raise ValueError("more entries than fit")
            _, versions, _, first, following = struct.unpack_from("<HHIII", data, offset)
            at = offset + first
            for _ in range(versions):
                left -= 1
                if left < 0:
                    raise ValueError("more entries than fit")
                _, _, _, name, after = struct.unpack_from("<IHHII", data, at)
                begin = strings + name
                found.add(data[begin : data.index(b"\0", begin)].decode("ascii"))
                at += after
            offset += following
    return found
