"""Manifests, reference numbers and folders that somebody has tampered with: each ends in one sentence."""

import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from hikui.lowering.app.runners import open_board_runner
from hikui.lowering.artefact import verify as verify_artefact
from hikui.lowering.artefact.elf import read_elf
from hikui.lowering.artefact.manifest import MANIFEST, REFERENCE, Artefact, read_manifest
from hikui.lowering.errors import HikuiError
from tests.lowering.artefact.test_manifest import edit


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"schema": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"schema": 3' + b"0" * 5000 + b"}",
        b'{"schema": NaN}',
        b'{"schema": Infinity}',
        b'{"schema": 3, "schema": 3}',
        b"[1]",
        b'"schema"',
    ],
    ids=["nothing", "no text", "deep", "deep and closed", "5000 digits", "nan", "infinity", "twice", "list", "string"],
)
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(HikuiError, match=MANIFEST):
        read_manifest(tmp_path)


def test_a_manifest_larger_than_any_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / MANIFEST).open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(HikuiError, match="which no manifest has"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("requires.glibc", "glibc"),
        ("requires.glibc", "2." + "9" * 5000),
        ("requires.glibc", 2.28),
        ("metrics.reference_tolerance", "much"),
        ("model.vocabulary", -1),
        ("model.context_length", 0),
        ("model.context_length", 10**30),
        ("model.eos_token_ids", [[]]),
        ("files", {"../../etc/passwd": {"bytes": 1, "sha256": "0" * 64}}),
        ("files", {"/etc/passwd": {"bytes": 1, "sha256": "0" * 64}}),
        ("files", {"a\0b": {"bytes": 1, "sha256": "0" * 64}}),
        ("files", {"a//b": {"bytes": 1, "sha256": "0" * 64}}),
        ("files", {"": {"bytes": 1, "sha256": "0" * 64}}),
        ("files", {"model.so": {"bytes": -1, "sha256": "0" * 64}}),
        ("files", {"model.so": {"bytes": 1, "sha256": "0"}}),
        ("unknown", 1),
    ],
)
def test_an_entry_of_a_manifest_that_is_none_is_named(artefact: Artefact, where: str, value: object) -> None:
    *path, last = where.split(".")

    def change(content: dict[str, dict[str, object]]) -> None:
        for part in path:
            content = content[part]  # type: ignore[assignment]
        content[last] = value  # type: ignore[assignment]

    edit(artefact, change)
    with pytest.raises(HikuiError, match=f"damaged at '{where.split('.')[0]}|says '{where}'"):
        Artefact.load(artefact.directory)


@pytest.mark.parametrize("tolerance", [1e9, 0.51, 0.0, -1.0])
def test_a_tolerance_beyond_any_recipes_is_not_believed(artefact: Artefact, tolerance: float) -> None:
    edit(artefact, lambda content: content["metrics"].update(reference_tolerance=tolerance))
    with pytest.raises(HikuiError, match=r"where hikui allows 0\.5 at most"):
        verify_artefact.tolerance(Artefact.load(artefact.directory))


def test_a_missing_tolerance_is_named(artefact: Artefact) -> None:
    edit(artefact, lambda content: content.update(metrics={}))
    with pytest.raises(HikuiError, match="lacks 'reference_tolerance'"):
        verify_artefact.tolerance(Artefact.load(artefact.directory))


TOKENS, LOGITS = np.arange(3), np.ones((3, 8), np.float32)


@pytest.mark.parametrize(
    "tensors",
    [
        {"tokens": TOKENS, "prompt": np.array([2])},
        {"tokens": TOKENS, "prompt": np.array([], np.int64), "logits": LOGITS},
        {"tokens": TOKENS, "prompt": np.array([0]), "logits": LOGITS},
        {"tokens": TOKENS, "prompt": np.array([4]), "logits": LOGITS},
        {"tokens": TOKENS[:0], "prompt": np.array([1]), "logits": LOGITS[:0]},
        {"tokens": TOKENS, "prompt": np.array([1]), "logits": LOGITS[:2]},
        {"tokens": TOKENS, "prompt": np.array([1]), "logits": LOGITS[0]},
        {"tokens": TOKENS.astype(np.float32), "prompt": np.array([1]), "logits": LOGITS},
        {"tokens": TOKENS - 1, "prompt": np.array([1]), "logits": LOGITS},
        {"tokens": TOKENS + 6, "prompt": np.array([1]), "logits": LOGITS},
        {"tokens": TOKENS, "prompt": np.array([1]), "logits": LOGITS * np.float32(np.nan)},
        {"tokens": TOKENS, "prompt": np.array([1]), "logits": LOGITS * 0},
        {"tokens": TOKENS, "prompt": np.array([1]), "logits": LOGITS.astype(np.float64)},
    ],
)
def test_reference_numbers_that_are_none_are_refused(
    artefact: Artefact, tensors: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]
) -> None:
    save_file(tensors, artefact.directory / REFERENCE)
    with pytest.raises(HikuiError, match=REFERENCE):
        artefact.reference()


def test_links_are_refused(artefact: Artefact, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    for name in ("model.params", "tokenizer"):
        path = artefact.directory / name
        shutil.move(path, outside)
        path.symlink_to(outside)
        with pytest.raises(HikuiError, match="is a link, or lies behind one"):
            Artefact.load(artefact.directory)
        path.unlink()
        shutil.move(outside, path)
    assert Artefact.load(artefact.directory)


def test_an_empty_folder_is_found(artefact: Artefact) -> None:
    (artefact.directory / "notes" / "mine").mkdir(parents=True)
    with pytest.raises(HikuiError, match="notes is a folder that holds no file of the artefact"):
        verify_artefact.check_files(artefact)


def test_the_boards_own_runner_is_run(artefact: Artefact) -> None:
    assert verify_artefact.check_modes(artefact).passed
    assert verify_artefact.check_numbers(artefact, lambda: open_board_runner(artefact), "runner").passed
    (program,) = (artefact.directory / "bin").glob("*/hikui-run")
    program.chmod(0o644)
    with pytest.raises(HikuiError, match="is not executable"):
        verify_artefact.check_modes(artefact)
    program.write_bytes(b"#!/bin/sh\nexit 0\n")
    program.chmod(0o755)
    with pytest.raises(HikuiError, match="The board's runner failed"):
        verify_artefact.check_numbers(artefact, lambda: open_board_runner(artefact), "runner")


def test_lists_of_an_elf_file_that_never_end_are_refused(artefact: Artefact) -> None:
    path = artefact.directory / "model.so"
    data = bytearray(path.read_bytes())
    (table,) = struct.unpack_from("<Q", data, 40)
    size, count = struct.unpack_from("<HH", data, 58)
    for at in range(table, table + size * count, size):
        if int.from_bytes(data[at + 4 : at + 8], "little") == 0x6FFFFFFE:
            data[at + 44 : at + 48] = b"\xff" * 4
            offset = int.from_bytes(data[at + 24 : at + 32], "little")
            data[offset + 12 : offset + 16] = bytes(4)
    path.write_bytes(data)
    with pytest.raises(HikuiError, match="points outside itself"):
        read_elf(path)


@pytest.mark.parametrize("command", [("targets",), ("passes", "--json"), ("inspect", "{}", "--json")])
@pytest.mark.parametrize(
    ("redirection", "words"), [(">/dev/full", "output cannot be written"), (">&-", "output is closed")]
)
def test_lost_output_of_the_command_line_is_a_failure(
    artefact: Artefact, command: tuple[str, ...], redirection: str, words: str
) -> None:
    arguments = [word.format(artefact.directory) for word in command]
    program = [sys.executable, "-m", "hikui.lowering.app.cli", *arguments]
    shell = ["bash", "-c", f'"$@" {redirection}', "bash", *program]
    done = subprocess.run(shell, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done
    (line,) = done.stderr.splitlines()
    assert re.match(rf"hikui: .*{words}", line)
