"""How a text is read for evaluation: by documents, or by windows.

Two protocols, both named in what is reported. Per document: BOS where the model has one, the document's first tokens
up to the context length. Per window: the documents joined, read in windows that overlap.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hikui.lowering.artefact.text import SEPARATOR, TextCodec, split_documents
from hikui.lowering.errors import HikuiError, UsageError


@dataclass(frozen=True)
class Protocol:
    """How a text is read.

    Attributes:
        context: tokens that are read at a time, BOS among them.
        bos: the token at the start of each document or window; None for a model that has none.
        stride: tokens from one window to the next; None reads each document alone.
    """

    context: int
    bos: int | None
    stride: int | None = None

    @property
    def unit(self) -> str:
        """What the figures of one part are of: `document` or `window`."""
        return "document" if self.stride is None else "window"

    def __str__(self) -> str:
        if self.stride is None:
            start = "no BOS" if self.bos is None else "BOS"
            return (
                f"documents split at {SEPARATOR}, each alone: {start}, first {self.context} tokens; characters of the "
                "tokens read"
            )
        start = "without BOS" if self.bos is None else "with BOS at its start"
        least = self.context - self.stride + 1
        return (
            f"documents joined with {SEPARATOR} as it stands in the text; windows of {self.context} tokens every "
            f"{self.stride}, each alone, {start}; every token predicted once, after at least {least} tokens of its "
            "window but at the start of the text; characters of the text without separators"
        )

    def fields(self) -> dict[str, object]:
        """The same for programs."""
        return {
            "unit": self.unit,
            "context": self.context,
            "stride": self.stride,
            "bos": self.bos,
            "joined_with": None if self.stride is None else SEPARATOR,
        }


@dataclass(frozen=True)
class Excerpt:
    """Tokens that are run from an empty cache.

    Attributes:
        ids: all of them; the last one is predicted and not read.
        first: position of the first predicted one, at least 1; all after it are predicted too.
        characters: that the predicted ones spell.
    """

    ids: Sequence[int]
    first: int
    characters: int


def read(
    text: str,
    codec: TextCodec,
    *,
    context: int,
    bos: int | None,
    window: int | None = None,
    stride: int | None = None,
    limit: int | None = None,
) -> tuple[Protocol, list[Excerpt]]:
    """What a text gives to predict: by documents, or by windows where their length is given.

    Args:
        text: as `text.read_text` gives it.
        codec: the model's tokenizer.
        context: the model's.
        bos: its BOS token.
        window: tokens that are read at a time.
        stride: tokens that each window predicts; by default all of its own.
        limit: read only so many documents.

    Raises:
        UsageError: the windows do not fit the context, or each other.
        HikuiError: there is nothing to predict.
    """
    if window is None:
        encoded = encode_documents(split_documents(text), codec, context=context, bos=bos, limit=limit)
        return Protocol(context, bos), document_excerpts(encoded, codec, bos=bos)
    every = window if stride is None else stride
    check_windows(window, every, context)
    excerpts = window_excerpts(text, codec, window=window, stride=every, bos=bos, limit=limit)
    return Protocol(window, bos, every), excerpts


def encode_documents(
    documents: Sequence[str], codec: TextCodec, *, context: int, bos: int | None, limit: int | None = None
) -> list[list[int]]:
    """Token ids of each document as the protocol reads them; documents without a token to predict are left out.

    Raises:
        HikuiError: nothing is left.
    """
    prefix = [] if bos is None else [bos]
    encoded = [(prefix + codec.encode(document))[:context] for document in documents[:limit]]
    kept = [ids for ids in encoded if len(ids) > 1]
    if not kept:
        raise HikuiError("The text has no document with two tokens, so nothing can be predicted; give a longer text.")
    return kept


def document_excerpts(documents: Sequence[Sequence[int]], codec: TextCodec, *, bos: int | None) -> list[Excerpt]:
    """Encoded documents, of which all tokens but the first are predicted."""
    return [Excerpt(ids, 1, len(codec.decode(list(ids if bos is None else ids[1:])))) for ids in documents]


def check_windows(window: int, stride: int, context: int) -> None:
    """Refuses windows that a model cannot read.

    Raises:
        UsageError: the window is longer than the context, or the stride than the window.
    """
    if window > context:
        raise UsageError(
            f"A window of {window} tokens is longer than the context of {context}; give a smaller --window."
        )
    if stride > window:
        raise UsageError(
            f"A stride of {stride} would skip tokens between windows of {window}; give a --stride of at most {window}."
        )


def window_excerpts(
    text: str, codec: TextCodec, *, window: int, stride: int, bos: int | None, limit: int | None = None
) -> list[Excerpt]:
    """Windows over the joined text: of `window` tokens, BOS among them, of which the last `stride` are predicted.

    The first one is predicted from its start, and the last one may predict fewer.

    Args:
        text: as `text.read_text` gives it.
        codec: the model's tokenizer.
        window: tokens that are read at a time.
        stride: tokens that each window predicts.
        bos: put at the start of each window.
        limit: read only so many documents.

    Raises:
        HikuiError: there is nothing to predict.
    """
    if limit is not None:
        text = _first_documents(text, limit)
    ids, ends = codec.encode_with_ends(text)
    counted = _counted_characters(text)
    prefix = [] if bos is None else [bos]
    room = window - len(prefix)
    # Without BOS nothing predicts the text's first token.
    start = 0 if prefix else 1
    excerpts: list[Excerpt] = []
    while start < len(ids):
        end = min(len(ids), start + (stride if excerpts else window))
        # `room` tokens are read besides BOS, and the one after them is predicted from the last.
        before = ids[max(0, end - 1 - room) : end]
        characters = int(counted[ends[end - 1]] - counted[ends[start - 1] if start else 0])
        excerpts.append(Excerpt(prefix + before, len(prefix) + len(before) - (end - start), characters))
        start = end
    if not excerpts:
        raise HikuiError("The text has no two tokens, so nothing can be predicted; give a longer text.")
    return excerpts


def _first_documents(text: str, limit: int) -> str:
    parts = text.split(SEPARATOR)
    full = [index for index, part in enumerate(parts) if part.strip()]
    return text if limit >= len(full) else SEPARATOR.join(parts[: full[limit - 1] + 1])


def _counted_characters(text: str) -> npt.NDArray[np.int64]:
    """How many characters up to each position count: those of separators do not."""
    counts = np.ones(len(text) + 1, dtype=np.int64)
    counts[0] = 0
    at = text.find(SEPARATOR)
    while at >= 0:
        counts[at + 1 : at + 1 + len(SEPARATOR)] = 0
        at = text.find(SEPARATOR, at + len(SEPARATOR))
    return np.cumsum(counts)
