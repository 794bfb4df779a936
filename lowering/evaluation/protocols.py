"""How a text is read for evaluation: by documents, or by windows.

Two protocols, both named in what is reported. Per document: the special tokens that the tokenizer puts before a text
(BOS, for most), then the document's first tokens up to the context length. Per window: the documents joined, read in
windows that overlap. Special tokens are read and never predicted, nor are those that a tokenizer puts behind a text.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hikui.lowering.artefact.text import SEPARATOR, Pieces, TextCodec, split_documents
from hikui.lowering.errors import HikuiError, UsageError


@dataclass(frozen=True)
class Protocol:
    """How a text is read.

    Attributes:
        context: tokens that are read at a time, special tokens among them.
        prefix: the special tokens at the start of each document or window, as the tokenizer puts them there.
        stride: tokens from one window to the next; None reads each document alone.
    """

    context: int
    prefix: tuple[int, ...]
    stride: int | None = None

    @property
    def unit(self) -> str:
        """What the figures of one part are of: `document` or `window`."""
        return "document" if self.stride is None else "window"

    def __str__(self) -> str:
        if self.stride is None:
            start = self._start or "no special tokens"
            return (
                f"documents split at {SEPARATOR}, each alone: {start}, first {self.context} tokens; characters of the "
                "tokens read"
            )
        start = f"with {self._start} at its start" if self.prefix else "without special tokens"
        least = self.context - self.stride + 1
        return (
            f"documents joined with {SEPARATOR} as it stands in the text; windows of {self.context} tokens every "
            f"{self.stride}, each alone, {start}; every token predicted once, after at least {least} tokens of its "
            "window but at the start of the text; characters of the text without separators"
        )

    @property
    def _start(self) -> str:
        numbers = ", ".join(map(str, self.prefix))
        return f"token{'s' if len(self.prefix) > 1 else ''} {numbers}" if self.prefix else ""

    def fields(self) -> dict[str, object]:
        """The same for programs."""
        return {
            "unit": self.unit,
            "context": self.context,
            "stride": self.stride,
            "prefix": list(self.prefix),
            "joined_with": None if self.stride is None else SEPARATOR,
        }


@dataclass(frozen=True)
class Excerpt:
    """Tokens that are run from an empty cache.

    Attributes:
        ids: all of them; the last one is predicted and not read.
        first: position of the first predicted one, at least 1; all after it are predicted too.
        characters: of the text that the predicted ones stand for; what the tokenizer leaves out does not count.
        unknown: how many of the predicted tokens stand for characters that the tokenizer does not know.
        lost: characters, without spaces, for which there is no token at all.
    """

    ids: Sequence[int]
    first: int
    characters: int
    unknown: int = 0
    lost: int = 0


def read(
    text: str,
    codec: TextCodec,
    *,
    context: int,
    window: int | None = None,
    stride: int | None = None,
    limit: int | None = None,
) -> tuple[Protocol, list[Excerpt]]:
    """What a text gives to predict: by documents, or by windows where their length is given.

    Args:
        text: as `text.read_text` gives it.
        codec: the model's tokenizer.
        context: the model's.
        window: tokens that are read at a time.
        stride: tokens that each window predicts; by default all of its own.
        limit: read only so many documents.

    Raises:
        UsageError: the windows do not fit the context, or each other.
        HikuiError: there is nothing to predict.
    """
    if window is None:
        excerpts = document_excerpts(split_documents(text), codec, context=context, limit=limit)
        return Protocol(context, codec.prefix), excerpts
    every = window if stride is None else stride
    check_windows(window, every, context)
    excerpts = window_excerpts(text, codec, window=window, stride=every, limit=limit)
    return Protocol(window, codec.prefix, every), excerpts


def document_excerpts(
    documents: Sequence[str], codec: TextCodec, *, context: int, limit: int | None = None
) -> list[Excerpt]:
    """Each document from its start, as far as the context reaches; those without a token to predict are left out.

    Raises:
        HikuiError: nothing is left.
    """
    excerpts: list[Excerpt] = []
    for document in documents[:limit]:
        pieces = codec.pieces(document)
        prefix = codec.before(pieces.ids)
        count = min(len(pieces.ids), context - len(prefix))
        # Without special tokens nothing predicts the first token.
        start = 0 if prefix else min(len(codec.prefix), count) or 1
        if start < count:
            excerpts.append(_Spelling(document, pieces, codec).excerpt(prefix + pieces.ids[:count], start, count))
    if not excerpts:
        raise HikuiError("The text has no document with two tokens, so nothing can be predicted; give a longer text.")
    return excerpts


class _Spelling:
    """Which characters of a text its tokens stand for.

    They are counted where the tokens lie in the text, and not in what the tokens decode to: an unknown character
    decodes to nothing. Spaces belong to the token behind them, whatever a tokenizer says. A tokenizer that has no token
    for the unknown drops such characters and places what follows wrongly; there the tokens' own text is counted.

    Args:
        text: the whole text.
        pieces: its tokens.
        codec: the tokenizer.
        separators: leave out the separators of documents.
    """

    def __init__(self, text: str, pieces: Pieces, codec: TextCodec, *, separators: bool = False) -> None:
        size = len(text)
        self._ends = np.maximum.accumulate([0, *(end for _, end in pieces.spans)])
        edges = np.zeros(size + 1, dtype=np.int64)
        for begin, end in pieces.spans:
            edges[begin] += 1
            edges[end] -= 1
        counted = np.ones(size, dtype=bool)
        at = text.find(SEPARATOR) if separators else -1
        while at >= 0:
            counted[at : at + len(SEPARATOR)] = False
            at = text.find(SEPARATOR, at + len(SEPARATOR))
        lost = (np.cumsum(edges)[:size] <= 0) & counted
        for position in np.flatnonzero(lost):
            lost[position] = not text[position].isspace()
        self._lost = np.concatenate([[0], np.cumsum(lost)])
        self._kept = np.concatenate([[0], np.cumsum(counted & ~lost)])
        unknown = np.asarray(pieces.ids) == (-1 if codec.unknown is None else codec.unknown)
        self._unknown = np.concatenate([[0], np.cumsum(unknown)])
        self._pieces, self._codec, self._hidden = pieces, codec, SEPARATOR if separators else ""
        self._dropped_before = False
        self._dropped = max(0, _inked(text) - _inked(self._decoded(0, len(pieces.ids)))) if codec.unknown is None else 0

    def _decoded(self, start: int, end: int) -> str:
        return self._codec.decode(self._pieces.ids[start:end], special=True)

    def excerpt(self, ids: Sequence[int], start: int, end: int) -> Excerpt:
        """Tokens of which the last are the text's from `start` to `end`, and are predicted."""
        first = len(ids) - (end - start)
        if self._dropped:
            text = self._decoded(start, end)
            kept = len(text.replace(self._hidden, "") if self._hidden else text)
            # Where they stood is not known, so the first excerpt has them.
            dropped, self._dropped_before = (0 if self._dropped_before else self._dropped), True
            return Excerpt(ids, first, kept, 0, dropped)
        before, after = int(self._ends[start]), int(self._ends[end])
        kept, lost = int(self._kept[after] - self._kept[before]), int(self._lost[after] - self._lost[before])
        return Excerpt(ids, first, kept, int(self._unknown[end] - self._unknown[start]), lost)


def _inked(text: str) -> int:
    """Characters that are no spaces."""
    return len("".join(text.split()))


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
    text: str, codec: TextCodec, *, window: int, stride: int, limit: int | None = None
) -> list[Excerpt]:
    """Windows over the joined text: of `window` tokens, special ones among them; the last `stride` are predicted.

    The first one is predicted from its start, and the last one may predict fewer.

    Args:
        text: as `text.read_text` gives it.
        codec: the model's tokenizer.
        window: tokens that are read at a time.
        stride: tokens that each window predicts.
        limit: read only so many documents.

    Raises:
        HikuiError: there is nothing to predict.
    """
    if limit is not None:
        text = _first_documents(text, limit)
    pieces = codec.pieces(text)
    prefix = codec.before(pieces.ids)
    room = window - len(codec.prefix)
    if room < 1:
        raise UsageError(f"A window of {window} tokens has no room beside {len(codec.prefix)} special ones; give more.")
    spelling = _Spelling(text, pieces, codec, separators=True)
    # Without special tokens nothing predicts the text's first token.
    start = 0 if prefix else min(len(codec.prefix), len(pieces.ids)) or 1
    excerpts: list[Excerpt] = []
    while start < len(pieces.ids):
        end = min(len(pieces.ids), start + (stride if excerpts else window))
        # `room` tokens are read besides the special ones, and the one after them is predicted from the last.
        from_ = max(0, end - 1 - room)
        before = pieces.ids[from_:end]
        lead = prefix if from_ == 0 else list(codec.prefix)
        excerpts.append(spelling.excerpt(lead + before, start, end))
        start = end
    if not excerpts:
        raise HikuiError("The text has no two tokens, so nothing can be predicted; give a longer text.")
    return excerpts


def _first_documents(text: str, limit: int) -> str:
    parts = text.split(SEPARATOR)
    full = [index for index, part in enumerate(parts) if part.strip()]
    return text if limit >= len(full) else SEPARATOR.join(parts[: full[limit - 1] + 1])
