"""Zero-shot tasks through lm-eval, against transformers and counting by hand."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-eval is not installed (the extra `eval`)")

from hikui.lowering.app.request import Request
from hikui.lowering.app.runnable_model import RunnableModel, open_runnable_model
from hikui.lowering.artefact.generate import Runner, generate
from hikui.lowering.artefact.text import TextCodec
from hikui.lowering.errors import HikuiError, UsageError
from hikui.lowering.evaluation.harness import HarnessReport, read_tasks, run_tasks
from hikui.lowering.evaluation.harness_model import HarnessModel
from hikui.lowering.progress import no_progress
from tests.lowering import made_tokenizers


@pytest.fixture(scope="module")
def runnable(tiny: Path) -> RunnableModel:
    return open_runnable_model(Request(tiny, None))


@pytest.fixture(scope="module")
def log_probabilities(tiny: Path) -> Callable[[list[int]], torch.Tensor]:
    """transformers' log-probabilities [T, V] after each of the tokens, float64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()

    def call(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = model(torch.tensor([ids])).logits
            return logits[0].double().log_softmax(-1)

    return call


BOS = 0


def requests(*arguments: tuple[Any, ...]) -> Any:
    return [SimpleNamespace(args=args) for args in arguments]


def model_of(runnable: RunnableModel, **changes: Any) -> HarnessModel:
    options = {"runner": runnable.runner, "codec": runnable.codec, "eos": runnable.eos, "progress": no_progress}
    return HarnessModel(**{**options, **changes})


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(runnable: RunnableModel, *paths: Path, limit: int | None = None) -> HarnessReport:
    files = read_tasks([str(path) for path in paths])
    return run_tasks(runnable.runner, runnable.codec, files, eos=runnable.eos, limit=limit)


class Counting:
    """Counts the tokens that a runner is given."""

    def __init__(self, inner: Runner) -> None:
        self._inner, self.tokens, self.context_length = inner, 0, inner.context_length

    def reset(self) -> None:
        self._inner.reset()

    def forward(self, tokens: npt.NDArray[np.int64], past: int) -> npt.NDArray[np.float32]:
        self.tokens += tokens.size
        return self._inner.forward(tokens, past)

    def close(self) -> None: ...


def test_loglikelihoods_are_those_of_transformers(
    runnable: RunnableModel, log_probabilities: Callable[[list[int]], torch.Tensor]
) -> None:
    pairs = [("A cat", " sat"), ("", "Hello there"), ("A cat", " ran off"), ("A cat ", "sat"), ("Who", "?")]
    found = model_of(runnable).loglikelihood(requests(*pairs))
    for (context, continuation), (total, greedy) in zip(pairs, found, strict=True):
        whole, before = runnable.codec.encode(context + continuation), runnable.codec.encode(context.rstrip())
        rows = log_probabilities([BOS, *whole])[len(before) : -1]
        targets = torch.tensor(whole[len(before) :])
        assert total == pytest.approx(float(rows.gather(1, targets[:, None]).sum()), abs=1e-3)
        assert greedy == bool((rows.argmax(-1) == targets).all())
    assert found[0] == found[3]


def test_a_greedy_continuation_is_known_as_such(runnable: RunnableModel) -> None:
    prompt = [BOS, *runnable.codec.encode("Once upon")]
    tokens = generate(runnable.runner, prompt, max_new_tokens=3).tokens
    model = model_of(runnable)
    assert model._score([*prompt, *tokens], len(prompt))[1]
    other = (tokens[-1] + 1) % 131
    assert not model._score([*prompt, *tokens[:-1], other], len(prompt))[1]


def test_a_context_that_several_choices_share_is_read_once(runnable: RunnableModel) -> None:
    pairs = [("A long context that all of them share", f" {choice}") for choice in ("abcd", "efgh", "ijkl")]
    runner = Counting(runnable.runner)
    together = model_of(runnable, runner=runner).loglikelihood(requests(*pairs))
    spent = runner.tokens
    apart = [model_of(runnable).loglikelihood(requests(pair))[0] for pair in pairs]
    for (a, same_a), (b, same_b) in zip(together, apart, strict=True):
        assert a == pytest.approx(b, abs=1e-4)
        assert same_a == same_b
    context = 1 + len(runnable.codec.encode(pairs[0][0]))
    continuations = [len(runnable.codec.encode(continuation)) for _, continuation in pairs]
    # The last token of a continuation is never read, and the last one of the context is read for each.
    assert spent == context - 1 + sum(continuations)


def test_what_is_too_long_loses_its_left_but_not_bos(
    runnable: RunnableModel, log_probabilities: Callable[[list[int]], torch.Tensor]
) -> None:
    context, continuation = "x" * 50 + "A cat sat on the mat", " and slept"
    model = model_of(runnable)
    ((total, _),) = model.loglikelihood(requests((context, continuation)))
    assert model.truncated == 1
    targets = runnable.codec.encode(continuation)
    ids = runnable.codec.encode(context + continuation)
    kept = [BOS, *ids[-runnable.runner.context_length :]]
    rows = log_probabilities(kept[:-1])[-len(targets) :]
    assert total == pytest.approx(float(rows.gather(1, torch.tensor(targets)[:, None]).sum()), abs=1e-3)
    with pytest.raises(HikuiError, match="continuation of 80 tokens does not fit the context of 64"):
        model.loglikelihood(requests(("A", "y" * 80)))


def test_rolling_reads_every_token_once(
    runnable: RunnableModel, log_probabilities: Callable[[list[int]], torch.Tensor]
) -> None:
    text = "Once there was a fox who lived in a den. " * 4
    (total,) = model_of(runnable).loglikelihood_rolling(requests((text,)))
    ids, context = runnable.codec.encode(text), runnable.runner.context_length
    expected, at = 0.0, 0
    while at < len(ids):
        count = context if at == 0 else min(context, len(ids) - at)
        window = [BOS, *ids][at + count - context if at else 0 : at + count]
        rows = log_probabilities(window)[-count:]
        expected += float(rows.gather(1, torch.tensor(ids[at : at + count])[:, None]).sum())
        at += count
    assert len(ids) > 2 * context
    assert total == pytest.approx(expected, abs=1e-2)


def test_generation_stops_at_a_string_and_keeps_to_the_context(runnable: RunnableModel) -> None:
    model = model_of(runnable, eos=())
    (text,) = model.generate_until(requests(("Once", {"until": [], "max_gen_toks": 12})))
    expected = generate(runnable.runner, [BOS, *runnable.codec.encode("Once")], max_new_tokens=12)
    assert text == runnable.codec.decode(expected.tokens)
    stop = text[4:6]
    (cut,) = model.generate_until(requests(("Once", {"until": ["never", stop], "max_gen_toks": 12})))
    assert cut == text[: text.index(stop)]
    assert model.truncated == 0
    (long,) = model.generate_until(requests(("x" * 200, {"until": [], "max_gen_toks": 5})))
    assert model.truncated == 1
    assert len(runnable.codec.encode(long)) <= 5


def test_a_model_without_bos_says_what_stands_before(runnable: RunnableModel, tmp_path: Path) -> None:
    bare = TextCodec(made_tokenizers.save(made_tokenizers.byte_level(""), tmp_path))
    assert model_of(runnable).prefix == "token 0 before every request"
    assert "end-of-text token 7 before an empty context" in model_of(runnable, codec=bare, eos=(7,)).prefix
    with pytest.raises(HikuiError, match="puts no special token before a text and the model has no end-of-text"):
        model_of(runnable, codec=bare, eos=()).loglikelihood(requests(("", "abc")))
    ids, first = model_of(runnable, codec=bare, eos=(7,))._encode("ab", "cd")
    assert ids == runnable.codec.encode("abcd")
    assert first == 2


ROWS: list[dict[str, Any]] = [
    {"context": f"The {animal} went to the", "choices": [place, "moon!", "sky"], "label": label, "id": label}
    for animal, place, label in (
        ("fox", "den", 0),
        ("cow", "barn of the farmer", 1),
        ("bear", "cave", 2),
        ("ox", "x", 0),
    )
]


def test_choices_are_counted_as_by_hand(
    runnable: RunnableModel, tmp_path: Path, log_probabilities: Callable[[list[int]], torch.Tensor]
) -> None:
    report = run(runnable, write(tmp_path / "animals.jsonl", ROWS))
    plain = normalised = 0
    for row in ROWS:
        before = [BOS, *runnable.codec.encode(row["context"])]
        scores = []
        for choice in row["choices"]:
            targets = runnable.codec.encode(f" {choice}")
            rows = log_probabilities([*before, *targets])[len(before) - 1 : -1]
            scores.append(float(rows.gather(1, torch.tensor(targets)[:, None]).sum()))
        plain += int(np.argmax(scores)) == row["label"]
        normalised += int(np.argmax(np.array(scores) / [len(c) for c in row["choices"]])) == row["label"]
    (score,) = report.tasks
    assert (score.name, score.documents, report.truncated) == ("animals", 4, 0)
    for name, right in (("acc", plain), ("acc_norm", normalised)):
        figure, share = score.figures[name], right / 4
        assert figure.value == pytest.approx(share)
        assert figure.error == pytest.approx(math.sqrt(share * (1 - share) / 3))


def test_targets_and_texts_give_the_same_accuracy_and_perplexity(
    runnable: RunnableModel, tmp_path: Path, log_probabilities: Callable[[list[int]], torch.Tensor]
) -> None:
    words = [("The fox went home to its", "den"), ("The cow went home to its", "barn")]
    targets = write(tmp_path / "targets.jsonl", [{"context": a, "target": f" {b}"} for a, b in words])
    texts = write(tmp_path / "texts.jsonl", [{"text": f"{a} {b}"} for a, b in words])
    first, second = run(runnable, targets, texts).tasks
    for name, figure in first.figures.items():
        assert figure.value == pytest.approx(second.figures[name].value, rel=1e-4)
    totals = []
    for context, word in words:
        ids, wanted = runnable.codec.encode(context), runnable.codec.encode(f" {word}")
        rows = log_probabilities([BOS, *ids, *wanted])[len(ids) : -1]
        totals.append(float(rows.gather(1, torch.tensor(wanted)[:, None]).sum()))
    assert first.figures["perplexity"].value == pytest.approx(math.exp(-sum(totals) / 2), rel=1e-3)
    assert first.figures["acc"].error is not None


def test_limit_reads_the_first_documents(runnable: RunnableModel, tmp_path: Path) -> None:
    path = write(tmp_path / "animals.jsonl", ROWS)
    assert run(runnable, path, limit=2).tasks[0].documents == 2


YAML = """
task: animals_yaml
dataset_path: json
dataset_kwargs: {data_files: {test: data/animals.json}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: choices
doc_to_target: label
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""


def test_a_yaml_configuration_reads_the_data_beside_it(
    runnable: RunnableModel, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    (folder / "data").mkdir(parents=True)
    write(folder / "data" / "animals.json", ROWS)
    (folder / "animals_yaml.yaml").write_text(YAML)
    write(folder / "plain.jsonl", ROWS)
    configured, plain = run(runnable, folder).tasks
    assert configured.name == "animals_yaml"
    for name, figure in plain.figures.items():
        assert configured.figures[name] == figure
    # Nothing of the harness's own reaches stdout, where JSON is to stand.
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "cache").exists()


def test_data_that_would_have_to_be_fetched_is_refused(runnable: RunnableModel, tmp_path: Path) -> None:
    (tmp_path / "remote.yaml").write_text(YAML.replace("dataset_path: json", "dataset_path: someone/some_dataset"))
    with pytest.raises(UsageError, match=r"remote\.yaml is no task that can be run from local files"):
        run(runnable, tmp_path / "remote.yaml")
    (tmp_path / "broken.yaml").write_text("task: [")
    with pytest.raises(UsageError, match=r"broken\.yaml:1: this is not YAML"):
        run(runnable, tmp_path / "broken.yaml")


def configured(folder: Path, text: str) -> Path:
    (folder / "data").mkdir(parents=True, exist_ok=True)
    write(folder / "data" / "animals.json", ROWS)
    (folder / "animals_yaml.yaml").write_text(text)
    return folder / "animals_yaml.yaml"


@pytest.mark.parametrize(
    "text",
    [
        YAML.replace('doc_to_text: "{{context}}"', "doc_to_text: !function planted.text"),
        YAML.replace("{metric: acc, aggregation: mean,", "{metric: acc, aggregation: !function planted.text,"),
        YAML.replace("{metric: acc, ", "{metric: METRIC, hf_evaluate: true, "),
        "include: other.yaml\ntask: animals_yaml\n",
    ],
)
def test_code_beside_a_task_runs_by_the_option_only(
    runnable: RunnableModel, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = configured(tmp_path / "tasks", text.replace("METRIC", str(tmp_path / "tasks" / "planted.py")))
    (path.parent / "other.yaml").write_text(YAML.replace('"{{context}}"', "!function planted.text"))
    mark = tmp_path / "ran"
    code = f"from pathlib import Path\nPath({str(mark)!r}).write_text('ran')\ndef text(doc): return doc['context']\n"
    (path.parent / "planted.py").write_text(code)
    with pytest.raises(UsageError, match=r"planted.*--trust-remote-code"):
        run(runnable, path)
    assert not mark.exists()
    if "hf_evaluate" not in text and "aggregation: !" not in text:
        files = read_tasks([str(path)])
        run_tasks(runnable.runner, runnable.codec, files, eos=runnable.eos, trust_remote_code=True)
        assert mark.read_text() == "ran"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ cycler.__init__.__globals__.os.system('touch MARK') }}", "unsafe"),
        ("{% for a in range(99999999) %}x{% endfor %}", "range"),
        ("{{ missing }}", "undefined"),
        ("{% for %}", "Expected an expression"),
    ],
)
def test_a_template_runs_in_a_sandbox(runnable: RunnableModel, tmp_path: Path, template: str, words: str) -> None:
    mark = tmp_path / "ran"
    path = configured(tmp_path / "tasks", YAML.replace("{{context}}", template.replace("MARK", str(mark))))
    with pytest.raises(UsageError, match=rf"A template of the task .*animals_yaml\.yaml cannot be rendered.*{words}"):
        run(runnable, path)
    assert not mark.exists()


def test_braces_in_a_row_are_text(runnable: RunnableModel, tmp_path: Path) -> None:
    rows = [{"context": "{{ 1 // 0 }} {% for %}", "choices": [" a", " b"], "label": 0}]
    assert run(runnable, write(tmp_path / "braces.jsonl", rows)).tasks[0].documents == 1


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [" + ", ".join([f"*a{n - 1}"] * 9) + "]\n" for n in range(1, 12))


@pytest.mark.parametrize(
    "text", [BOMB, "a: &a [*a]\n", "a: " + "[" * 30000, "? [a]\n: b\n", "a: !!python/name:os.system\n"]
)
def test_a_configuration_that_is_too_much_is_refused_at_once(tmp_path: Path, text: str) -> None:
    (tmp_path / "bomb.yaml").write_text(text)
    start = time.perf_counter()
    with pytest.raises(UsageError, match=r"bomb\.yaml:"):
        read_tasks([str(tmp_path / "bomb.yaml")])
    assert time.perf_counter() - start < 1


def test_a_byte_order_mark_is_no_part_of_a_task(tmp_path: Path) -> None:
    path = write(tmp_path / "animals.jsonl", ROWS)
    plain = read_tasks([str(path)])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_tasks([str(path)]) == plain


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("{", r"bad\.jsonl:1: this is not JSON"),
        ('{"context": "a\\ud800", "target": "b"}', "this row holds half of a surrogate pair"),
        ("[" * 100_000, r"bad\.jsonl:1: this is not JSON: it nests too deeply"),
        ('{"label": ' + "9" * 5000 + "}", r"bad\.jsonl:1: this is not JSON"),
        ("", r"bad\.jsonl is empty"),
        ('{"question": "a", "answers": []}', r"bad\.jsonl:1: this row has 'question', 'answers'; a task's row has"),
        ('{"context": "a", "choices": ["b"], "label": 0}', "'choices' is a list of two texts or more"),
        ('{"context": "a", "choices": ["b", ""], "label": 0}', "'choices' is a list of two texts or more"),
        ('{"context": "a", "choices": ["b", "c"], "label": 2}', "'label' is the position of the right choice, 0 to 1"),
        ('{"context": "a", "choices": ["b", "c"], "label": true}', "'label' is the position"),
        ('{"context": "a", "target": "b"}\n{"context": "a", "choices": ["b", "c"], "label": 0}', "mixes rows"),
        ('{"context": "a", "target": "b"}\n[1]', r"bad\.jsonl:2: this row has no fields"),
    ],
)
def test_a_file_that_is_no_task_is_refused_with_its_line(tmp_path: Path, lines: str, words: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(lines)
    with pytest.raises(UsageError, match=words):
        read_tasks([str(path)])


def test_files_that_are_missing_or_named_alike_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="There is no task"):
        read_tasks([str(tmp_path / "none.jsonl")])
    with pytest.raises(UsageError, match="holds no task"):
        read_tasks([str(tmp_path)])
    path = write(tmp_path / "animals.jsonl", ROWS)
    with pytest.raises(UsageError, match="Two tasks are called animals"):
        read_tasks([str(path), str(path)])
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UsageError, match=r"notes\.txt is no task"):
        read_tasks([str(tmp_path / "notes.txt")])


def test_a_real_task_on_a_real_model(shared: Path) -> None:
    """Against transformers, on the first rows of the endings: accuracy by length-normalised log-probability."""
    from transformers import AutoModelForCausalLM

    folder, path = shared / "assets" / "models" / "stories260k-llama", shared / "assets" / "tasks"
    runnable, task = open_runnable_model(Request(folder, None)), path / "tinystories_ending4.jsonl"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    right, start = 0, 1
    for line in task.read_text("utf-8").splitlines()[:6]:
        row = json.loads(line)
        before = [start, *runnable.codec.encode(row["context"].rstrip())]
        scores = []
        for choice in row["choices"]:
            spaces = row["context"][len(row["context"].rstrip()) :] or " "
            ids = [start, *runnable.codec.encode(row["context"].rstrip() + spaces + choice)]
            with torch.no_grad():
                rows = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)[len(before) - 1 : -1]
            scores.append(float(rows.gather(1, torch.tensor(ids[len(before) :])[:, None]).sum()) / len(choice))
        right += int(np.argmax(scores)) == row["label"]
    (score,) = run(runnable, task, limit=6).tasks
    assert score.figures["acc_norm"].value == pytest.approx(right / 6)
