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
from hikui.lowering.ir.program import Program
from hikui.lowering.ir.reader import from_text
from hikui.lowering.ir.store import TensorSource, WeightStore

SUFFIX = ".ir"

_HEAD = 100
"""Lines of comments that may stand before the word `program`."""


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
        HikuiError: the weights are not those that the text names.
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
    return program


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
        write_whole(path, partial(save_file, tensors))
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise HikuiError(f"{path} cannot be written: {reason}; choose another --save-weights.") from error
