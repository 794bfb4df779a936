"""Programs as files: a text such as `hikui opt --print-ir` gives, and its weights beside it."""

from collections.abc import Mapping
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from hikui.lowering.checkpoint.container import read_safetensors
from hikui.lowering.checkpoint.folder import Checkpoint
from hikui.lowering.errors import HikuiError, UsageError
from hikui.lowering.files import write_whole
from hikui.lowering.huggingface.gguf_file import is_gguf
from hikui.lowering.huggingface.tokenizer import ModelTokenizer
from hikui.lowering.ir.packed import PackedLinear, is_packed
from hikui.lowering.ir.program import Program
from hikui.lowering.ir.reader import from_text
from hikui.lowering.ir.store import TensorSource, WeightStore

SUFFIX = ".ir"

_HEAD = 100
"""Lines of comments that may stand before the word `program`."""

_CODES = {"hikui.codes": "2"}
"""In the metadata of saved weights: what codes int2 and int3 have. Files without it may hold the odd ones of before."""


def is_program(model: str) -> bool:
    """Whether what was given as a model is a file with a program's text."""
    path = Path(model)
    if not path.is_file():
        return path.suffix == SUFFIX
    return path.suffix == SUFFIX or _first_word(path) == "program"


def _first_word(path: Path) -> str:
    try:
        with path.open(encoding="utf-8-sig") as file:
            words = (line.split(maxsplit=1)[0] for line in islice(file, _HEAD) if line.strip())
            return next((word for word in words if not word.startswith("//")), "")
    except (OSError, UnicodeDecodeError):
        return ""


def read_program(
    path: Path, *, weights: Path | None = None, seed: int | None = None, tokenizer: ModelTokenizer | None = None
) -> Program:
    """The program of a file.

    Args:
        path: the text.
        weights: a safetensors file, or a checkpoint's folder, that has them by the names in the text.
        seed: makes those that are not given; with `weights` all must be given where it is None.
        tokenizer: what a text never holds.

    Raises:
        UsageError: the file cannot be read or is no program.
        HikuiError: the weights are not those that the text names, or packed with codes of before.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}; give a file that --print-ir wrote.") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no text ({error.reason}); give a file that --print-ir wrote.") from error
    store = None if weights is None else WeightStore(dict(_sources(weights)))
    program = from_text(text, store, source=path.name, seed=seed)
    program.tokenizer = tokenizer
    if weights is not None and weights.is_file():
        _refuse_old_codes(program, weights)
    return program


def _refuse_old_codes(program: Program, weights: Path) -> None:
    """Raises HikuiError where a file gives int2 or int3 weights and does not say that it has their codes of today."""
    from safetensors import safe_open

    with safe_open(weights, "pt") as file:
        names, said = frozenset(file.keys()), file.metadata() or {}
    if _CODES.items() <= said.items():
        return
    for node in program.graph.nodes:
        if not is_packed(node):
            continue
        packed = PackedLinear.of(node)
        key = program.weight_of(packed.weight)
        if packed.format.kind in ("int2", "int3") and key in names:
            raise HikuiError(
                f"{weights} does not say which codes '{key}' ({packed.format}) has, and those of int2 and int3 have "
                "changed; make the file again with --save-weights."
            )


def _sources(weights: Path) -> Mapping[str, TensorSource]:
    if not weights.is_dir() and not is_gguf(weights):
        return read_safetensors(weights)
    checkpoint = Checkpoint.open(weights)
    if checkpoint.gguf is not None:
        raise UsageError(
            f"{weights} is a GGUF, whose tensors have other names than a program's text; give the weights that "
            "--save-weights wrote."
        )
    return {key: checkpoint.source(key, key, held.info.shape) for key, held in checkpoint.tensors.items()}


def save_weights(program: Program, path: Path) -> None:
    """Writes every tensor that the program's text names, under its name.

    Raises:
        HikuiError: the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    for key in program.store.keys():
        # Two names may share memory, which the format does not have.
        tensors[key] = program.store.load(key).clone().contiguous()
    try:
        write_whole(path, partial(save_file, tensors, metadata=_CODES))
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise HikuiError(f"{path} cannot be written: {reason}; choose another --save-weights.") from error
