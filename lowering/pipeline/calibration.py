"""Windows of text that passes measure a model on."""

from collections.abc import Callable
from itertools import product

import numpy as np
import torch

from hikui.lowering.errors import HikuiError
from hikui.lowering.ir.program import ModelConfig
from hikui.lowering.pipeline.contract import Calibration

Encode = Callable[[str], list[int]]
"""Text to token ids, with the special tokens that the tokenizer adds."""

LONG = 4
"""Times that a long window is as long as another."""

_CHARACTERS_PER_TOKEN = 8


def draw(
    documents: list[str],
    encode: Encode,
    config: ModelConfig,
    *,
    samples: int,
    tokens: int,
    seed: int,
    source: str,
    long: int = 0,
) -> Calibration:
    """Draws windows of text to calibrate on.

    Documents are cut into pieces of about twice a window, which are visited in an order drawn with `seed`; each gives
    its first tokens, special ones among them. Where those are too few, the tokens behind them give windows too,
    and then come short ones, from short documents; text that is too little gives fewer windows. Long windows are drawn
    before, in the same way, of pieces that give the others none.

    Args:
        documents: the text.
        encode: the model's tokenizer.
        config: bounds the window by the context length.
        samples: windows to draw.
        tokens: tokens in a window.
        seed: of the order.
        source: what the manifest says of where the text came from.
        long: windows of `LONG` times as many tokens to draw; short ones do not count.

    Raises:
        HikuiError: no document has two tokens.
    """
    length, far = (min(size, config.context_length) for size in (tokens, LONG * tokens))
    wide: list[list[int]] = []
    if long:
        pieces = _cut(documents, far)
        order = np.random.default_rng(seed).permutation(len(pieces)).tolist()
        left = dict.fromkeys(order)
        for index in order:
            ids = encode(pieces[index].strip())[:far]
            if len(ids) == far:
                wide.append(ids)
                del left[index]
            if len(wide) == long:
                break
        documents = [pieces[index] for index in left]
    chosen = _windows(documents, encode, length, samples, seed)
    if not chosen:
        raise HikuiError(f"The calibration text {source} gives no window of two tokens; give a longer one.")
    chunks, others = (tuple(torch.tensor([ids], dtype=torch.int64) for ids in each) for each in (chosen, wide))
    return Calibration(chunks, source, others)


def _cut(documents: list[str], length: int) -> list[str]:
    """Pieces of documents that have about twice so many tokens."""
    width = _CHARACTERS_PER_TOKEN * length
    return [document[at : at + width] for document in documents for at in range(0, len(document), width)]


def _windows(documents: list[str], encode: Encode, length: int, samples: int, seed: int) -> list[list[int]]:
    """At most `samples` windows of `length` tokens, or less at the end; see `draw`."""
    full: list[list[int]] = []
    short: list[list[int]] = []
    pieces = _cut(documents, length)
    order = np.random.default_rng(seed).permutation(len(pieces)).tolist()
    specials = encode("")
    for second, index in product((False, True), order):
        ids = encode(pieces[index].strip())
        ids = [*specials, *ids[length:]][:length] if second else ids[:length]
        if len(ids) == length:
            full.append(ids)
        elif len(ids) >= len(specials) + 2 or (len(ids) >= 2 and not second):
            short.append(ids)
        if len(full) == samples:
            break
    return (full + short)[:samples]


def random_tokens(config: ModelConfig, *, samples: int, tokens: int, seed: int, long: int = 0) -> Calibration:
    """Windows of tokens drawn evenly from the vocabulary: what is left where a model has no tokenizer.

    They excite a model otherwise than text does: the means of what SmolLM2's query, key and value products read have a
    cosine of .5 to .95 with those of text, those of its down projections of .1 to .6.
    """
    draws = np.random.default_rng(seed)
    chunks, others = (
        tuple(
            torch.from_numpy(
                draws.integers(0, config.vocabulary, (1, min(size, config.context_length)), dtype=np.int64)
            )
            for _ in range(count)
        )
        for size, count in ((tokens, samples), (LONG * tokens, long))
    )
    return Calibration(chunks, "random tokens", others)
