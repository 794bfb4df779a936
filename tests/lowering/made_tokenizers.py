"""Tokenizers of several makes, as Hugging Face folders."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from hikui.models.synthetic import TINY_VOCABULARY, byte_tokenizer

TEXT = "once upon a time a bear and a bird had one den and at noon it rained"


def save(tokenizer: Tokenizer, folder: Path, config: dict[str, Any] | None = None, **settings: Any) -> Path:
    """A folder with tokenizer.json, tokenizer_config.json and, where given, config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    content = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def byte_level(post: str = "<s> $A") -> Tokenizer:
    """One token a byte; `post` is the template of its post-processor, empty for none."""
    tokenizer = byte_tokenizer(TINY_VOCABULARY)
    marks = [("<s>", 0), ("</s>", 1), ("<unk>", 2)]
    if post:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=post, special_tokens=[mark for mark in marks if mark[0] in post]
        )
    else:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def llama3(post: str = "<s> $A") -> Tokenizer:
    """As Llama 3's: byte-level behind a regular expression, BOS by a template in a sequence."""
    tokenizer = byte_level("")
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=post, special_tokens=[("<s>", 0)]),
        ]
    )
    return tokenizer


def unigram(post: str = "<s> $A") -> Tokenizer:
    """As SentencePiece's: pieces with ▁ for a space, by their probabilities."""
    pieces = ["<s>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz.", "▁a", "▁the", "on", "an", "▁b", "in"]
    tokenizer = Tokenizer(
        models.Unigram([(piece, -float(at)) for at, piece in enumerate(pieces)], unk_id=2, byte_fallback=False)
    )
    tokenizer.add_special_tokens(["<s>", "</s>", "<unk>"])
    tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.post_processor = processors.TemplateProcessing(single=post, special_tokens=[("<s>", 0), ("</s>", 1)])
    return tokenizer


def with_word_ends() -> Tokenizer:
    """As GPT-1's: a suffix `</w>` on the last piece of a word, and no other sign of a space."""
    letters = "abcdefghijklmnopqrstuvwxyz.,!:-"
    pieces = ["<unk>", *letters, *(f"{letter}</w>" for letter in letters)]
    merges = [(letter, "d</w>") for letter in "nr"]
    pieces += [a + b for a, b in merges]
    tokenizer = Tokenizer(
        models.BPE({p: at for at, p in enumerate(pieces)}, merges, unk_token="<unk>", end_of_word_suffix="</w>")
    )
    tokenizer.add_special_tokens(["<unk>"])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    return tokenizer


def word_pieces(cleanup: bool = False) -> Tokenizer:
    """As BERT's: `##` before what goes on within a word."""
    letters = "abcdefghijklmnopqrstuvwxyz.,!:-'"
    pieces = ["[UNK]", *letters, *(f"##{letter}" for letter in letters)]
    tokenizer = Tokenizer(models.WordPiece({p: at for at, p in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.add_special_tokens(["[UNK]"])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=cleanup)
    return tokenizer
