"""The C++ runner: natively and under qemu-user, against the runner in Python; and what it says of bad input."""

import json
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest

from hikui.backends.tvm import TvmBackend, TvmRunner
from hikui.backends.tvm.index import INDEX, PARAMETERS, TOKENS, read_index
from hikui.backends.tvm.native.board import Board, BoardRunner, run_on_board
from hikui.lowering.artefact.generate import generate
from hikui.lowering.artefact.target import TARGETS, resolve
from hikui.lowering.errors import HikuiError
from hikui.lowering.ir.interpreter import ReferenceRunner
from hikui.lowering.progress import no_progress
from tests.backends import every_op

HOST = Board("x86_64-linux-gnu", threads=1)
PROMPT = [5, 9, 33, 2, 60]


def hikui_run(directory: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [*HOST.command(directory), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def sentence(result: subprocess.CompletedProcess[str], code: int = 1) -> str:
    """The one sentence of a refusal."""
    assert result.returncode == code, result
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("hikui-run: ")
    return line


def edit_index(directory: Path, old: str, new: str) -> None:
    text = (directory / INDEX).read_text()
    assert old in text
    (directory / INDEX).write_text(text.replace(old, new, 1))


def test_the_boards_runner_writes_the_tokens_of_pythons(tvm_host: Path) -> None:
    runner = TvmRunner(tvm_host)
    expected = generate(runner, PROMPT, max_new_tokens=20, stop=(every_op.EOS,)).tokens
    run = run_on_board(tvm_host, HOST, PROMPT, 20)
    assert run.tokens == expected
    assert run.text is None
    assert run.first_token_seconds > 0
    runner.reset()
    rows = [runner.forward(np.array(PROMPT), 0)[-1]]
    rows += [runner.forward(np.array([token]), len(PROMPT) + at)[0] for at, token in enumerate(run.tokens)]
    np.testing.assert_array_equal(run.logits, np.array(rows[: len(run.logits)]))


def test_it_says_which_kernels_run(tvm_host: Path, tvm_board: Path) -> None:
    said = hikui_run(tvm_host, "--tokens", 1, "--verbose").stderr
    assert f"kernels for {TARGETS[read_index(tvm_host).target].isas[-1]}\n" in said
    assert "fallback" not in said
    index = read_index(tvm_board)
    command = [*Board(index.triple, index.emulator_cpu).command(tvm_board), "--tokens", "1", "--verbose"]
    said = subprocess.run(command, capture_output=True, text=True).stderr
    assert f"kernels for {TARGETS[index.target].isas[-1]}\n" in said


def test_chunks_of_a_prompt_change_nothing(tvm_host: Path, tmp_path: Path) -> None:
    prompt, rows = ",".join(str(at % 50) for at in range(29)), []
    for chunk in (64, 29, 8, 1):
        dump = tmp_path / str(chunk)
        result = hikui_run(tvm_host, "--tokens", prompt, "--chunk", chunk, "--dump-logits", dump, "--json")
        assert result.returncode == 0
        rows.append(np.fromfile(dump, np.float32))
    for row in rows[1:]:
        np.testing.assert_allclose(row, rows[0], rtol=1e-4, atol=1e-5)


def test_it_stops_at_the_end_of_a_text(tvm_host: Path, copied: Path) -> None:
    tokens = run_on_board(tvm_host, HOST, PROMPT, 20).tokens
    last = next(at for at in range(1, 20) if tokens[at] not in tokens[:at])
    edit_index(copied, f"eos {every_op.EOS}", f"eos {tokens[last]}")
    run = run_on_board(copied, HOST, PROMPT, 20)
    assert run.tokens == tokens[:last]
    # The logits that chose the end are written too.
    assert len(run.logits) == last + 1
    assert run.logits[-1].argmax() == tokens[last]


def test_it_fills_the_cache_and_stops(tvm_host: Path) -> None:
    run = run_on_board(tvm_host, HOST, list(range(30)), 64)
    assert len(run.tokens) == every_op.CONTEXT - 30 + 1


def test_it_prints_text_and_json(copied: Path) -> None:
    texts = [b"\xc3" if token % 2 else b'\xa9"\n' for token in range(every_op.VOCABULARY)]
    offsets = np.cumsum([0, *map(len, texts)])
    header = b"HKTK" + struct.pack(f"<I{len(offsets)}I", len(texts), *offsets)
    (copied / TOKENS).write_bytes(header + b"".join(texts))
    arguments = ("--tokens", "5,9", "--max-new-tokens", 12)
    result = json.loads(hikui_run(copied, *arguments, "--json").stdout)
    written = b"".join(texts[token] for token in result["tokens"])
    plain = subprocess.run([*HOST.command(copied), *map(str, arguments)], capture_output=True, check=True).stdout
    assert plain == written + b"\n"
    assert result["text"] == written.decode("utf-8", errors="replace")
    (copied / TOKENS).write_bytes((header + b"".join(texts))[:-1])
    assert "cut short" in sentence(hikui_run(copied, *arguments))


def test_boards_write_the_hosts_tokens(tvm_board: Path, tvm_host: Path) -> None:
    index = read_index(tvm_board)
    run = run_on_board(tvm_board, Board(index.triple, index.emulator_cpu, threads=1), PROMPT, 20)
    host = run_on_board(tvm_host, HOST, PROMPT, 20)
    assert run.tokens == host.tokens
    np.testing.assert_allclose(run.logits, host.logits, rtol=1e-4, atol=1e-5)


def test_a_board_without_dotprod_is_told_so(tvm_board: Path) -> None:
    index = read_index(tvm_board)
    board = Board(index.triple, "cortex-a72")
    if "asimddp" in index.features:
        with pytest.raises(HikuiError, match="this CPU lacks asimddp"):
            run_on_board(tvm_board, board, PROMPT, 1)
    else:
        assert len(run_on_board(tvm_board, board, PROMPT, 1).tokens) == 1


def test_weights_are_mapped_not_read(tmp_path: Path) -> None:
    """The runner's own memory holds no copy of the weights."""
    program = every_op.table(rows=2048, width=2048)
    TvmBackend().build(program, resolve("host"), tmp_path, no_progress)
    runner = BoardRunner(tmp_path, HOST)
    try:
        logits = runner.forward(np.arange(0, 2048, 8), 0)
        assert _own_memory(runner.pid) < 16 << 20
    finally:
        runner.close()
    assert read_index(tmp_path).parameters > 32 << 20
    np.testing.assert_allclose(logits, ReferenceRunner(program).forward(np.arange(0, 2048, 8), 0), rtol=1e-4, atol=1e-4)


def _own_memory(process: int) -> int:
    """Bytes that a process holds in memory and that no file backs."""
    status = Path(f"/proc/{process}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) << 10


@pytest.mark.parametrize("feature", ["sve2", "amx_tile"])
def test_a_missing_cpu_feature_is_named(copied: Path, feature: str) -> None:
    edit_index(copied, "feature avx2", f"feature {feature}")
    # Even a library that would kill the process is not touched before.
    (copied / "model.so").write_bytes(b"no library")
    assert f"lacks {feature}" in sentence(hikui_run(copied, "--tokens", 1))
    with pytest.raises(HikuiError, match=f"lacks {feature}"):
        TvmRunner(copied)


def test_truncated_weights_are_refused(copied: Path) -> None:
    path = copied / PARAMETERS
    path.write_bytes(path.read_bytes()[:-100])
    assert f"{path} has" in sentence(hikui_run(copied, "--tokens", 1))
    with pytest.raises(HikuiError, match=r"bytes, but model\.index says"):
        TvmRunner(copied)


@pytest.mark.parametrize("name", ["model.so", PARAMETERS, INDEX])
def test_a_missing_file_is_named(copied: Path, name: str) -> None:
    (copied / name).unlink()
    assert name in sentence(hikui_run(copied, "--tokens", 1))
    with pytest.raises(HikuiError, match=name):
        TvmRunner(copied)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("end\n", ""),
        ("hikui-tvm 1", "hikui-tvm 2"),
        ("context 32", "context x"),
        ("weight float32 0", "weight float32"),
    ],
)
def test_a_damaged_index_is_refused(copied: Path, old: str, new: str) -> None:
    edit_index(copied, old, new)
    assert INDEX in sentence(hikui_run(copied, "--tokens", 1))
    with pytest.raises(HikuiError, match=INDEX):
        TvmRunner(copied)


def test_weights_outside_their_file_are_refused(copied: Path) -> None:
    index = read_index(copied)
    edit_index(
        copied, index.weights[3].line(), index.weights[3].line().replace(" ", " 6400000", 2).replace("6400000", "", 1)
    )
    assert "do not belong together" in sentence(hikui_run(copied, "--tokens", 1))
    with pytest.raises(HikuiError, match="do not belong together"):
        TvmRunner(copied)


def test_a_library_of_another_architecture_is_refused(copied: Path, tvm_board: Path) -> None:
    shutil.copy(tvm_board / "model.so", copied / "model.so")
    assert "loading the model's library failed" in sentence(hikui_run(copied, "--tokens", 1))
    with pytest.raises(HikuiError, match=r"model\.so cannot be loaded"):
        TvmRunner(copied)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--tokens", ",".join(["1"] * 33)], 1, "the prompt has 33 tokens, but the cache holds 32"),
        (["--tokens", "1,61"], 1, "token 61 is not in the vocabulary of 61"),
        (["--tokens", ""], 2, "no tokens"),
        (["--tokens", "1,x"], 2, "'x'"),
        (["--tokens", "1", "--max-new-tokens", "0"], 2, "--max-new-tokens"),
        (["--tokens", "1", "--threads", "many"], 2, "'many'"),
        (["--tokens-file", "/nowhere"], 2, "/nowhere"),
        (["--tokens", "1", "--dump-logits", "/nowhere/x"], 1, "/nowhere/x"),
        (["--prompt", "hello"], 2, "--prompt"),
        ([], 2, "--tokens"),
    ],
)
def test_bad_requests_get_one_sentence(tvm_host: Path, arguments: list[str], code: int, words: str) -> None:
    assert words in sentence(hikui_run(tvm_host, *arguments), code)


def test_a_failing_board_says_why(copied: Path) -> None:
    edit_index(copied, "feature avx2", "feature sve2")
    runner = BoardRunner(copied, HOST)
    try:
        with pytest.raises(HikuiError, match="lacks sve2"):
            runner.forward(np.array(PROMPT), 0)
    finally:
        runner.close()


def test_tokens_that_do_not_fit_are_refused(tvm_host: Path) -> None:
    runner = TvmRunner(tvm_host)
    with pytest.raises(HikuiError, match="33 tokens do not fit the cache of 32"):
        runner.forward(np.arange(3), 30)
    with pytest.raises(HikuiError, match="outside the model's vocabulary of 61"):
        runner.forward(np.array([61]), 0)
