"""The artefact: a folder that a board can run, and the manifest that says what is in it.

Reading needs no torch, so that a runner starts quickly. docs/architecture.md shows the layout.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from hikui.lowering.artefact.text import TextCodec
from hikui.lowering.errors import HikuiError
from hikui.lowering.ir.cache_shape import FLOAT_CACHE
from hikui.lowering.json_text import DuplicateKeyError, parse_json

MANIFEST = "manifest.json"
SIGNATURE = f"{MANIFEST}.minisig"
RECIPE = "recipe.resolved.yaml"
REFERENCE = "reference.safetensors"
TOKENIZER = "tokenizer"
REFERENCE_TOLERANCE = "reference_tolerance"
"""Name of the metric that says how far a runner's logits may be from the reference's, relative to the largest one."""

SCHEMA_VERSION: Final = 3

_CHANGES = {
    1: "int2 and int3 have other codes since then, groups fit K, and embeddings are packed",
    2: "ternary codes are stored five to a byte since then",
}
"""What an older schema's artefacts have otherwise, by its version."""

_MOST_BYTES = 64 << 20
"""Of a manifest: some 300,000 sites."""


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class FileEntry(_Entry):
    """A file of the artefact."""

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class TargetEntry(_Entry):
    """What the artefact was made for."""

    name: str
    triple: str
    isas: tuple[str, ...] = Field(description="kernel variants inside, best last")
    features: tuple[str, ...] = Field(description="what the CPU must offer, as /proc/cpuinfo names it")
    emulator_cpu: str | None


class ModelEntry(_Entry):
    """What a runner must know of the model."""

    architecture: str
    context_length: int = Field(ge=1, lt=2**31)
    vocabulary: int = Field(ge=1, lt=2**31)
    layers: int = Field(ge=0)
    cache_format: str = Field(default=FLOAT_CACHE, description="how keys and values are stored")
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]


class SiteEntry(_Entry):
    """One row of the bit map."""

    format: str
    out_features: int
    in_features: int
    rank: int = Field(description="of the low-rank branch inside the site's op, 0 for none")
    bytes: int
    true_bits: float
    in_block: bool = Field(default=True, description="whether it stands in one of the model's blocks; a head does not")


class SizesEntry(_Entry):
    """Bytes; scales, padding and branches are counted."""

    linear_bytes: int
    weight_bytes: int = Field(description="every weight once: linear sites, embeddings, norms, biases")
    total_bytes: int = Field(description="every file of the artefact but the manifest")
    cache_bytes: int | None = Field(default=None, description="of a full key-value cache; not part of any file")
    parameters: int = Field(description="of the model, each tied matrix once")
    block_bpw: float = Field(description="bits per weight over the linear sites inside blocks, so without the head")
    true_bpw: float = Field(description="bits per weight over the linear sites, the head among them")
    all_bpw: float = Field(description="weight_bytes in bits, over all parameters of the model")
    kinds: dict[str, int] | None = Field(
        default=None, description="of weight_bytes, what is stored for what; None in artefacts made before it was told"
    )


class TraceEntry(_Entry):
    """How the traced program was compared with the model's own float logits, before any pass."""

    prompts: tuple[int, ...] = Field(description="lengths in tokens; two of each went in singly")
    blocks: int = Field(description="how many blocks took part, from the first on, beside the head")
    of: int = Field(description="how many blocks the model has")
    largest_difference: float = Field(description="of logits relative to their spread, rounded up to a power of ten")


class Provenance(_Entry):
    """Where the artefact comes from: what to repeat to get the same bytes."""

    hikui: str
    model: str
    checkpoint: dict[str, str] = Field(description="sha256 of the checkpoint's files, by name")
    stored: dict[str, int] | None = Field(
        default=None, description="how many tensors a GGUF file holds of each of ggml's types; None elsewhere"
    )
    recipe: str
    pipeline: str
    calibration: dict[str, str | int] | None
    trace: TraceEntry | None = Field(default=None, description="None in artefacts made before this was compared")
    toolchain: dict[str, str]
    arithmetic: dict[str, str] = Field(
        default_factory=dict,
        description="what the last bits of float sums came from: another make of CPU or BLAS gives other ones",
    )


class Manifest(_Entry):
    """manifest.json."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)

    schema_version: Literal[3] = Field(validation_alias="schema", serialization_alias="schema")
    backend: str
    target: TargetEntry
    model: ModelEntry
    program: dict[str, Any] = Field(description="what the backend's runner must know")
    requires: dict[str, str] = Field(description="what the board must offer beside the CPU features")
    sites: dict[str, SiteEntry]
    sizes: SizesEntry
    metrics: dict[str, float]
    provenance: Provenance
    files: dict[str, FileEntry]

    @field_validator("requires")
    @classmethod
    def _versions(cls, requires: dict[str, str]) -> dict[str, str]:
        if "glibc" in requires and not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9}){1,3}", requires["glibc"]):
            raise ValueError(f"'{requires['glibc']}' is no version of glibc")
        return requires

    @field_validator("files")
    @classmethod
    def _inside(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for name in files:
            if name in ("", MANIFEST) or "\0" in name or "\\" in name or PurePosixPath(name).as_posix() != name:
                raise ValueError(f"'{name}' is no name of a file inside the artefact")
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ValueError(f"'{name}' leads out of the artefact")
        return files

    def to_json(self) -> str:
        """Sorted and indented, the same for the same content."""
        content = self.model_dump(mode="json", by_alias=True)
        return json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class Reference:
    """Numbers that a runner must give: `tokens` [T], of which the first `prompt` go in at once and the others singly.

    Attributes:
        logits: float32 [1 + T − prompt, V], from the interpreter of the lowered program: of the prompt's last token,
            which all of the prompt decides, and of each that follows.
    """

    tokens: npt.NDArray[np.int64]
    prompt: int
    logits: npt.NDArray[np.float32]

    def save(self, path: Path) -> None:
        """Writes a safetensors file: logits as halves of the largest, which costs a 4000th of it and half the bytes."""
        largest = np.abs(self.logits).max(initial=0.0, keepdims=True).reshape(1)
        halves = (self.logits / (largest if largest > 0 else 1)).astype(np.float16)
        tensors = {"largest": largest, "logits": halves, "prompt": np.array([self.prompt]), "tokens": self.tokens}
        path.write_bytes(save(tensors))

    @staticmethod
    def load(path: Path) -> "Reference":
        """Reads what `save` wrote.

        Raises:
            HikuiError: the file is damaged, or holds something else than finite logits of its tokens.
        """
        try:
            tensors = load_file(path)
            tokens, prompt, logits, largest = (tensors[name] for name in ("tokens", "prompt", "logits", "largest"))
        except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
            raise HikuiError(f"{path} is damaged ({error}); lower the model again.") from None
        whole = tokens.dtype == prompt.dtype == np.int64 and logits.dtype == np.float16 and tokens.ndim == 1
        whole = whole and largest.dtype == np.float32 and prompt.shape == largest.shape == (1,) and logits.ndim == 2
        if not whole or not logits.size or not tokens.size:
            raise HikuiError(f"{path} is damaged: it does not hold tokens and their logits; lower the model again.")
        if not 1 <= prompt[0] <= tokens.size or tokens.min() < 0 or tokens.max() >= logits.shape[1]:
            raise HikuiError(f"{path} is damaged: its prompt or a token is out of range; lower the model again.")
        if logits.shape[0] != 1 + tokens.size - prompt[0]:
            raise HikuiError(
                f"{path} is damaged: it holds {logits.shape[0]} rows of logits for a prompt of {prompt[0]} of "
                f"{tokens.size} tokens; lower the model again."
            )
        if not np.isfinite(logits).all() or not logits.any() or not np.isfinite(largest).all() or not largest > 0:
            raise HikuiError(f"{path} has logits that say nothing: all zero, or not finite; lower the model again.")
        return Reference(tokens, int(prompt[0]), logits.astype(np.float32) * largest)


@dataclass(frozen=True)
class Artefact:
    """An artefact on disk."""

    directory: Path
    manifest: Manifest

    @staticmethod
    def load(directory: str | Path) -> "Artefact":
        """Reads the manifest and checks that every file is there with its size; `verify` reads the files themselves.

        Raises:
            HikuiError: this is no artefact, one of another schema, or one that lacks something.
        """
        directory = Path(directory)
        artefact = Artefact(directory, read_manifest(directory))
        inside = directory.resolve()
        for name, entry in sorted(artefact.manifest.files.items()):
            path = directory / name
            if path.exists() and path.resolve() != inside / name:
                raise HikuiError(f"{path} is a link, or lies behind one; an artefact holds plain files only.")
            if not path.is_file():
                raise HikuiError(f"{path} is missing from the artefact; copy the whole folder again.")
            if path.stat().st_size != entry.bytes:
                raise HikuiError(
                    f"{path} has {path.stat().st_size} bytes, {entry.bytes} in the manifest; copy the folder again."
                )
        return artefact

    def codec(self) -> TextCodec:
        """The model's tokenizer.

        Raises:
            HikuiError: the model was lowered without one.
        """
        if not (self.directory / TOKENIZER).is_dir():
            raise HikuiError(
                f"{self.directory} was lowered without a tokenizer, so it takes token ids only; lower the model again "
                "with --tokenizer FOLDER to give it text."
            )
        return TextCodec(self.directory / TOKENIZER)

    def reference(self) -> Reference:
        """The numbers that a runner must give."""
        return Reference.load(self.directory / REFERENCE)

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a prompt, with the special tokens that the tokenizer adds; see `TextCodec`."""
        return self.codec().encode_prompt(text)


def is_artefact(path: Path) -> bool:
    """Whether a folder has a manifest."""
    return (path / MANIFEST).is_file()


def read_manifest(directory: Path) -> Manifest:
    """Reads manifest.json.

    Raises:
        HikuiError: there is none, or it is damaged or of another schema version.
    """
    path = directory / MANIFEST
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise HikuiError(f"{path} has {path.stat().st_size} bytes, which no manifest has; copy the folder again.")
        content = parse_json(path.read_text("utf-8-sig"), unique=True, finite=True)
    except FileNotFoundError:
        raise HikuiError(f"{directory} is not an artefact: it has no {MANIFEST}; `hikui lower` makes one.") from None
    except OSError as error:
        raise HikuiError(f"{path} cannot be read: {error.strerror}.") from None
    except DuplicateKeyError as error:
        raise HikuiError(f"{path} is damaged: it holds {error}; copy the folder again.") from None
    except ValueError:
        raise HikuiError(f"{path} is damaged: it is not JSON; copy the folder again.") from None
    found = content.get("schema") if isinstance(content, dict) else None
    if isinstance(found, int) and found in _CHANGES:
        raise HikuiError(
            f"{path} has schema version {found}, this hikui reads {SCHEMA_VERSION}: {_CHANGES[found]}; lower the model "
            "again, or use the hikui that made it."
        )
    if found != SCHEMA_VERSION:
        raise HikuiError(
            f"{path} has schema version {found}, but this hikui reads {SCHEMA_VERSION}; lower the model again, or use "
            "the hikui that made it."
        )
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise HikuiError(f"{path} is damaged at '{where}': {first['msg']}; copy the folder again.") from None


def sha256(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def inventory(directory: Path) -> dict[str, FileEntry]:
    """Every file under a folder but the manifest and its signature, with forward slashes, sorted.

    Raises:
        HikuiError: a link, or something else that is not a file.
    """
    entries: dict[str, FileEntry] = {}
    for path in sorted(_walk(directory)):
        name = path.relative_to(directory).as_posix()
        if path.is_symlink() or not path.is_file():
            raise HikuiError(f"{path} is not a plain file; an artefact holds plain files only.")
        if name not in (MANIFEST, SIGNATURE):
            entries[name] = FileEntry(bytes=path.stat().st_size, sha256=sha256(path))
    return entries


def _walk(directory: Path) -> Iterable[Path]:
    return (path for path in directory.rglob("*") if path.is_symlink() or not path.is_dir())
