import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from hikui.lowering.app.runners import load, open_runner
from hikui.lowering.artefact import target
from hikui.lowering.artefact import verify as verify_artefact
from hikui.lowering.artefact.elf import is_elf
from hikui.lowering.artefact.manifest import MANIFEST, REFERENCE, Artefact, Reference
from hikui.lowering.errors import HikuiError


def edit(artefact: Artefact, change: Callable[[dict[str, dict[str, object]]], None]) -> None:
    path = artefact.directory / MANIFEST
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def elf_files(artefact: Artefact) -> list[Path]:
    return [path for name in artefact.manifest.files if is_elf(path := artefact.directory / name)]


def test_it_verifies_and_runs(artefact: Artefact) -> None:
    assert verify_artefact.check_files(artefact).passed
    assert verify_artefact.check_libraries(artefact).passed
    assert verify_artefact.check_numbers(artefact, lambda: open_runner(artefact)).passed
    with load(artefact.directory) as model:
        text, result = model.generate("Hi", max_new_tokens=5, ignore_eos=True)
    assert len(result.tokens) == 5
    assert isinstance(text, str)


def test_the_manifest_states_what_there_is(artefact: Artefact) -> None:
    manifest = artefact.manifest
    assert manifest.target.name == target.resolve("host").name
    assert manifest.requires["glibc"] == "2.28"
    assert manifest.sizes.linear_bytes == sum(site.bytes for site in manifest.sites.values())
    parameters = sum(site.out_features * site.in_features for site in manifest.sites.values())
    assert manifest.sizes.true_bpw == pytest.approx(8 * manifest.sizes.linear_bytes / parameters, abs=1e-5)
    on_disk = sum(path.stat().st_size for path in artefact.directory.rglob("*") if path.is_file())
    assert manifest.sizes.total_bytes == on_disk - (artefact.directory / MANIFEST).stat().st_size
    assert set(manifest.provenance.checkpoint) == {"config.json", "model.safetensors"}
    assert {"report.json", "report.html", "recipe.resolved.yaml", "tokenizer/tokenizer.json"} <= set(manifest.files)


def test_the_manifest_counts_the_cache(artefact: Artefact) -> None:
    """Manifests from before it was counted can still be read."""
    model, sizes = artefact.manifest.model, artefact.manifest.sizes
    assert model.cache_format == "float32"
    assert sizes.cache_bytes is not None
    assert sizes.cache_bytes % (2 * 4 * model.layers * model.context_length) == 0 < sizes.cache_bytes

    def forget(content: dict[str, dict[str, object]]) -> None:
        del content["model"]["cache_format"], content["sizes"]["cache_bytes"]

    edit(artefact, forget)
    old = Artefact.load(artefact.directory).manifest
    assert (old.model.cache_format, old.sizes.cache_bytes) == ("float32", None)


def test_no_file_tells_where_or_when_it_was_made(artefact: Artefact, tiny: Path) -> None:
    for name in artefact.manifest.files:
        data = (artefact.directory / name).read_bytes()
        assert str(tiny.parent).encode() not in data, name
        assert str(Path(__file__).resolve().parents[3]).encode() not in data, name


def test_every_flipped_byte_is_found_and_its_file_named(artefact: Artefact) -> None:
    rng = np.random.default_rng(0)
    for name, entry in artefact.manifest.files.items():
        path = artefact.directory / name
        whole = path.read_bytes()
        data = bytearray(whole)
        data[int(rng.integers(entry.bytes))] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
        with pytest.raises(HikuiError, match=f"{name} is damaged: its sha256"):
            verify_artefact.check_files(artefact)
        path.write_bytes(whole)
    assert verify_artefact.check_files(artefact).passed


def test_a_missing_a_cut_and_an_added_file_are_named(artefact: Artefact) -> None:
    extra = artefact.directory / "notes.txt"
    extra.write_text("mine")
    with pytest.raises(HikuiError, match=r"notes\.txt is not listed"):
        verify_artefact.check_files(artefact)
    extra.unlink()
    path = artefact.directory / REFERENCE
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(HikuiError, match=f"{REFERENCE} has .* bytes"):
        Artefact.load(artefact.directory)
    path.unlink()
    with pytest.raises(HikuiError, match=f"{REFERENCE} is missing"):
        Artefact.load(artefact.directory)


def test_a_folder_without_a_manifest_and_damaged_ones(artefact: Artefact, tmp_path: Path) -> None:
    with pytest.raises(HikuiError, match="is not an artefact"):
        Artefact.load(tmp_path / "nothing")
    path = artefact.directory / MANIFEST
    whole = path.read_text()
    path.write_text(whole[:100])
    with pytest.raises(HikuiError, match="is damaged: it is not JSON"):
        Artefact.load(artefact.directory)
    path.write_text(whole)
    edit(artefact, lambda content: content["sizes"].__delitem__("true_bpw"))
    with pytest.raises(HikuiError, match=r"is damaged at 'sizes\.true_bpw'"):
        Artefact.load(artefact.directory)


def test_another_schema_version_is_refused(artefact: Artefact) -> None:
    edit(artefact, lambda content: content.update(schema=4))  # type: ignore[call-overload]
    with pytest.raises(HikuiError, match="has schema version 4, but this hikui reads 3"):
        Artefact.load(artefact.directory)


@pytest.mark.parametrize(
    ("version", "change"),
    [(1, "int2 and int3 have other codes since then"), (2, "ternary codes are stored five to a byte since then")],
)
def test_an_artefact_with_the_old_codes_is_refused(artefact: Artefact, version: int, change: str) -> None:
    edit(artefact, lambda content: content.update(schema=version))  # type: ignore[call-overload]
    said = f"has schema version {version}, this hikui reads 3: {change}.*lower the model again"
    with pytest.raises(HikuiError, match=said):
        Artefact.load(artefact.directory)


def test_a_library_of_another_architecture_is_found(artefact: Artefact) -> None:
    path = elf_files(artefact)[0]
    data = bytearray(path.read_bytes())
    struct.pack_into("<H", data, 18, 183 if target.machine_triple().startswith("x86") else 62)
    path.write_bytes(data)
    with pytest.raises(HikuiError, match=f"{path.name} is for .*, but the artefact is for {target.machine_triple()}"):
        verify_artefact.check_libraries(artefact)


def test_a_library_that_needs_a_newer_glibc_than_promised_is_found(artefact: Artefact) -> None:
    edit(artefact, lambda content: content["requires"].update(glibc="2.2"))
    with pytest.raises(HikuiError, match=r"needs glibc 2\.\d+, but the manifest promises 2\.2;"):
        verify_artefact.check_libraries(Artefact.load(artefact.directory))


def test_a_cpu_without_a_feature_is_told_which(artefact: Artefact) -> None:
    edit(artefact, lambda content: content["target"].update(features=["fp", "quantumdot"]))
    with pytest.raises(HikuiError, match="CPU lacks .*quantumdot"):
        open_runner(Artefact.load(artefact.directory))


def test_an_artefact_for_another_machine_is_refused_with_the_way_out(artefact: Artefact) -> None:
    edit(artefact, lambda content: content["target"].update(triple="riscv64-linux-gnu"))
    with pytest.raises(HikuiError, match="is for riscv64-linux-gnu .* run it on such a board, or here with --emulate"):
        open_runner(Artefact.load(artefact.directory))


class Replaying:
    """A runner that gives the reference's own logits, scaled."""

    context_length = 64

    def __init__(self, reference: Reference, factor: float) -> None:
        # Of the prompt's other tokens the reference holds nothing.
        before = np.repeat(reference.logits[:1], reference.prompt - 1, axis=0)
        self._logits, self._factor = np.concatenate((before, reference.logits)), np.float32(factor)

    def reset(self) -> None: ...

    def forward(self, tokens: npt.NDArray[np.int64], past: int) -> npt.NDArray[np.float32]:
        return np.asarray(self._logits[past : past + tokens.size] * self._factor)

    def close(self) -> None: ...


@pytest.mark.parametrize("factor", [1.2, -1.0, float("nan")])
def test_other_numbers_are_found(artefact: Artefact, factor: float) -> None:
    reference = artefact.reference()
    assert verify_artefact.check_numbers(artefact, lambda: Replaying(reference, 1.0001)).passed
    with pytest.raises(HikuiError, match="gives other numbers than it should"):
        verify_artefact.check_numbers(artefact, lambda: Replaying(reference, factor))


def test_the_reference_is_what_the_interpreter_gives(artefact: Artefact) -> None:
    reference = artefact.reference()
    rows = 1 + reference.tokens.size - reference.prompt
    assert reference.logits.shape == (rows, artefact.manifest.model.vocabulary)
    assert reference.tokens[0] == artefact.manifest.model.bos_token_id
    assert 1 < reference.prompt < reference.tokens.size
    path = artefact.directory / REFERENCE
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(HikuiError, match=f"{REFERENCE} is damaged"):
        artefact.reference()


@pytest.mark.parametrize(
    ("entry", "field", "value"),
    [
        ("model", "vocabulary", 4096),
        ("model", "context_length", 7),
        ("model", "eos_token_ids", [0]),
        ("model", "layers", 9),
    ],
)
def test_a_manifest_that_the_models_files_contradict_is_refused(
    artefact: Artefact, entry: str, field: str, value: object
) -> None:
    edit(artefact, lambda content: content[entry].update({field: value}))
    with pytest.raises(HikuiError, match=rf"says '{entry}\.{field}' is .*, but the model's own files say"):
        open_runner(Artefact.load(artefact.directory))
