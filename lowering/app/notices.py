"""What a user should know of a model before its numbers are believed: said on stderr and in the report."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from hikui.lowering.artefact.text import TextCodec
from hikui.lowering.checkpoint.folder import read_object
from hikui.lowering.evaluation.protocols import Excerpt
from hikui.lowering.huggingface.config import refuse_outside
from hikui.lowering.ir.program import Program
from hikui.lowering.ir.steps import check_ids
from hikui.lowering.pipeline.calibration import LONG
from hikui.lowering.pipeline.contract import Calibration
from hikui.lowering.pipeline.recipe import CalibrationSettings
from hikui.lowering.progress import Announce
from hikui.models import calibration

_ENOUGH = 0.9
"""Of the tokens to learn from that were asked for."""

_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "repetition_penalty": (None, 1, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1, 1.0),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "bad_words_ids": (None, []),
    "sequence_bias": (None, {}, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "exponential_decay_length_penalty": (None, []),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "num_beams": (None, 1),
    "penalty_alpha": (None,),
    "guidance_scale": (None, 1, 1.0),
}
"""Settings of a generation config that change greedy text, with the values that do not."""


def model_notices(program: Program, model: object, folders: Iterable[Path]) -> list[str]:
    """Sentences on a model that was traced: its tokenizer, its config, and what of its generation config is not done.

    Args:
        program: as it was traced.
        model: what was traced: a module, or its folder or id.
        folders: those of the checkpoint's files.

    Raises:
        HikuiError: the config names tokens that the model does not have, or the tokenizer cannot be used or puts such
            tokens around a text.
    """
    config = program.config
    refuse_outside(() if config.bos_token_id is None else (config.bos_token_id,), "bos_token_id", config.vocabulary)
    refuse_outside(config.eos_token_ids, "eos_token_id", config.vocabulary)
    return [*program.cautions, *_tokenizer(program), *_generation(model, folders)]


def _tokenizer(program: Program) -> list[str]:
    if program.tokenizer is None:
        return [
            "The model comes without a tokenizer, so what is lowered from it takes and gives token ids only; give a "
            "folder with its tokenizer with --tokenizer to have text."
        ]
    codec, vocabulary = TextCodec(program.tokenizer), program.config.vocabulary
    check_ids([*codec.prefix, *codec.suffix], vocabulary)
    notices = []
    if beyond := [token for token in codec.ids() if token >= vocabulary]:
        notices.append(
            f"The tokenizer has {len(beyond)} token(s) from id {beyond[0]} on that the model, with a vocabulary of "
            f"{vocabulary}, does not have; a text that gives one of them is refused."
        )
    bos = program.config.bos_token_id
    if bos is not None and bos not in codec.prefix:
        put = f"puts {_ids(codec.prefix)} there" if codec.prefix else "puts no token there"
        notices.append(
            f"The config names {bos} as the token that begins a text, but the tokenizer {put}; as in transformers, the "
            "tokenizer counts."
        )
    if bos is None and codec.prefix:
        notices.append(
            f"The config names no token that begins a text, but the tokenizer puts {_ids(codec.prefix)} there; as in "
            "transformers, the tokenizer counts."
        )
    return notices


def _ids(tokens: Iterable[int]) -> str:
    return ", ".join(map(str, tokens))


def _generation(model: object, folders: Iterable[Path]) -> list[str]:
    found: dict[str, Any] = {}
    if isinstance(model, nn.Module):
        config = getattr(model, "generation_config", None)
        found = {} if config is None else dict(config.to_dict())
    for folder in sorted(set(folders)):
        path = folder / "generation_config.json"
        if path.is_file():
            found |= read_object(path)
    ignored = [
        f"{key} {found[key]!r}" for key, neutral in _NEUTRAL.items() if key in found and found[key] not in neutral
    ]
    if not ignored:
        return []
    return [
        f"The generation config sets {', '.join(ignored)}, which hikui does not do: texts are greedy or drawn from the "
        "model's own probabilities."
    ]


def text_notices(excerpts: Sequence[Excerpt]) -> list[str]:
    """A sentence where a tokenizer does not know a text that is measured."""
    unknown, lost = sum(excerpt.unknown for excerpt in excerpts), sum(excerpt.lost for excerpt in excerpts)
    if not (unknown or lost):
        return []
    tokens = sum(len(excerpt.ids) - excerpt.first for excerpt in excerpts)
    return [
        f"{unknown} of {tokens} tokens stand for characters that the tokenizer does not know, and {lost} characters "
        "give no token at all; such a text measures little of the model."
    ]


def calibration_notices(
    data: Calibration, settings: CalibrationSettings, context: int, *, own: bool = False
) -> list[str]:
    """A sentence where a text gave fewer windows, or shorter ones, than the recipe asks for.

    Args:
        data: what was read.
        settings: what was asked for.
        context: of the model.
        own: whether it is the text that comes with hikui, which is enough to measure on.
    """
    length = min(settings.tokens, context)
    measuring = (settings.samples, "what is measured on so little may do harm, so give a longer text.")
    learning = (settings.training, "what learns from so little learns less, so give a longer text.")
    notices = []
    for count, harm in (learning,) if own else (measuring, learning):
        chunks = data.chunks[:count]
        tokens, wanted = sum(chunk.shape[1] for chunk in chunks), count * length
        # Text to learn from may end in some shorter windows.
        if tokens < (wanted * _ENOUGH if harm is learning[1] else wanted):
            notices.append(
                f"The calibration text {data.source} is too short: it gives {len(chunks)} window(s) with {tokens} "
                f"tokens in all, and the recipe asks for {count} of {length}, {wanted} tokens; {harm}"
            )
            break
    if len(data.long) < settings.long:
        notices.append(
            f"The calibration text {data.source} has too few long documents: it gives {len(data.long)} window(s) of "
            f"{min(LONG * settings.tokens, context)} tokens, and the recipe asks for {settings.long}; give longer "
            "documents."
        )
    return notices


def tell_of_text(
    data: Calibration,
    path: Path | None,
    settings: CalibrationSettings,
    program: Program,
    announce: Announce,
    warn: Announce,
) -> None:
    """Says what text a model is measured on, where it was not asked for or is too short.

    Args:
        data: what was read.
        path: of the text that was given, or None.
        settings: what was asked for.
        program: the model's.
        announce: told what is no cause for worry.
        warn: told what is.
    """
    if path is None:
        (announce if program.tokenizer is not None else warn)(standing_in(data))
    for notice in calibration_notices(data, settings, program.config.context_length, own=path is None):
        warn(notice)


def standing_in(data: Calibration) -> str:
    """What a model is measured on where no calibration text was given, in a sentence."""
    tokens = sum(chunk.shape[1] for chunk in data.chunks)
    if data.source == calibration.path().name:
        return (
            f"No calibration text was given: the model is measured on {tokens} tokens of the English prose and code "
            "that come with hikui. Text like what it will read is better; give some with --calibration FILE."
        )
    return (
        f"The model has no tokenizer, so it is measured on {tokens} random tokens, which excite it otherwise than text "
        "does; give a folder with its tokenizer with --tokenizer."
    )
