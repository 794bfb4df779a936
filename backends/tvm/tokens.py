"""The bytes of each token, so that a board without a tokenizer can print text."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from hikui.backends.tvm.index import TOKENS
from hikui.lowering.huggingface.tokenizer import ModelTokenizer
from hikui.lowering.json_text import parse_json

_SPACE = "▁"
_MAGIC = b"HKTK"
_SAMPLES = (
    "Once upon a time there was a little house, and in it lived an old man.",
    "He said: \"It's cold!\" (and it was -5 \u00b0C) \u2013 don't go, isn't it so?",
    "def area(r):\n\treturn 3.14 * r ** 2  # two spaces\n\n",
    "Zo\u00eb na\u00efve \u20ac12.50, \u65e5\u672c\u8a9e \u043a\u0438\u043d\u043e \U0001f642",
)
"""Texts by which a table is held against the tokenizer's own decoder."""


def _decoders(decoder: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    """The decoders of a tokenizer.json by their type, those inside a sequence too."""
    if decoder is None:
        return {}
    found = {str(decoder.get("type")): decoder}
    for part in decoder.get("decoders", []):
        found |= _decoders(part)
    return found


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level tokenizers write bytes as: their own where printable, else those from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}


def token_bytes(tokenizer: ModelTokenizer, vocabulary: int) -> list[bytes] | None:
    """What each token id prints as; special tokens and ids that the tokenizer lacks print as nothing.

    Args:
        tokenizer: the model's.
        vocabulary: how many ids the model has.

    Returns:
        None where the texts of single tokens do not join to what the tokenizer decodes, by a few samples; spaces at
        both ends do not count, because what a board prints goes on from a prompt.
    """
    content = tokenizer.content()
    decoder = Tokenizer.from_str(content)
    table = _table(decoder, _decoders(parse_json(content).get("decoder")), vocabulary)
    for sample in _SAMPLES:
        ids = [token for token in decoder.encode(sample, add_special_tokens=False).ids if token < vocabulary]
        joined = b"".join(table[token] for token in ids).decode(errors="replace")
        if joined.strip(" ") != decoder.decode(ids, skip_special_tokens=True).strip(" "):
            return None
    return table


def _table(tokenizer: Tokenizer, decoders: dict[str, dict[str, Any]], vocabulary: int) -> list[bytes]:
    added = tokenizer.get_added_tokens_decoder()
    alphabet = _byte_alphabet()
    suffix = decoders.get("BPEDecoder", {}).get("suffix")
    inner = decoders.get("WordPiece", {}).get("prefix")

    def of(token: int) -> bytes:
        if token in added:
            return b"" if added[token].special else str(added[token].content).encode()
        piece = tokenizer.id_to_token(token)
        if piece is None:
            return b""
        if "ByteLevel" in decoders and all(character in alphabet for character in piece):
            return bytes(alphabet[character] for character in piece)
        if "ByteFallback" in decoders and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        text = str(piece)
        if suffix:
            text = text.replace(suffix, " ")
        if inner:
            text = text.removeprefix(inner) if text.startswith(inner) else f" {text}"
        return text.replace(_SPACE, " ").encode()

    return [of(token) for token in range(vocabulary)]


def write_tokens(table: list[bytes], directory: Path) -> None:
    """Writes `model.tokens`: the bytes of each token id."""
    offsets = np.cumsum([0, *map(len, table)], dtype=np.uint32)
    header = _MAGIC + struct.pack("<I", len(table))
    (directory / TOKENS).write_bytes(header + offsets.astype("<u4").tobytes() + b"".join(table))
