"""Reads a Hugging Face checkpoint folder without loading it: one lazy source a tensor."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hikui.lowering.checkpoint.container import read_pickle, read_safetensors
from hikui.lowering.checkpoint.gguf_model import gguf_config, has_tokenizer
from hikui.lowering.checkpoint.gguf_tensor import GgufTensor
from hikui.lowering.checkpoint.quantised import CONFIG_KEY, SIDE_FILES, Quantisation, parse_quantisation, with_floats
from hikui.lowering.checkpoint.quantised_matrix import QuantisedMatrix
from hikui.lowering.errors import HikuiError
from hikui.lowering.huggingface.gguf_file import SUFFIX, GgufFile, is_gguf, read_gguf
from hikui.lowering.huggingface.tokenizer import MAIN_FILES
from hikui.lowering.ir.store import FileTensor, RowSource, TensorInfo, TensorSource, Transposed, WeightStore
from hikui.lowering.json_text import parse_json

_PIECE_BYTES = 1 << 24
"""What a scan over a tensor reads at a time."""

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLE, _PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


@dataclass(frozen=True)
class Float32Tensor:
    """A source whose floating-point values are given as float32, as the graph has them."""

    source: TensorSource

    @property
    def info(self) -> TensorInfo:
        inner = self.source.info
        return TensorInfo(torch.float32 if inner.dtype.is_floating_point else inner.dtype, inner.shape)

    def load(self) -> Tensor:
        return self.source.load().to(self.info.dtype)


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint: a folder, or a GGUF file.

    A GGUF that is named itself is read alone, whatever lies beside it. In a folder whose only weights it is, the
    folder's config.json and tokenizer come before those of the file, where they are there.

    Attributes:
        folder: where it is; the file itself for a GGUF that is read alone.
        config: config.json, or what a GGUF's metadata has of it.
        tensors: where each tensor lies, by its name in the checkpoint; a matrix that GPTQ or AWQ has quantised goes by
            the name that it would have as floats.
        quantisation: what the checkpoint says of its quantisation, if it is quantised.
        gguf: the file that the tensors lie in, if it is one.
        has_config: whether `config` is a config.json.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, FileTensor | QuantisedMatrix | GgufTensor]
    quantisation: Quantisation | None = None
    gguf: GgufFile | None = None
    has_config: bool = True

    @staticmethod
    def open(folder: Path) -> "Checkpoint":
        """Reads the config and the headers of all weight files.

        Raises:
            HikuiError: The folder, its config or a weight file is missing, truncated or malformed, or the checkpoint is
                quantised in a way that is not read.
        """
        if folder.is_file():
            if is_gguf(folder) or folder.suffix == SUFFIX:
                return _of_gguf(folder, read_gguf(folder))
            raise HikuiError(
                f"{folder} is a file{_kind_of_file(folder)}; give the Hugging Face folder with config.json and the "
                "float weights, or a GGUF file."
            )
        if not folder.is_dir():
            raise HikuiError(f"The checkpoint folder {folder} does not exist; give one with config.json and weights.")
        if (named := _only_gguf(folder)) is not None:
            return _of_gguf(folder, read_gguf(named))
        if not (folder / "config.json").is_file():
            raise HikuiError(f"{folder} is no checkpoint: it has no config.json.")
        config = read_object(folder / "config.json")
        if (folder / _INDEX).is_file():
            tensors = _read_index(folder / _INDEX, read_safetensors)
        elif (folder / _SINGLE).is_file():
            tensors = read_safetensors(folder / _SINGLE)
        elif (folder / _PICKLE_INDEX).is_file():
            tensors = _read_index(folder / _PICKLE_INDEX, read_pickle)
        elif (folder / _PICKLE).is_file():
            tensors = read_pickle(folder / _PICKLE)
        elif (named := _single_file_of_other_name(folder)) is not None:
            tensors = read_safetensors(named)
        else:
            raise HikuiError(f"{folder} has no weights: none of {_SINGLE}, {_INDEX}, {_PICKLE} is there.")
        quantisation = _quantisation(folder, config, tensors)
        floats = tensors if quantisation is None else with_floats(quantisation, tensors)
        return Checkpoint(folder, config, floats, quantisation)

    def generation_config(self) -> Mapping[str, Any]:
        """generation_config.json, or nothing where there is none."""
        path = self.folder / "generation_config.json"
        return read_object(path) if path.is_file() else {}

    def tokenizer_folder(self) -> Path | None:
        """The folder, if it holds a tokenizer, or the GGUF file that does.

        Raises:
            HikuiError: a GGUF's tokenizer has more tokens than its embedding.
        """
        if any((self.folder / name).is_file() for name in MAIN_FILES):
            return self.folder
        return self.gguf.path if self.gguf is not None and has_tokenizer(self.gguf) else None

    def find(self, names: Sequence[str], base_prefix: str) -> str | None:
        """The checkpoint's key for a module parameter.

        Args:
            names: The parameter's names in the module (several for a tied one), the preferred first.
            base_prefix: Name of the base model inside the causal LM ("model", "transformer"); a checkpoint of the bare
                base model lacks it, one of an outer model may add it.
        """
        prefix = base_prefix + "."
        for name in names:
            for key in (name, name.removeprefix(prefix), prefix + name):
                if key in self.tensors:
                    return key
        return None

    def source(self, key: str, name: str, shape: tuple[int, ...], *, transposed: bool = False) -> TensorSource:
        """The tensor of that key, floating point as float32, for the parameter `name` of the module.

        Args:
            key: one of `tensors`.
            name: of the parameter, for messages.
            shape: of the parameter.
            transposed: the module keeps its matrices as [K, N], which quantised ones never are.

        Raises:
            HikuiError: Its shape is not the module's.
        """
        tensor = self.tensors[key]
        given: TensorSource = tensor
        if isinstance(tensor, QuantisedMatrix) and transposed:
            given = Transposed(tensor)
        if given.info.shape != shape:
            raise HikuiError(
                f"The tensor '{key}' in {self.folder} has shape {list(given.info.shape)}, but by "
                f"{'config.json' if self.has_config else 'its metadata'} {name} must have {list(shape)}; give the "
                f"{'config.json that was saved with these weights' if self.has_config else 'file as it was published'}."
            )
        if isinstance(tensor, QuantisedMatrix | GgufTensor):
            return given
        if not tensor.dtype.is_floating_point:
            raise HikuiError(
                f"The tensor '{key}' in {self.folder} has dtype {_named(tensor.dtype)}, and {name} takes floats; the "
                "checkpoint is quantised in a way that its config.json does not say, so give the float one."
            )
        if tensor.dtype in (torch.bfloat16, torch.float16):
            return FileTensor(tensor.path, tensor.offset, tensor.dtype, tensor.shape, widen=True)
        return Float32Tensor(tensor) if tensor.dtype == torch.float64 else tensor

    def identical(self, first: str, second: str) -> bool:
        """Whether two tensors hold the same values, compared piece by piece."""
        a, b = self.tensors[first], self.tensors[second]
        if a.info != b.info:
            return False
        return all(torch.equal(x, y) for x, y in zip(pieces(a), pieces(b), strict=True))


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _kind_of_file(path: Path) -> str:
    """What a file is by its name, in words."""
    return " of weights alone" if path.suffix in (".safetensors", ".bin", ".pt", ".pth") else ""


def _only_gguf(folder: Path) -> Path | None:
    """The GGUF file of a folder that has no other weights.

    Raises:
        HikuiError: it has several.
    """
    found = sorted(path for path in folder.glob(f"*{SUFFIX}") if path.is_file())
    if not found or any((folder / name).is_file() for name in (_SINGLE, _INDEX, _PICKLE, _PICKLE_INDEX)):
        return None
    if len(found) > 1:
        raise HikuiError(
            f"{folder} has {len(found)} GGUF files ({found[0].name}, {found[1].name}, …); name the one that is meant."
        )
    return found[0]


def _of_gguf(place: Path, file: GgufFile) -> Checkpoint:
    """A checkpoint of a GGUF file, given by itself or by its folder."""
    path = place / "config.json"
    has_config = path.is_file()
    config = read_object(path) if has_config else gguf_config(file)
    alone = place == file.path
    tensors = {name: GgufTensor.of(file.path, name, entry, alone=alone) for name, entry in file.tensors.items()}
    return Checkpoint(place, config, tensors, gguf=file, has_config=has_config)


def _single_file_of_other_name(folder: Path) -> Path | None:
    """The weights of an older quantised folder, which name the method and its options (`gptq_model-4bit-128g`)."""
    files = sorted(folder.glob("*.safetensors"))
    sided = any((folder / name).is_file() for name in SIDE_FILES)
    return files[0] if sided and len(files) == 1 else None


def _quantisation(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, FileTensor]) -> Quantisation | None:
    """What config.json, or a file beside it in older folders, says of the quantisation."""
    if config.get(CONFIG_KEY) is not None:
        return parse_quantisation(config[CONFIG_KEY], folder / "config.json")
    if any(key.endswith(".qweight") for key in tensors):
        for name, method in SIDE_FILES.items():
            if (folder / name).is_file():
                return parse_quantisation(read_object(folder / name), folder / name, method)
        raise HikuiError(
            f"{folder} holds quantised tensors (.qweight), but neither {CONFIG_KEY} in config.json nor any of "
            f"{', '.join(SIDE_FILES)} says how; fetch the missing file."
        )
    return None


def read_object(path: Path) -> dict[str, Any]:
    """A file that holds a JSON object.

    Raises:
        HikuiError: it cannot be read, or holds something else.
    """
    try:
        content = parse_json(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise HikuiError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise HikuiError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise HikuiError(f"{path} must hold a JSON object, not a {type(content).__name__}.")
    return content


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        # A name that no file can have: too long, or with a null in it.
        return False


def _read_index(path: Path, reader: Callable[[Path], dict[str, FileTensor]]) -> dict[str, FileTensor]:
    """Reads the shards that an index names."""
    weight_map = read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise HikuiError(f"{path} has no usable 'weight_map'.")
    shards: dict[str, dict[str, FileTensor]] = {}
    for file in sorted(set(weight_map.values())):
        shard = path.parent / file
        if Path(file).name != file or not _is_file(shard):
            raise HikuiError(f"{path.name} names the shard {file[:80]}, which is not in {path.parent}; add it.")
        shards[file] = reader(shard)
    tensors = {}
    for key, file in sorted(weight_map.items()):
        if key not in shards[file]:
            raise HikuiError(f"{path.name} places the tensor '{key}' in {file}, which does not hold it.")
        tensors[key] = shards[file][key]
    return tensors


def pieces(source: TensorSource) -> Iterator[Tensor]:
    """The values of a tensor, flat, in small pieces where it lies in a file."""
    if isinstance(source, Float32Tensor):
        yield from pieces(source.source)
    elif isinstance(source, FileTensor):
        step, count = _PIECE_BYTES // source.dtype.itemsize, math.prod(source.shape)
        for start in range(0, count, step):
            offset = source.offset + start * source.dtype.itemsize
            yield FileTensor(source.path, offset, source.dtype, (min(step, count - start),)).load()
    elif isinstance(source, RowSource):
        count, width = source.info.shape[0], math.prod(source.info.shape[1:])
        step = max(1, _PIECE_BYTES // max(1, width * source.info.dtype.itemsize))
        for start in range(0, count, step):
            yield source.rows(start, min(start + step, count)).load().flatten()
    else:
        yield source.load().flatten()


def check_finite(store: WeightStore) -> None:
    """Looks for NaN and infinity in every floating-point tensor, piece by piece.

    Raises:
        HikuiError: Names the first tensor that has one, with the count.
    """
    for key in store.keys():
        if not store.info(key).dtype.is_floating_point:
            continue
        nan = infinite = 0
        for piece in pieces(store.source(key)):
            if not torch.isfinite(piece).all():
                nan += int(piece.isnan().sum())
                infinite += int(piece.isinf().sum())
        if nan or infinite:
            raise HikuiError(
                f"The tensor '{key}' holds {nan} NaN and {infinite} infinite values, of which nothing can be lowered; "
                "give a checkpoint whose weights are all finite."
            )
