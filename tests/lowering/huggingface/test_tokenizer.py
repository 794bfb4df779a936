"""Texts in tokens, as transformers has them, with tokenizers of several makes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from hikui.lowering.app.assemble import reference_numbers
from hikui.lowering.app.lower import read_calibration
from hikui.lowering.app.request import Request
from hikui.lowering.artefact.text import TextCodec, copy_tokenizer, read_text
from hikui.lowering.errors import HikuiError, UsageError
from hikui.lowering.evaluation import protocols
from hikui.lowering.huggingface.tokenizer import ModelTokenizer
from hikui.lowering.pipeline.recipe import CalibrationSettings
from tests.lowering import made_tokenizers
from tests.lowering.made_tokenizers import TEXT, byte_level, llama3, save, unigram, with_word_ends, word_pieces

MAKES: dict[str, Callable[[], Tokenizer]] = {
    "byte level with BOS": byte_level,
    "byte level without": lambda: byte_level(""),
    "byte level with BOS and EOS": lambda: byte_level("<s> $A </s>"),
    "two before a text": lambda: byte_level("<s> <unk> $A"),
    "as Llama 3": llama3,
    "unigram": unigram,
    "unigram with BOS and EOS": lambda: unigram("<s> $A </s>"),
    "with word ends": with_word_ends,
    "word pieces": word_pieces,
}
CONFIGS = {
    "none": None,
    "llama": {"model_type": "llama", "bos_token_id": 0, "eos_token_id": 1},
    "qwen2": {"model_type": "qwen2", "bos_token_id": 2, "eos_token_id": 1},
    "gpt2": {"model_type": "gpt2", "bos_token_id": None},
}
TEXTS = (TEXT, "a", "", " spaces  around ", "A.\n\tb", "text <s> inside <s>", "Zoë 日本")


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("make", MAKES)
def test_prompts_are_encoded_as_transformers_does(make: str, config: str, tmp_path: Path) -> None:
    folder = save(MAKES[make](), tmp_path / "t", CONFIGS[config], bos_token="<s>")
    theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    codec = TextCodec(ModelTokenizer(folder))
    copy_tokenizer(ModelTokenizer(folder), tmp_path / "copy")
    copied = TextCodec(tmp_path / "copy")
    for text in TEXTS:
        wanted = theirs(text)["input_ids"]
        assert codec.encode_prompt(text) == wanted, text
        assert copied.encode_prompt(text) == wanted, text
        assert codec.encode(text) == theirs(text, add_special_tokens=False)["input_ids"], text
        assert [*codec.prefix, *codec.encode(text), *codec.suffix] == wanted, text


@pytest.mark.parametrize("settings", [{"add_bos_token": True}, {"add_eos_token": True}, {"add_bos_token": False}, {}])
@pytest.mark.parametrize("kind", ["LlamaTokenizer", "GPT2Tokenizer", "PreTrainedTokenizerFast", "Qwen2Tokenizer"])
def test_classes_that_make_their_tokenizer_anew_are_followed(
    kind: str, settings: dict[str, bool], tmp_path: Path
) -> None:
    """transformers' own result counts, also where tokenizer.json says something else."""
    tokenizer = byte_level("" if kind != "LlamaTokenizer" else "<s> $A")
    marks = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    folder = save(tokenizer, tmp_path, CONFIGS["llama"], tokenizer_class=kind, **marks, **settings)
    theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    codec = TextCodec(ModelTokenizer(folder))
    for text in (TEXT, "a  b\n", "def f(x):"):
        assert codec.encode_prompt(text) == theirs(text)["input_ids"], text


def test_a_chat_template_that_holds_the_bos_gets_no_second_one(tmp_path: Path) -> None:
    template = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
    folder = save(byte_level(), tmp_path, CONFIGS["llama"], bos_token="<s>", chat_template=template)
    theirs: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    chat = [{"role": "user", "content": "Hi"}]
    wanted = theirs.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"]
    rendered = theirs.apply_chat_template(chat, tokenize=False)
    assert rendered.startswith("<s>") and wanted[:2] != [0, 0]
    codec = TextCodec(ModelTokenizer(folder))
    assert codec.encode_prompt(rendered) == wanted
    excerpt = protocols.document_excerpts([rendered], codec, context=64)[0]
    assert list(excerpt.ids) == wanted and excerpt.first == 1


def test_a_tokenizer_that_cuts_and_pads_does_neither_to_texts(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=100)
    folder = save(tokenizer, tmp_path, CONFIGS["llama"])
    theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    for codec in (TextCodec(ModelTokenizer(folder)), TextCodec(folder)):
        assert codec.encode_prompt(TEXT) == theirs(TEXT)["input_ids"]
        assert len(codec.encode(TEXT)) == len(TEXT)


def test_everything_that_reads_text_follows_the_tokenizer_and_not_the_config(
    tiny: Path, stories: Path, tmp_path: Path
) -> None:
    """A config that names a BOS which the tokenizer does not add, and one that names none of a tokenizer that does."""
    for post, named in (("", 0), ("<s> $A", None), ("<s> $A </s>", 2)):
        folder = shutil.copytree(tiny, tmp_path / f"m{named}")
        save(byte_level(post), folder, bos_token="<s>", eos_token="</s>")
        for name in ("config.json", "generation_config.json"):
            content = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps(content | {"bos_token_id": named}))
        theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        program = Request(folder).traced()
        assert program.tokenizer is not None
        codec = TextCodec(program.tokenizer)
        begins = [0] if post else []
        reference = reference_numbers(program).tokens.tolist()
        sentence = "Once upon a time there was a little house at the edge of a wood, and in it lived an old man."
        assert reference == theirs(sentence)["input_ids"][: len(reference)]
        data = read_calibration(program, stories, CalibrationSettings(samples=4, tokens=16))
        assert all(chunk[0, : len(begins)].tolist() == begins for chunk in data.chunks)
        assert all(chunk[0, len(begins)] != 0 for chunk in data.chunks)
        documents = protocols.document_excerpts(["once upon a time"], codec, context=64)
        assert list(documents[0].ids) == [*begins, *codec.encode("once upon a time")]
        assert documents[0].characters == 16 - (0 if begins else 1)
        protocol, windows = protocols.read(read_text(stories), codec, context=64, window=32)
        assert protocol.fields()["prefix"] == begins
        assert all(list(window.ids[: len(begins)]) == begins for window in windows)


def test_unknown_characters_are_counted_where_they_stand(tmp_path: Path) -> None:
    codec = TextCodec(save(word_pieces(), tmp_path / "w"))
    text = "ab cd 日本 日"
    excerpt = protocols.document_excerpts([text], codec, context=64)[0]
    ids = codec.encode(text)
    assert codec.unknown is not None
    assert excerpt.unknown == ids.count(codec.unknown) > 0
    assert excerpt.characters == len(text) - 1  # nothing predicts the first token, one character
    dropping = byte_level("")
    content = json.loads(dropping.to_str())
    content["model"]["unk_token"] = None
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "tokenizer.json").write_text(json.dumps(content))
    codec = TextCodec(tmp_path / "d")
    excerpt = protocols.document_excerpts(["abc 日本語 de"], codec, context=64)[0]
    assert codec.unknown is None
    kept = len(codec.encode("abc 日本語 de"))
    assert len(excerpt.ids) == kept
    assert (excerpt.characters, excerpt.lost) == (len("bc  de"), 3)
    whole = protocols.window_excerpts("abc 日本語 de<|endoftext|>fg é", codec, window=40, stride=40)
    assert sum(excerpt.characters for excerpt in whole) == len("bc  defg ")
    assert sum(excerpt.lost for excerpt in whole) == 4


def test_an_unknown_text_has_bits_over_its_characters(tmp_path: Path) -> None:
    """The figure is of the characters that were scored, not of the empty text that unknown tokens decode to."""
    codec = TextCodec(save(unigram("$A"), tmp_path))
    text = "日本語で書かれた文"
    excerpt = protocols.document_excerpts([f"a {text}"], codec, context=64)[0]
    assert excerpt.characters == len(f"a {text}") - len("a")
    assert excerpt.unknown >= 1


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbfOnce upon a time")
    assert read_text(path) == "Once upon a time"
    tokenizer = save(byte_level(), tmp_path / "t") / "tokenizer.json"
    tokenizer.write_bytes(b"\xef\xbb\xbf" + tokenizer.read_bytes())
    assert TextCodec(tokenizer.parent).encode_prompt("a") == [0, *TextCodec(tokenizer.parent).encode("a")]


def test_a_prompt_that_is_no_text_is_refused(tiny: Path) -> None:
    codec = TextCodec(tiny)
    for call in (codec.encode, codec.encode_prompt, codec.pieces):
        with pytest.raises(UsageError, match=r"'ab\\udcff' is not UTF-8 at character 3"):
            call("ab\udcff")


def test_a_vocabulary_with_merges_is_converted(tmp_path: Path, tiny: Path) -> None:
    """As OPT's folders: no tokenizer.json."""
    folder = shutil.copytree(tiny, tmp_path / "old")
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    marks = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", **marks}))
    theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    program = Request(folder).traced()
    assert program.tokenizer is not None
    assert TextCodec(program.tokenizer).encode_prompt(TEXT) == theirs(TEXT)["input_ids"]
    assert np.isfinite(reference_numbers(program).logits).all()


def test_what_cannot_be_converted_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0b\x0c")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    monkeypatch.setattr("hikui.lowering.huggingface.tokenizer._installed", lambda name: name != "sentencepiece")
    with pytest.raises(HikuiError, match=r"SentencePiece model \(tokenizer.model\).* package sentencepiece .*--tok"):
        ModelTokenizer(tmp_path).content()
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(HikuiError, match=r"tokenizer\.json is not a tokenizer"):
        ModelTokenizer(tmp_path).content()
    with pytest.raises(HikuiError, match=r"has no tokenizer\.json"):
        ModelTokenizer(tmp_path / "none").content()


def test_a_tokenizer_that_works_in_python_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import PreTrainedTokenizerFast

    folder = save(made_tokenizers.byte_level(), tmp_path, CONFIGS["llama"])
    inner = PreTrainedTokenizerFast.__call__
    monkeypatch.setattr(
        PreTrainedTokenizerFast, "__call__", lambda self, text, **options: inner(self, text.upper(), **options)
    )
    with pytest.raises(HikuiError, match="changes texts or tokens in Python"):
        ModelTokenizer(folder).content()
