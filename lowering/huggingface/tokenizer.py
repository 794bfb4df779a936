"""A model's tokenizer as transformers loads it, in the one form that needs no transformers: tokenizer.json.

transformers does not always take tokenizer.json as it stands: some classes build their normaliser, pre-tokenizer and
post-processor anew, or add special tokens by tokenizer_config.json. What is kept is the result.
"""

from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import Tokenizer

from hikui.lowering.errors import HikuiError, first_line
from hikui.lowering.huggingface.gguf_file import read_gguf
from hikui.lowering.huggingface.remote_code import CONFIG, TOKENIZER_CONFIG, refuse_tokenizer_code

FILE = "tokenizer.json"
SENTENCE_PIECE = "tokenizer.model"
MAIN_FILES = (FILE, SENTENCE_PIECE, "vocab.json")
"""Of which a folder with a tokenizer has one."""

BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json")
"""Files that go with tokenizer.json: special tokens by their parts, the chat template."""

_SAMPLE = "Once upon a time, Zoë paid 12.50 € for 3 apples – café!\n\tif x: return [y]"


@dataclass(frozen=True)
class ModelTokenizer:
    """A folder with a tokenizer, or a GGUF file with one in its metadata.

    Attributes:
        folder: the folder, or the file.
        trust_remote_code: the folder's own Python files may run.
    """

    folder: Path
    trust_remote_code: bool = False

    def content(self) -> str:
        """The text of a tokenizer.json that encodes as transformers does with this folder or file.

        Raises:
            HikuiError: the folder has no tokenizer, needs code of its own that is not trusted, or transformers cannot
                give its tokenizer in that form.
        """
        if self.folder.is_file():
            return _gguf_content(self.folder.absolute(), _state(self.folder))[FILE]
        refuse_tokenizer_code(self.folder, trusted=self.trust_remote_code)
        if not any((self.folder / name).is_file() for name in MAIN_FILES):
            raise HikuiError(
                f"{self.folder} has no {FILE}, so text cannot be turned into tokens; add the model's tokenizer."
            )
        return _content(self.folder.absolute(), self.trust_remote_code, _state(self.folder))

    def beside(self) -> dict[str, bytes]:
        """The files of `BESIDE` that there are, by name; for a GGUF file, as transformers writes them.

        Raises:
            HikuiError: as `content`.
        """
        if not self.folder.is_file():
            return {name: (self.folder / name).read_bytes() for name in BESIDE if (self.folder / name).is_file()}
        written = _gguf_content(self.folder.absolute(), _state(self.folder))
        return {name: text.encode() for name, text in written.items() if name != FILE}


def _state(place: Path) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of a folder's small files, or of the one file, by which a change is noticed."""
    if place.is_file():
        files = [place]
    else:
        files = sorted(path for path in place.iterdir() if path.suffix in (".json", ".model", ".txt", ".py", ".jinja"))
    return tuple((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files if path.is_file())


@lru_cache(maxsize=4)
def _content(folder: Path, trusted: bool, state: tuple[tuple[str, int, int], ...]) -> str:
    path = folder / FILE
    if path.is_file() and not any((folder / name).is_file() for name in (CONFIG, TOKENIZER_CONFIG)):
        return _plain(read_tokenizer(path))
    if not path.is_file():
        _require_converter(folder)
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted, local_files_only=True)
    except Exception as error:  # whatever the files provoke; the classes share no base
        if path.is_file():
            read_tokenizer(path)  # says what is wrong where it is this file
            raise HikuiError(f"transformers cannot load the tokenizer in {folder}: {first_line(error)}.") from error
        raise HikuiError(
            f"{folder} has no {FILE}, and none can be made from its files: {first_line(error)}."
        ) from error
    return _as_json(loaded, folder)


@lru_cache(maxsize=4)
def _gguf_content(path: Path, state: tuple[tuple[str, int, int], ...]) -> dict[str, str]:
    """tokenizer.json and what goes beside it, from a GGUF's metadata."""
    if "tokenizer.ggml.tokens" not in read_gguf(path).metadata:
        raise HikuiError(f"{path} has no tokenizer in its metadata; give a folder with the model's with --tokenizer.")
    from transformers import PreTrainedTokenizerFast

    with TemporaryDirectory() as alone:
        # In a folder of its own, because transformers reads what else lies beside the file.
        (Path(alone) / "model.gguf").symlink_to(path)
        try:
            loaded = PreTrainedTokenizerFast.from_pretrained(alone, gguf_file="model.gguf", local_files_only=True)
        except Exception as error:  # whatever the metadata provokes
            raise HikuiError(
                f"transformers cannot make a tokenizer from the metadata of {path}: {first_line(error)}; give a folder "
                "with the model's with --tokenizer."
            ) from error
    content = _as_json(loaded, path)
    with TemporaryDirectory() as folder:
        loaded.save_pretrained(folder)
        written = {name: Path(folder) / name for name in BESIDE}
        return {FILE: content, **{name: file.read_text("utf-8") for name, file in written.items() if file.is_file()}}


def _as_json(loaded: Any, place: Path) -> str:
    """The text of a tokenizer.json that does what a tokenizer of transformers does.

    Raises:
        HikuiError: there is none.
    """
    backend = getattr(loaded, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise HikuiError(
            f"The tokenizer in {place} is {type(loaded).__name__}, which is written in Python and has no {FILE}; give "
            "a folder with one that has, with --tokenizer."
        )
    content = _plain(backend)
    ours = Tokenizer.from_str(content)
    samples = (_SAMPLE, f"{loaded.bos_token or ''}{_SAMPLE}{loaded.eos_token or ''}")
    if any(ours.encode(sample).ids != list(loaded(sample)["input_ids"]) for sample in samples):
        raise HikuiError(
            f"The tokenizer in {place}, {type(loaded).__name__}, changes texts or tokens in Python, which {FILE} "
            "cannot say; give a folder with one that does not, with --tokenizer."
        )
    return content


def _require_converter(folder: Path) -> None:
    if not (folder / SENTENCE_PIECE).is_file():
        return
    if missing := [name for name in ("sentencepiece", "google.protobuf") if not _installed(name)]:
        raise HikuiError(
            f"{folder} has a SentencePiece model ({SENTENCE_PIECE}) and no {FILE}; it takes the package "
            f"{' and '.join(missing).replace('google.', '')} to convert it, which is not installed: install it, or "
            "give a folder with a tokenizer.json with --tokenizer."
        )


def _installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def read_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer.json as it stands.

    Raises:
        HikuiError: it is none.
    """
    try:
        return Tokenizer.from_str(path.read_text("utf-8-sig"))
    except Exception as error:  # the library raises plain Exception for every malformed file
        raise HikuiError(f"{path} is not a tokenizer: {first_line(error)}.") from None


def _plain(tokenizer: Tokenizer) -> str:
    """Without truncation and padding, which transformers leaves out too unless it is asked for them."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return str(tokenizer.to_str())
