"""Text files as documents, and text as tokens, from a tokenizer.json alone.

Documents in a text file are separated by `<|endoftext|>`; each is measured and calibrated on its own, after the special
tokens that the tokenizer puts before a text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer

from hikui.lowering.errors import HikuiError, UsageError
from hikui.lowering.huggingface.tokenizer import FILE, ModelTokenizer, read_tokenizer
from hikui.lowering.json_text import not_utf8, parse_json

SEPARATOR = "<|endoftext|>"


def read_text(path: Path) -> str:
    """A text file as it stands, separators included; a byte-order mark at its start is no part of the text.

    Raises:
        UsageError: the file cannot be read, is not UTF-8, or holds no text.
    """
    try:
        text = path.read_text("utf-8-sig")
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


@dataclass(frozen=True)
class Pieces:
    """A text in tokens, without special tokens around it.

    Attributes:
        ids: of the tokens.
        spans: where in the text each begins and ends, in characters.
    """

    ids: list[int]
    spans: list[tuple[int, int]]


class TextCodec:
    """A tokenizer, which encodes as transformers does.

    Args:
        source: a model's tokenizer, or the folder of an artefact with a tokenizer.json.

    Attributes:
        prefix: the special tokens that the tokenizer puts before a text.
        suffix: and those behind it.

    Raises:
        HikuiError: there is no tokenizer, it is none, or it needs code that is not trusted.
    """

    def __init__(self, source: Path | ModelTokenizer) -> None:
        if isinstance(source, ModelTokenizer):
            self._tokenizer = Tokenizer.from_str(source.content())
        else:
            if not (source / FILE).is_file():
                raise HikuiError(
                    f"{source} has no {FILE}, so text cannot be turned into tokens; add the model's tokenizer."
                )
            self._tokenizer = read_tokenizer(source / FILE)
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
        inner = 0
        for probe in ("a", "1", ".", " "):
            marked = self._tokenizer.encode(probe, add_special_tokens=True)
            if inner := len(self._tokenizer.encode(probe, add_special_tokens=False).ids):
                break
        before = next((at for at, special in enumerate(marked.special_tokens_mask) if not special), len(marked.ids))
        self.prefix = tuple(marked.ids[:before])
        self.suffix = tuple(marked.ids[before + inner :])

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens around it."""
        return list(self._tokenizer.encode(_writable(text), add_special_tokens=False).ids)

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a text as a model is given them: with the special tokens that transformers adds.

        A text that begins with these already, such as one that a chat template has made, gets none, as transformers
        adds none to what its chat template gives.
        """
        ids = self.encode(text)
        if self.prefix and self.begins(ids):
            return ids
        return list(self._tokenizer.encode(_writable(text), add_special_tokens=True).ids)

    def begins(self, ids: Sequence[int]) -> bool:
        """Whether tokens begin with the prefix already."""
        return tuple(ids[: len(self.prefix)]) == self.prefix

    def before(self, ids: Sequence[int]) -> list[int]:
        """The special tokens that a text lacks at its front."""
        return [] if self.begins(ids) else list(self.prefix)

    def pieces(self, text: str) -> Pieces:
        """The tokens of a text and where they lie in it, without special tokens around it."""
        encoding = self._tokenizer.encode(_writable(text), add_special_tokens=False)
        return Pieces(list(encoding.ids), list(encoding.offsets))

    def decode(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """The text of token ids, without special tokens but where they are wanted."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=not special))

    def ids(self) -> list[int]:
        """Every token id that the tokenizer knows, in order."""
        return sorted(set(self._tokenizer.get_vocab(with_added_tokens=True).values()))

    @cached_property
    def unknown(self) -> int | None:
        """The token that stands for what the tokenizer does not know, if it has one."""
        model = parse_json(self._tokenizer.to_str())["model"]
        if model.get("unk_id") is not None:
            return int(model["unk_id"])
        name = model.get("unk_token")
        return None if name is None else self._tokenizer.token_to_id(name)


def _writable(text: str) -> str:
    """The text, if it can be written as UTF-8.

    Raises:
        UsageError: it holds half of a surrogate pair, which is how Python keeps a byte that was not UTF-8.
    """
    if (at := not_utf8(text)) is not None:
        raise UsageError(f"The text {text[:40]!a} is not UTF-8 at character {at + 1}; give it as UTF-8.")
    return text


def copy_tokenizer(source: ModelTokenizer, destination: Path) -> None:
    """Writes what turns text into tokens, and nothing else, into a new folder.

    Raises:
        HikuiError: as `ModelTokenizer.content`.
    """
    destination.mkdir()
    (destination / FILE).write_text(source.content(), "utf-8")
    for name, content in source.beside().items():
        (destination / name).write_bytes(content)
