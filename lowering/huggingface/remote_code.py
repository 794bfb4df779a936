"""Whose code may run: a folder's own Python files only where the user has said so.

transformers runs the files that `auto_map` names where it has no class of its own, and asks on the terminal whether it
may. Here the answer is given beforehand, by an option.
"""

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from hikui.lowering.errors import HikuiError
from hikui.lowering.json_text import parse_json

CONFIG, TOKENIZER_CONFIG = "config.json", "tokenizer_config.json"


def refuse_model_code(folder: Path, *, trusted: bool) -> None:
    """Refuses a folder whose config or model class exists only in its own Python files, unless they are trusted.

    Raises:
        HikuiError: names the class and the option.
    """
    config = _read(folder / CONFIG)
    named = _auto_map(config)
    wanted = [key for key in ("AutoConfig", "AutoModelForCausalLM") if named.get(key)]
    if trusted or not wanted:
        return
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    own: dict[str, Container[Any]] = {
        "AutoConfig": CONFIG_MAPPING,
        "AutoModelForCausalLM": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    }
    foreign = next((key for key in wanted if config.get("model_type") not in own[key]), None)
    if foreign is not None:
        raise _refusal(folder, str(named[foreign]), CONFIG)


def refuse_tokenizer_code(folder: Path, *, trusted: bool) -> None:
    """Refuses a folder whose tokenizer class exists only in its own Python files, unless they are trusted.

    Raises:
        HikuiError: names the class and the option.
    """
    settings = _read(folder / TOKENIZER_CONFIG)
    named = _auto_map(settings).get("AutoTokenizer")
    if trusted or not named:
        return
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name

    wanted = str(settings.get("tokenizer_class") or "")
    names = (wanted, wanted.removesuffix("Fast"), f"{wanted}Fast")
    known = wanted and any(tokenizer_class_from_name(name) is not None for name in names)
    if not known and _read(folder / CONFIG).get("model_type") not in TOKENIZER_MAPPING_NAMES:
        parts = named if isinstance(named, list) else [named]
        raise _refusal(folder, next((str(part) for part in reversed(parts) if part), wanted), TOKENIZER_CONFIG)


def _refusal(folder: Path, name: str, file: str) -> HikuiError:
    return HikuiError(
        f"{folder / file} asks for '{name}', which is code that comes with the checkpoint and not with transformers, "
        "so it is not run; read that code, and give --trust-remote-code (trust_remote_code=True) if you trust it."
    )


def _auto_map(content: Mapping[str, Any]) -> Mapping[str, Any]:
    found = content.get("auto_map")
    if isinstance(found, list):  # the older form of a tokenizer
        return {"AutoTokenizer": found}
    return found if isinstance(found, dict) else {}


def _read(path: Path) -> dict[str, Any]:
    """A JSON object, or nothing: who reads the file for its content says what is wrong with it."""
    try:
        content = parse_json(path.read_text("utf-8-sig"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
