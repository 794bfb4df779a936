"""What every runner asks of the tokens of a step; needs no torch."""

import numpy as np
import numpy.typing as npt

from hikui.lowering.errors import HikuiError


def check_length(tokens: int, past: int, context: int) -> None:
    """Raises HikuiError where the cache cannot hold `tokens` more."""
    if past + tokens > context:
        raise HikuiError(
            f"{past + tokens} tokens do not fit the cache of {context}; "
            "shorten the prompt or lower with a larger --context."
        )


def check_ids(tokens: npt.ArrayLike, vocabulary: int) -> None:
    """Raises HikuiError where a token is none of the model's, whose embedding has `vocabulary` rows."""
    ids = np.asarray(tokens)
    outside = ids[(ids < 0) | (ids >= vocabulary)]
    if outside.size:
        raise HikuiError(
            f"Token {int(outside.flat[0])} is outside the model's vocabulary of {vocabulary}; give ids below that, "
            "or the tokenizer that the model was trained with."
        )
