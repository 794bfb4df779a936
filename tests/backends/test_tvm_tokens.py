"""The texts of tokens on a board without a tokenizer, against the tokenizers library."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.decoders import Decoder

from hikui.backends.tvm.index import TOKENS
from hikui.backends.tvm.tokens import token_bytes, write_tokens
from hikui.lowering.huggingface.tokenizer import ModelTokenizer
from tests.lowering import made_tokenizers

TEXT = "Once upon a time, naïve 猫 said: “it's 3°C!”\n\ttabs, 🙂 and\x7f odd bytes."


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    return tokenizer


def byte_fallback() -> Tokenizer:
    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdeinopst", "▁a", "on"]
    tokenizer = Tokenizer(
        models.BPE({piece: at for at, piece in enumerate(pieces)}, [("▁", "a"), ("o", "n")], byte_fallback=True)
    )
    tokenizer.add_special_tokens(["<unk>", "<s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_the_texts_join_to_what_the_tokenizer_decodes(make: object, tmp_path: Path) -> None:
    assert callable(make)
    tokenizer = make()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    size = tokenizer.get_vocab_size()
    table = token_bytes(ModelTokenizer(tmp_path), size + 3)
    assert table is not None
    ids = tokenizer.encode(TEXT).ids
    assert b"".join(table[token] for token in ids).decode() == TEXT == tokenizer.decode(ids)
    assert table[tokenizer.token_to_id("<s>")] == b""
    assert table[size:] == [b""] * 3


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (made_tokenizers.with_word_ends, "once upon a time, and so on"),
        (made_tokenizers.word_pieces, "once upon a time"),
        (made_tokenizers.unigram, "once upon a time"),
        (made_tokenizers.llama3, "Once  upon\na time"),
    ],
)
def test_signs_of_words_are_printed_as_spaces(make: object, text: str, tmp_path: Path) -> None:
    assert callable(make)
    folder = made_tokenizers.save(make(), tmp_path)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    table = token_bytes(ModelTokenizer(folder), tokenizer.get_vocab_size())
    assert table is not None
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    joined = b"".join(table[token] for token in ids).decode()
    assert "</w>" not in joined and "##" not in joined
    assert joined.strip() == tokenizer.decode(ids).strip() == text


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.CTC(), decoders.Replace("e", "x"), decoders.Strip("o", 1, 0),
        decoders.Sequence([decoders.Fuse(), decoders.Replace("on", "off")]), decoders.WordPiece(cleanup=True),
    ],
)  # fmt: skip
def test_a_decoder_that_a_table_cannot_say_gives_none(decoder: Decoder, tmp_path: Path) -> None:
    tokenizer = made_tokenizers.with_word_ends()
    tokenizer.decoder = decoder
    assert token_bytes(ModelTokenizer(made_tokenizers.save(tokenizer, tmp_path)), 100) is None


def test_the_file_holds_the_table(tmp_path: Path) -> None:
    table = [b"", b"abc", b"\xff", b"d" * 300]
    write_tokens(table, tmp_path)
    data = (tmp_path / TOKENS).read_bytes()
    assert data[:4] == b"HKTK"
    count = int(np.frombuffer(data, "<u4", 1, 4)[0])
    offsets = np.frombuffer(data, "<u4", count + 1, 8)
    content = data[8 + 4 * (count + 1) :]
    assert [content[a:b] for a, b in pairwise(offsets)] == table
