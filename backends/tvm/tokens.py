"""The bytes of each token, so that a board without a tokenizer can print text."""

import json
import struct
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from hikui.backends.tvm.index import TOKENS
from hikui.lowering.artefact import text

_SPACE = "▁"
_MAGIC = b"HKTK"


def _decoder_types(decoder: dict[str, Any] | None) -> set[str]:
    if decoder is None:
        return set()
    return {str(decoder.get("type"))}.union(*(_decoder_types(part) for part in decoder.get("decoders", [])))


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level tokenizers write bytes as: their own where printable, else those from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}


def token_bytes(folder: Path, vocabulary: int) -> list[bytes]:
    """What each token id prints as; special tokens and ids that the tokenizer lacks print as nothing.

    Args:
        folder: a tokenizer's files.
        vocabulary: how many ids the model has.
    """
    with TemporaryDirectory() as scratch:
        if not (folder / text.FILE).is_file():
            text.copy_tokenizer(folder, Path(scratch) / "tokenizer")
            folder = Path(scratch) / "tokenizer"
        content = (folder / text.FILE).read_text("utf-8")
    tokenizer = Tokenizer.from_str(content)
    types = _decoder_types(json.loads(content).get("decoder"))
    added = tokenizer.get_added_tokens_decoder()
    alphabet = _byte_alphabet()

    def of(token: int) -> bytes:
        if token in added:
            return b"" if added[token].special else str(added[token].content).encode()
        piece = tokenizer.id_to_token(token)
        if piece is None:
            return b""
        if "ByteLevel" in types and all(character in alphabet for character in piece):
            return bytes(alphabet[character] for character in piece)
        if "ByteFallback" in types and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return str(piece).replace(_SPACE, " ").encode()

    return [of(token) for token in range(vocabulary)]


def write_tokens(table: list[bytes], directory: Path) -> None:
    """Writes `model.tokens`: the bytes of each token id."""
    offsets = np.cumsum([0, *map(len, table)], dtype=np.uint32)
    header = _MAGIC + struct.pack("<I", len(table))
    (directory / TOKENS).write_bytes(header + offsets.astype("<u4").tobytes() + b"".join(table))
