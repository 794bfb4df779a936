"""A model's tokenizer as transformers loads it, in the one form that needs no transformers: tokenizer.json.

transformers does not always take tokenizer.json as it stands: some classes build their normaliser, pre-tokenizer and
post-processor anew, or add special tokens by tokenizer_config.json. What is kept is the result.
"""

from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from tokenizers import Tokenizer

from hikui.lowering.errors import HikuiError, first_line
from hikui.lowering.huggingface.remote_code import CONFIG, TOKENIZER_CONFIG, refuse_tokenizer_code

FILE = "tokenizer.json"
SENTENCE_PIECE = "tokenizer.model"
MAIN_FILES = (FILE, SENTENCE_PIECE, "vocab.json")
"""Of which a folder with a tokenizer has one."""

_SAMPLE = "Once upon a time, Zoë paid 12.50 € for 3 apples – café!\n\tif x: return [y]"


@dataclass(frozen=True)
class ModelTokenizer:
    """A folder with a tokenizer.

    Attributes:
        trust_remote_code: the folder's own Python files may run.
    """

    folder: Path
    trust_remote_code: bool = False

    def content(self) -> str:
        """The text of a tokenizer.json that encodes as transformers does with this folder.

        Raises:
            HikuiError: the folder has no tokenizer, needs code of its own that is not trusted, or transformers cannot
                give its tokenizer in that form.
        """
        refuse_tokenizer_code(self.folder, trusted=self.trust_remote_code)
        if not any((self.folder / name).is_file() for name in MAIN_FILES):
            raise HikuiError(
                f"{self.folder} has no {FILE}, so text cannot be turned into tokens; add the model's tokenizer."
            )
        return _content(self.folder.absolute(), self.trust_remote_code, _state(self.folder))


def _state(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of the folder's small files, by which a change is noticed."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".model", ".txt", ".py", ".jinja"))
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
    backend = getattr(loaded, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise HikuiError(
            f"The tokenizer in {folder} is {type(loaded).__name__}, which is written in Python and has no {FILE}; give "
            "a folder with one that has, with --tokenizer."
        )
    content = _plain(backend)
    ours = Tokenizer.from_str(content)
    samples = (_SAMPLE, f"{loaded.bos_token or ''}{_SAMPLE}{loaded.eos_token or ''}")
    if any(ours.encode(sample).ids != list(loaded(sample)["input_ids"]) for sample in samples):
        raise HikuiError(
            f"The tokenizer in {folder}, {type(loaded).__name__}, changes texts or tokens in Python, which {FILE} "
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
