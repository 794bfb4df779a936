"""A short run of the fuzz target, and mutated manifests and indexes in Python."""

import json
import platform
import shutil
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hikui.backends.tvm.index import INDEX, Index, read_index
from hikui.lowering.artefact.manifest import MANIFEST, Manifest, read_manifest
from hikui.lowering.errors import HikuiError

from . import runner_files

EDITS = st.lists(
    st.tuples(
        st.integers(0, 2**16),
        st.integers(0, 40),
        st.one_of(
            st.binary(max_size=8), st.sampled_from([b"-1", b"1e999", b"[" * 5000, b"9" * 5000, b"NaN", b"\n", b'"'])
        ),
    ),
    min_size=1,
    max_size=4,
)


def mutated(whole: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    """With pieces cut out and others put in their place."""
    for place, cut, piece in edits:
        at = place % (len(whole) + 1)
        whole = whole[:at] + piece + whole[at + cut :]
    return whole


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_mutated_files_of_the_runner_are_read_or_refused(tmp_path: Path) -> None:
    program = runner_files.build(tmp_path)
    assert runner_files.fuzz(program, seed=0, runs=3) == runner_files.Counts(3, 3, 0)
    counts = runner_files.fuzz(program, seed=1, runs=20_000)
    assert counts.read + counts.refused == counts.runs == 20_000
    assert min(counts.read, counts.refused) > 100


@settings(max_examples=300, deadline=1000, derandomize=True)
@given(EDITS)
def test_mutated_indexes_are_read_or_refused(edits: list[tuple[int, int, bytes]]) -> None:
    with TemporaryDirectory() as folder:
        (Path(folder) / INDEX).write_bytes(mutated(runner_files.INDEX_TEXT.encode(), edits))
        with suppress(HikuiError):
            assert isinstance(read_index(Path(folder)), Index)


def _manifest() -> bytes:
    digest = {"bytes": 1, "sha256": "0" * 64}
    content = {
        "schema": 3, "backend": "tvm", "program": {}, "requires": {"glibc": "2.28"},
        "metrics": {"reference_tolerance": 0.05},
        "target": {"name": "host", "triple": f"{platform.machine()}-linux-gnu", "isas": [], "features": [],
                   "emulator_cpu": None},
        "model": {"architecture": "A", "context_length": 8, "vocabulary": 61, "layers": 1, "bos_token_id": 1,
                  "eos_token_ids": [2]},
        "sites": {"a": {"format": "int4", "out_features": 1, "in_features": 1, "rank": 0, "bytes": 1,
                        "true_bits": 4.0}},
        "sizes": {"linear_bytes": 1, "weight_bytes": 1, "total_bytes": 1, "parameters": 2, "block_bpw": 4.0,
                  "true_bpw": 4.0, "all_bpw": 4.0},
        "provenance": {"hikui": "0", "model": "m", "checkpoint": {}, "recipe": "r", "pipeline": "p",
                       "calibration": None, "toolchain": {}},
        "files": {"model.so": digest, "lib/a": digest},
    }  # fmt: skip
    return json.dumps(content).encode()


@settings(max_examples=500, deadline=1000, derandomize=True)
@given(EDITS)
def test_mutated_manifests_are_read_or_refused(edits: list[tuple[int, int, bytes]]) -> None:
    with TemporaryDirectory() as folder:
        (Path(folder) / MANIFEST).write_bytes(_manifest())
        assert isinstance(read_manifest(Path(folder)), Manifest)
        (Path(folder) / MANIFEST).write_bytes(mutated(_manifest(), edits))
        with suppress(HikuiError):
            assert isinstance(read_manifest(Path(folder)), Manifest)
