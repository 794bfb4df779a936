"""Artefacts whose files contradict each other, and output that gets lost: a sentence each, from both runners.

The fixtures are the classes of faults that loaders of other projects had: products of dimensions that wrap, sizes
beyond the file, offsets that overlap, what is said twice, numbers with a sign, strings without an end.
"""

import os
import re
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hikui.backends.tvm import TvmRunner
from hikui.backends.tvm.index import INDEX, PARAMETERS, TOKENS, read_index
from hikui.backends.tvm.native.board import BoardRunner
from hikui.lowering.errors import HikuiError
from tests.backends import every_op
from tests.backends.test_tvm_board import HOST, hikui_run, sentence


def _first_weight(text: str) -> str:
    return next(line for line in text.splitlines() if line.startswith("weight float32"))


def _replaced(old: str, new: str) -> Callable[[str], str]:
    def edit(text: str) -> str:
        assert re.search(old, text, re.M), old
        return re.sub(old, new, text, count=1, flags=re.M)

    return edit


def _weight(change: Callable[[list[str]], list[str]]) -> Callable[[str], str]:
    def edit(text: str) -> str:
        line = _first_weight(text)
        return text.replace(line, " ".join(change(line.split(" "))), 1)

    return edit


HOSTILE: dict[str, Callable[[str], str]] = {
    "a vocabulary of nothing": _replaced(r"^vocabulary \d+", "vocabulary 0"),
    "a vocabulary that wraps": _replaced(r"^vocabulary \d+", "vocabulary 18446744073709551615"),
    "a negative context": _replaced(r"^context \d+", "context -32"),
    "a context beyond 32 bits": _replaced(r"^context \d+", "context 4294967296"),
    "a context said twice": _replaced(r"^context \d+", r"\g<0>\n\g<0>"),
    "a vocabulary said twice": _replaced(r"^vocabulary (\d+)", r"\g<0>\nvocabulary 4096"),
    "a target said twice": _replaced(r"^target .*", r"\g<0>\n\g<0>"),
    "no target": _replaced(r"^target .*\n", ""),
    "no parameters": _replaced(r"^parameters .*\n", ""),
    "parameters that wrap": _replaced(r"^parameters \d+", "parameters 99999999999999999999"),
    "a number with a plus": _replaced(r"^context (\d+)", r"context +\1"),
    "a number with an underscore": _replaced(r"^context \d+", "context 3_2"),
    "a number with a zero ahead": _replaced(r"^context (\d+)", r"context 0\1"),
    "a word too many": _replaced(r"^context (\d+)", r"context \1 \1"),
    "an end of a text outside the vocabulary": _replaced(r"^eos \d+", "eos 61"),
    "a negative end of a text": _replaced(r"^eos \d+", "eos -1"),
    "an unknown line": _replaced(r"^eos \d+", "secret 1"),
    "an empty line": _replaced(r"^eos (\d+)", r"eos \1\n"),
    "a byte that is no text": _replaced(r"^eos (\d+)", "eos \\1\0"),
    "a carriage return": _replaced(r"^eos (\d+)", "eos \\1\r"),
    "a feature without an end": _replaced(r"^feature \w+", "feature " + "x" * 5000),
    "a cache of no heads": _replaced(r"^cache \d+", "cache 0"),
    "a cache whose size wraps": _replaced(r"^cache \d+ \d+", "cache 2147483647 2147483647"),
    "a cache of an unknown format": _replaced(r"^cache (\d+) (\d+).*", r"cache \1 \2 int1"),
    "half a byte in a cache": _replaced(r"^cache (\d+) \d+.*", r"cache \1 7 int4"),
    "dimensions whose product wraps": _weight(
        lambda w: [*w[:3], "0", "4", *["4294967296"] * 2, "4294967296", "1", w[-1]]
    ),
    "dimensions whose product wraps to its bytes": _weight(
        lambda w: [*w[:3], "16", "3", "4611686018427387904", "2", "2", w[-1]]
    ),
    "no elements of wrapping strides": _weight(
        lambda w: [*w[:3], "0", "3", "0", "1099511627776", "1099511627776", w[-1]]
    ),
    "a negative dimension": _weight(lambda w: [*w[:5], "-1", *w[6:]]),
    "more dimensions than words": _weight(lambda w: [*w[:4], "8", *w[5:]]),
    "fewer dimensions than words": _weight(lambda w: [*w[:4], "0", *w[5:]]),
    "a rank beyond any": _weight(lambda w: [*w[:4], "9", *["1"] * 9, w[-1]]),
    "other bytes than the shape's": _weight(lambda w: [*w[:3], str(int(w[3]) - 4), *w[4:]]),
    "an unknown type": _weight(lambda w: [w[0], "float8", *w[2:]]),
    "an offset that is not aligned": _weight(lambda w: [*w[:2], "4", *w[3:]]),
    "an offset that wraps": _weight(lambda w: [*w[:2], "18446744073709551552", *w[3:]]),
    "an offset beyond the file": _weight(lambda w: [*w[:2], str(1 << 30), *w[3:]]),
    "two tensors in one place": lambda text: text.replace(
        _first_weight(text), _first_weight(text) + "\n" + _first_weight(text), 1
    ),
    "no end": _replaced(r"^end\n", ""),
    "an end without its newline": _replaced(r"^end\n", "end"),
    "more after the end": _replaced(r"^end\n", "end\neos 1\n"),
}


@pytest.mark.parametrize("how", HOSTILE)
def test_an_index_that_contradicts_itself_is_refused(copied: Path, how: str) -> None:
    path = copied / INDEX
    whole = path.read_text()
    edited = HOSTILE[how](whole)
    assert edited != whole
    path.write_bytes(edited.encode())
    assert INDEX in sentence(hikui_run(copied, "--tokens", 1))
    with pytest.raises(HikuiError, match=INDEX):
        TvmRunner(copied)


def test_an_index_larger_than_any_is_refused(copied: Path) -> None:
    with (copied / INDEX).open("r+b") as file:
        file.truncate(1 << 40)
    assert "which no index has" in sentence(hikui_run(copied, "--tokens", 1))
    with pytest.raises(HikuiError, match="which no index has"):
        TvmRunner(copied)


@pytest.mark.parametrize("vocabulary", [60, 62, 4096, 1_000_000])
def test_a_vocabulary_that_the_program_contradicts_is_refused(copied: Path, tmp_path: Path, vocabulary: int) -> None:
    """The token table is taken away, so that nothing but the program's own output contradicts the index."""
    (copied / TOKENS).unlink(missing_ok=True)
    path = copied / INDEX
    path.write_text(re.sub(r"^vocabulary \d+", f"vocabulary {vocabulary}", path.read_text(), flags=re.M))
    dump = tmp_path / "logits"
    for token in (1, vocabulary - 1):
        said = sentence(hikui_run(copied, "--tokens", token, "--dump-logits", dump, "--json"))
        # An id that the embedding has no row for is refused before there is any output.
        beyond = f"id {token} is none of the"
        assert f"model.index says a vocabulary of {vocabulary}" in said or (token > 1 and beyond in said)
        assert dump.stat().st_size == 0
    for runner in (TvmRunner(copied), BoardRunner(copied, HOST)):
        with pytest.raises(HikuiError, match=f"says a vocabulary of {vocabulary}"):
            runner.forward(np.array([1, 2]), 0)
        runner.close()


@pytest.mark.parametrize("cache", ["cache 1 64", "cache 4 4096", "cache 1 2147483646"])
def test_a_cache_that_the_program_contradicts_is_refused(copied: Path, cache: str) -> None:
    path = copied / INDEX
    path.write_text(re.sub(r"^cache \d+ \d+", cache, path.read_text(), flags=re.M))
    sentence(hikui_run(copied, "--tokens", 1))
    with pytest.raises(HikuiError):
        TvmRunner(copied).forward(np.array([1]), 0)


def test_a_context_that_the_program_contradicts_is_refused(copied: Path) -> None:
    path = copied / INDEX
    path.write_text(re.sub(r"^context \d+", "context 4096", path.read_text(), flags=re.M))
    sentence(hikui_run(copied, "--tokens", ",".join(["1"] * 100)))
    with pytest.raises(HikuiError):
        TvmRunner(copied).forward(np.arange(50), 0)


def test_an_index_of_another_architecture_is_refused(copied: Path) -> None:
    path = copied / INDEX
    path.write_text(path.read_text().replace("x86_64-linux-gnu", "aarch64-linux-gnu", 1))
    assert "of a model for aarch64-linux-gnu, but this runner is for x86_64-linux-gnu" in sentence(
        hikui_run(copied, "--tokens", 1)
    )


def _table(offsets: list[int], texts: bytes, count: int | None = None) -> bytes:
    return b"HKTK" + struct.pack(f"<I{len(offsets)}I", len(offsets) - 1 if count is None else count, *offsets) + texts


@pytest.mark.parametrize(
    "table",
    [
        b"",
        b"HKTK",
        b"KTKH" + bytes(100),
        _table([0] * 61, b""),
        _table([0] * 63, b""),
        _table([0] * 62, b"", count=2**32 - 1),
        _table([0] * 62, b"", count=2**30),
        _table([0, *[2**32 - 1] * 60, 3], b"abc"),
        _table([*range(60, -1, -1), 3], b"abc"),
        _table([1, *[3] * 61], b"abc"),
        _table([0] * 61 + [4], b"abc"),
    ],
    ids=["nothing", "no count", "no magic", "one short", "one more", "a count of all", "a count that wraps",
         "past the end", "backwards", "not from 0", "cut"],
)  # fmt: skip
def test_a_token_table_that_contradicts_itself_is_refused(copied: Path, table: bytes) -> None:
    (copied / TOKENS).write_bytes(table)
    assert TOKENS in sentence(hikui_run(copied, "--tokens", 1))


@pytest.mark.parametrize(
    "arguments",
    [
        ("--tokens", "00000000011"),
        ("--tokens", "99999999999999999999"),
        ("--tokens", "2147483648"),
        ("--tokens", "1.5"),
        ("--tokens", "-1"),
        ("--tokens", "nan"),
        ("--tokens", "1", "--threads", "100000"),
        ("--tokens", "1", "--threads", "9223372036854775808"),
        ("--tokens", "1", "--threads", " 1"),
        ("--tokens", "1", "--threads", "+1"),
        ("--tokens", "1", "--threads", "1.0"),
        ("--tokens", "1", "--max-new-tokens", "1e3"),
        ("--tokens", "1", "--max-new-tokens", "9999999999"),
        ("--tokens", "1", "--chunk", "-1"),
        ("--tokens", "1", "--chunk", "0x10"),
        ("--tokens", "1", "--chunk", ""),
        ("--tokens", "1", "--chunk"),
    ],
)
def test_a_number_that_is_none_is_refused_whole(tvm_host: Path, arguments: tuple[str, ...]) -> None:
    sentence(hikui_run(tvm_host, *arguments), 2)


def test_the_threads_of_the_environment_are_bounded(tvm_host: Path) -> None:
    command = [*HOST.command(tvm_host)[:2], "--tokens", "1"]
    for wanted in ("100000", "many", ""):
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, "TVM_NUM_THREADS": wanted}
        )
        assert "TVM_NUM_THREADS takes a whole number" in sentence(done, 2)


def _shell(directory: Path, redirection: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The runner with its standard streams as the shell makes them."""
    command = [*HOST.command(directory), *arguments]
    return subprocess.run(
        ["bash", "-c", f'"$@" {redirection}', "bash", *command], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("form", [(), ("--json",)])
@pytest.mark.parametrize(
    ("redirection", "words"),
    [(">/dev/full", "cannot be written: No space left"), (">&-", "the standard output is closed")],
)
def test_lost_output_is_a_failure(tvm_host: Path, form: tuple[str, ...], redirection: str, words: str) -> None:
    assert words in sentence(_shell(tvm_host, redirection, "--tokens", "1,2", *form))


def test_lost_help_is_a_failure(tvm_host: Path) -> None:
    assert "cannot be written" in sentence(_shell(tvm_host, ">/dev/full", "--help"))


def test_a_reader_that_has_gone_is_a_failure(tvm_host: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [*HOST.command(tvm_host), "--tokens", "1", "--json"]
    with os.fdopen(writing, "wb") as closed:
        result = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True, check=False)
    assert (result.returncode, result.stderr) == (1, "hikui-run: the output cannot be written: Broken pipe\n")


def test_closed_streams_do_not_become_the_models_files(tvm_host: Path, tmp_path: Path) -> None:
    dump = tmp_path / "logits"
    done = _shell(tvm_host, "<&- 2>&-", "--tokens", "1", "--max-new-tokens", "1", "--dump-logits", str(dump))
    assert done.returncode == 0
    assert dump.stat().st_size == 4 * every_op.VOCABULARY


@pytest.mark.parametrize(
    "request_bytes",
    [
        struct.pack("<q", 0),
        struct.pack("<qq", 0, 1)[:15],
        struct.pack("<qq", 0, 2) + struct.pack("<q", 1),
        struct.pack("<qq", -1, 1) + struct.pack("<q", 1),
        struct.pack("<qq", 0, 0),
        struct.pack("<qq", 0, -(2**63)),
        struct.pack("<qq", 2**63 - 1, 2**63 - 1),
        struct.pack("<qqq", 0, 1, 61),
        struct.pack("<qqq", 0, 1, -(2**63)),
        struct.pack("<qqq", 32, 1, 1),
    ],
)
def test_a_request_that_is_none_is_a_failure(tvm_host: Path, request_bytes: bytes) -> None:
    done = subprocess.run([*HOST.command(tvm_host), "--serve"], input=request_bytes, capture_output=True, check=False)
    assert done.returncode == 1
    assert done.stdout == b""
    assert len(done.stderr.splitlines()) == 1


def test_an_answer_that_is_lost_is_a_failure(tvm_host: Path) -> None:
    command = [*HOST.command(tvm_host), "--serve"]
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            command, input=struct.pack("<qqq", 0, 1, 1), stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert (done.returncode, b"cannot be written" in done.stderr) == (1, True)


def test_a_runner_without_its_mode_is_told_so(copied: Path) -> None:
    program = copied / "bin" / "x86_64-linux-gnu" / "hikui-run"
    program.chmod(0o644)
    with pytest.raises(HikuiError, match=r"hikui-run is not executable; .*chmod \+x"):
        HOST.command(copied)


def test_names_of_weights_cannot_break_their_line() -> None:
    from hikui.backends.tvm.index import Weight

    line = Weight("a b\nc\u2028d\0\x85e", "int8", 0, 2, (2,)).line()
    assert line == "weight int8 0 2 1 2 a_b_c_d__e"
    assert Weight.parse(line.split(" ")[1:]).shape == (2,)


def test_a_step_of_nothing_is_refused(tvm_host: Path) -> None:
    runner = TvmRunner(tvm_host)
    with pytest.raises(HikuiError, match="1 tokens after -1 are no step"):
        runner.forward(np.array([1]), -1)
    with pytest.raises(HikuiError, match="0 tokens after 0 are no step"):
        runner.forward(np.array([], np.int64), 0)


def test_both_readers_agree_on_the_real_one(tvm_host: Path) -> None:
    index = read_index(tvm_host)
    assert index.parameters == (tvm_host / PARAMETERS).stat().st_size
    assert (index.vocabulary, index.context_length) == (every_op.VOCABULARY, every_op.CONTEXT)
