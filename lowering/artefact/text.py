"""Text files as documents, and text as tokens, from the tokenizer's files alone.

Documents in a text file are separated by `<|endoftext|>`; each is measured and calibrated on its own, after the BOS
token where the model has one.
"""

import shutil
from pathlib import Path

from tokenizers import Tokenizer

from hikui.lowering.errors import HikuiError, UsageError

FILE = "tokenizer.json"
SEPARATOR = "<|endoftext|>"
_BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json")


def read_text(path: Path) -> str:
    """A text file as it stands, separators included.

    Raises:
        UsageError: the file cannot be read, is not UTF-8, or holds no text.
    """
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise UsageError(f"The text {path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"The text {path} is not UTF-8: byte {error.start} cannot be read.") from None
    if not split_documents(text):
        raise UsageError(f"The text {path} is empty; give one with at least a sentence in it.")
    return text


def read_documents(path: Path) -> list[str]:
    """The documents of a text file, stripped, empty ones left out.

    Raises:
        UsageError: as `read_text`.
    """
    return split_documents(read_text(path))


def split_documents(text: str) -> list[str]:
    """The documents of a text, stripped, empty ones left out."""
    return [document for part in text.split(SEPARATOR) if (document := part.strip())]


class TextCodec:
    """A model's tokenizer.

    Args:
        folder: holds `tokenizer.json`.

    Raises:
        HikuiError: the file is missing or is not a tokenizer.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / FILE
        if not path.is_file():
            raise HikuiError(
                f"{folder} has no {FILE}, so text cannot be turned into tokens; add the model's tokenizer."
            )
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception for every malformed file
            raise HikuiError(f"{path} is not a tokenizer: {error}.") from None

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids of a text, without special tokens, and where in the text each token ends."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return list(encoding.ids), [end for _, end in encoding.offsets]

    def decode(self, tokens: list[int]) -> str:
        """The text of token ids, without special tokens."""
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))


def copy_tokenizer(source: Path, destination: Path) -> None:
    """Copies what turns text into tokens, and nothing else, into a new folder.

    Raises:
        HikuiError: the source has no `tokenizer.json` and none can be made from its other files.
    """
    destination.mkdir()
    if (source / FILE).is_file():
        shutil.copyfile(source / FILE, destination / FILE)
    else:
        _convert(source, destination / FILE)
    for name in _BESIDE:
        if (source / name).is_file():
            shutil.copyfile(source / name, destination / name)


def _convert(source: Path, path: Path) -> None:
    """Writes the quick form of a tokenizer that comes as SentencePiece or as a vocabulary with merges."""
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(source).backend_tokenizer.save(str(path))
    except Exception as error:
        raise HikuiError(f"{source} has no {FILE}, and none can be made from its files: {error}.") from None
