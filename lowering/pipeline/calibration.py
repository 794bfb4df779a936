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

_CHARACTERS_PER_TOKEN = 8


def draw(
    documents: list[str], encode: Encode, config: ModelConfig, *, samples: int, tokens: int, seed: int, source: str
) -> Calibration:
    """Draws windows of text to calibrate on.

    Documents are cut into pieces of about twice a window, which are visited in an order drawn with `seed`; each gives
    its first tokens, special ones among them. Where those are too few, the tokens behind them give windows too,
    and then come short ones, from short documents; text that is too little gives fewer windows.

    Args:
        documents: the text.
        encode: the model's tokenizer.
        config: bounds the window by the context length.
        samples: windows to draw.
        tokens: tokens in a window.
        seed: of the order.
        source: what the manifest says of where the text came from.

    Raises:
        HikuiError: no document has two tokens.
    """
    length = min(tokens, config.context_length)
    full: list[list[int]] = []
    short: list[list[int]] = []
    width = _CHARACTERS_PER_TOKEN * length
    pieces = [document[at : at + width] for document in documents for at in range(0, len(document), width)]
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
    chosen = (full + short)[:samples]
    if not chosen:
        raise HikuiError(f"The calibration text {source} gives no window of two tokens; give a longer one.")
    return Calibration(tuple(torch.tensor([ids], dtype=torch.int64) for ids in chosen), source)


def random_tokens(config: ModelConfig, *, samples: int, tokens: int, seed: int) -> Calibration:
    """Windows of tokens drawn evenly from the vocabulary: what is left where a model has no tokenizer.

    They excite a model otherwise than text does: the means of what SmolLM2's query, key and value products read have a
    cosine of .5 to .95 with those of text, those of its down projections of .1 to .6.
    """
    draws = np.random.default_rng(seed)
    length = min(tokens, config.context_length)
    chunks = (draws.integers(0, config.vocabulary, (1, length), dtype=np.int64) for _ in range(samples))
    return Calibration(tuple(map(torch.from_numpy, chunks)), "random tokens")
