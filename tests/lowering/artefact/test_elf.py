import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from hikui.lowering.artefact.elf import is_elf, read_elf, version
from hikui.lowering.artefact.target import machine_triple
from hikui.lowering.errors import HikuiError


@pytest.fixture(scope="module")
def interpreter() -> Path:
    return Path(sys.executable).resolve()


def test_a_program_of_this_machine(interpreter: Path) -> None:
    found = read_elf(interpreter)
    assert found.triple == machine_triple()
    assert is_elf(interpreter)


@pytest.mark.skipif(shutil.which("readelf") is None, reason="binutils' readelf is not installed")
def test_the_versions_are_those_that_binutils_finds(interpreter: Path) -> None:
    listing = subprocess.run(["readelf", "-V", "-W", interpreter], capture_output=True, text=True, check=True).stdout
    needs = listing[listing.index("Version needs section") :]
    expected = {line.split("Name:")[1].split()[0] for line in needs.splitlines() if "Name:" in line and "Flags" in line}
    assert set(read_elf(interpreter).needs) == expected
    glibc = [need.removeprefix("GLIBC_") for need in expected if need.startswith("GLIBC_2")]
    assert read_elf(interpreter).glibc() == max(map(version, glibc))


def test_another_machine_and_another_kind_of_file(interpreter: Path, tmp_path: Path) -> None:
    data = bytearray(interpreter.read_bytes())
    struct.pack_into("<H", data, 18, 243)
    other = tmp_path / "other"
    other.write_bytes(data)
    assert read_elf(other).triple == "machine 243"
    data[4] = 1
    other.write_bytes(data)
    with pytest.raises(HikuiError, match="not a 64-bit little-endian ELF"):
        read_elf(other)
    other.write_bytes(interpreter.read_bytes()[:200])
    with pytest.raises(HikuiError, match="points outside itself"):
        read_elf(other)
    other.write_text("#!/bin/sh\n")
    assert not is_elf(other)
