"""Mutated safetensors headers, shard indexes and recipes end in a sentence, at once and in little memory."""

import json
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hikui.lowering.app.request import available_passes
from hikui.lowering.checkpoint.container import read_safetensors
from hikui.lowering.checkpoint.folder import Checkpoint
from hikui.lowering.errors import HikuiError
from hikui.lowering.pipeline import recipe as recipes

from .factor import FACTOR
from .test_runner_files import EDITS, mutated

SLACK = 8 << 20
"""Bytes that a reader may take beside twice the file."""

HEADER = json.dumps(
    {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
        "c": {"dtype": "I8", "shape": [0], "data_offsets": [32, 32]},
    }
).encode()
RECIPE = b"""schema: 1
name: fuzzed
description: what a recipe may hold
calibration: {samples: 8, tokens: 64, seed: 3}
passes:
- canonicalise
- calibrate: {gram: true}
- override: {sites: '(^|\\.)lm_head$', format: int8-g64, required: false}
- gptq: {bits: 3, group: 64}
- pack: {format: float32}
- activation: {bits: 8}
- fuse
"""
NUMBERS = st.one_of(
    st.integers(-(2**70), 2**70), st.floats(), st.booleans(), st.none(), st.text(max_size=3), st.lists(st.integers())
)
HURRIED = settings(
    max_examples=300 * FACTOR, deadline=1000, derandomize=FACTOR == 1, suppress_health_check=[HealthCheck.too_slow]
)


def within(path: Path, read: Callable[[Path], object]) -> bool:
    """Whether it was read; anything but a sentence is an error, and so is too much memory."""
    refusal = ""
    tracemalloc.start()
    try:
        read(path)
    except HikuiError as error:
        refusal = str(error)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 2 * path.stat().st_size + SLACK
    assert "\n" not in refusal
    return not refusal


def safetensors(folder: str, header: bytes) -> Path:
    path = Path(folder) / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(32))
    return path


@HURRIED
@given(EDITS)
def test_mutated_safetensors_headers(edits: list[tuple[int, int, bytes]]) -> None:
    with TemporaryDirectory() as folder:
        assert within(safetensors(folder, HEADER), read_safetensors)
        within(safetensors(folder, mutated(HEADER, edits)), read_safetensors)


@HURRIED
@given(NUMBERS, NUMBERS, NUMBERS, st.sampled_from(["shape", "begin", "end", "dtype"]))
def test_safetensors_entries_of_any_type(first: object, second: object, third: object, place: str) -> None:
    entry: dict[str, object] = {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}
    if place == "dtype":
        entry["dtype"] = first
    elif place == "shape":
        entry["shape"] = [first, second]
    else:
        entry["data_offsets"] = [first, 32] if place == "begin" else [0, third]
    with TemporaryDirectory() as folder:
        within(safetensors(folder, json.dumps({"a": entry}).encode()), read_safetensors)


@HURRIED
@given(st.binary(max_size=64), st.integers(0, 2**64 - 1))
def test_files_of_any_bytes_are_no_safetensors(content: bytes, length: int) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(struct.pack("<Q", length) + content)
        within(path, read_safetensors)


@HURRIED
@given(st.dictionaries(st.text(max_size=5), st.one_of(NUMBERS, st.text(max_size=300)), max_size=4))
def test_indexes_of_any_shards(weight_map: dict[str, object]) -> None:
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text("{}")
        path = Path(folder) / "model.safetensors.index.json"
        path.write_text(json.dumps({"weight_map": weight_map}))
        within(path, lambda index: Checkpoint.open(index.parent))


@HURRIED
@given(EDITS)
def test_mutated_recipes(edits: list[tuple[int, int, bytes]]) -> None:
    known = available_passes()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_bytes(mutated(RECIPE, edits))
        within(path, lambda recipe: recipes.load(recipe, known).build(known))
