"""What each recipe costs a real model: size, bits, quality, tasks, speed, and what lowering it takes.

    python -m benchmarks.yardstick MODEL --corpus DIR --work DIR [--recipes int4,gptq-4bit] [--pieces 48] [--tasks DIR]
        [--files FILE.gguf,…]

Every recipe is lowered to an artefact for this machine, and the artefact is measured: bits per character, KL divergence
and equal greedy tokens against the float model's own artefact on the same tokens, zero-shot tasks, tokens per second.
The text is as many pieces of 6000 characters, at paragraphs evenly spaced in each `valid.*.txt` of the corpus, read by
document; the calibration text is a mixture of documents of every `train.*.txt.xz`, so that neither is of one domain;
int4 and int4-small get none and take what comes with hikui.
Files of others' quantisers are measured with `--files`: GGUFs of the same model, of which our reader makes floats and
the interpreter the logits, so without what int8 activations cost in their own runtimes; the size is the file's alone.
What is done is kept under `--work`, a file a recipe; a second run goes on from there and writes the table.
"""

import argparse
import json
import lzma
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gguf import GGUFReader

from hikui.lowering.artefact.text import SEPARATOR
from hikui.lowering.files import write_whole

RECIPES = ("int4", "int4-small", "gptq-4bit", "gptq-3bit", "two-bit", "edge-1.6bit")
WITHOUT_TEXT = ("int4", "int4-small")
"""Recipes that are lowered as by a user who gives no text."""

CHANCE = {"piqa": 0.5, "arc_easy": 0.25, "lambada_openai": 0.0, "blimp": 0.5}
"""What guessing scores; for LAMBADA the word must be said."""

RESULTS = Path(__file__).parent / "results"
CHARACTERS, DOCUMENT = 6000, 8000
CONTEXT = 1024


def documents(path: Path) -> list[str]:
    """The documents of a text, which may be compressed."""
    content = (lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()).decode("utf-8")
    return [document.strip() for document in content.split(SEPARATOR) if document.strip()]


def pieces(corpus: Path, count: int) -> list[str]:
    """Pieces of the validation texts: as many of each domain, evenly spaced."""
    files = sorted(corpus.glob("valid.*.txt"))
    each, out = max(1, count // max(1, len(files))), []
    for path in files:
        text = "\n".join(documents(path))
        for index in range(each):
            start = index * len(text) // each
            start = start if index == 0 else text.index("\n", start) + 1
            out.append(text[start : start + CHARACTERS])
    return out


def mixture(corpus: Path, each: int = 80) -> list[str]:
    """Documents of the training texts, one of each domain in turn; only their beginnings, which is what is drawn."""
    domains = [documents(path) for path in sorted(corpus.glob("train.*.txt.xz"))]
    draw = random.Random(0)
    return [domain[draw.randrange(len(domain))][:DOCUMENT] for _ in range(each) for domain in domains]


def subset(path: Path, count: int, target: Path) -> None:
    """Rows of a task evenly spaced in its file: some files are sorted by kind."""
    rows = path.read_text("utf-8").splitlines(keepends=True)
    count = min(count, len(rows))
    kept = [rows[index * len(rows) // count] for index in range(count)]
    target.write_text("".join(kept), "utf-8")


def command(*arguments: str, out: Path | None = None) -> tuple[float, int]:
    """Runs hikui; gives seconds and the peak of its resident memory in bytes.

    Raises:
        SystemExit: it fails.
    """
    whole = [sys.executable, "-m", "hikui.lowering.app.cli", *arguments]
    start = time.perf_counter()
    with open(os.devnull if out is None else out, "wb") as stdout:
        child = subprocess.Popen(whole, stdout=stdout)
        _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"hikui {' '.join(arguments)} ends with {child.returncode}.")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def label(recipe: str) -> str:
    """A recipe's name, or that of its file without the ending; `edge-1.6bit` has none."""
    return Path(recipe).name.removesuffix(".yaml")


def measure(model: str, recipe: str, work: Path, tasks: list[Path]) -> dict[str, Any]:
    """Lowers a model with a recipe and measures the artefact; what was done before is read instead."""
    kept = work / f"{label(recipe)}.json"
    found: dict[str, Any] = json.loads(kept.read_text("utf-8")) if kept.exists() else {}
    artefact = work / label(recipe)
    if not artefact.exists():
        calibration = () if recipe in WITHOUT_TEXT else ("--calibration", str(work / "calibration.txt"))
        seconds, peak = command(
            "lower", model, "--recipe", recipe, *calibration, "--context", str(CONTEXT), "-o", str(artefact)
        )
        found |= {"lower_seconds": seconds, "lower_peak_bytes": peak}
        _keep(kept, json.dumps(found, indent=1))
    if "quality" not in found:
        target = work / f"{label(recipe)}.quality"
        against = () if recipe == "float" else ("--against", str(work / "float"))
        command("eval", str(artefact), "--text", str(work / "text.txt"), *against, "--json", out=target)
        found["quality"] = json.loads(target.read_text("utf-8"))
        found["artefact_bytes"] = sum(path.stat().st_size for path in artefact.rglob("*") if path.is_file())
        _keep(kept, json.dumps(found, indent=1))
    for task in tasks:
        if task.stem not in found.setdefault("tasks", {}):
            target = work / f"{label(recipe)}.{task.stem}"
            command("eval", str(artefact), "--tasks", str(task), "--json", out=target)
            (score,) = json.loads(target.read_text("utf-8"))["tasks"]["scores"]
            found["tasks"][task.stem] = score
            _keep(kept, json.dumps(found, indent=1))
    return found


def measure_file(path: Path, work: Path) -> dict[str, Any]:
    """Measures a GGUF file against the float artefact; what was done before is read instead."""
    kept = work / f"{path.stem}.gguf.json"
    found: dict[str, Any] = json.loads(kept.read_text("utf-8")) if kept.exists() else {}
    if "quality" not in found:
        target = work / f"{path.stem}.gguf.quality"
        command(
            "eval", str(path), "--text", str(work / "text.txt"), "--context", str(CONTEXT), "--against",
            str(work / "float"), "--json", out=target,
        )  # fmt: skip
        found["quality"] = json.loads(target.read_text("utf-8")) | file_bits(path)
        found["artefact_bytes"] = path.stat().st_size
        _keep(kept, json.dumps(found, indent=1))
    return found


def file_bits(path: Path) -> dict[str, float]:
    """Bits per weight of a GGUF's matrices inside the blocks, and of all its tensors."""
    tensors = [
        (tensor.name, len(tensor.shape), int(tensor.n_elements), int(tensor.n_bytes))
        for tensor in GGUFReader(path).tensors
    ]
    blocks = [(count, size) for name, dim, count, size in tensors if name.startswith("blk.") and dim == 2]
    every = [(count, size) for _, _, count, size in tensors]
    bits = [8 * sum(size for _, size in part) / sum(count for count, _ in part) for part in (blocks, every)]
    return {"block_bpw": bits[0], "all_bpw": bits[1]}


def _keep(path: Path, content: str) -> None:
    write_whole(path, lambda partial: partial.write_text(content, "utf-8"))


def table(found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The rows in Markdown; the float model comes first."""
    tasks = [name for name in CHANCE if name in found["float"].get("tasks", {})]
    heads = ["recipe", "block bpw", "all bpw", "artefact, MB", "bits/char", "above float", "KL, nats a token"]
    heads += ["equal greedy", *(f"{name} (retained)" for name in tasks), "tokens/s", "lowering, s", "peak, GB"]
    yield f"| {' | '.join(heads)} |"
    yield "|" + "---|" * len(heads)
    plain = found["float"]["quality"]["bits_per_char"]
    for recipe, row in found.items():
        quality = row["quality"]
        against = quality.get("against", {})
        cells = [recipe, *(_number(quality.get(name), ".3f") for name in ("block_bpw", "all_bpw"))]
        cells += [f"{row['artefact_bytes'] / 1e6:.1f}", f"{quality['bits_per_char']:.4f}"]
        if against:
            above, error = against["difference"], against["difference_error"]
            cells += [f"{100 * above / plain:+.2f} ± {100 * error / plain:.2f} %", f"{against['divergence']:.4f}"]
            cells += [f"{100 * against['agreement']:.1f} %"]
        else:
            cells += ["", "", ""]
        cells += [_task(name, row, found["float"]) for name in tasks]
        cells.append("" if recipe.endswith(".gguf") else _number(quality.get("tokens_per_second"), ".0f"))
        cells.append(_number(row.get("lower_seconds"), ".0f"))
        cells += [_number(None if "lower_peak_bytes" not in row else row["lower_peak_bytes"] / 1e9, ".2f")]
        yield f"| {' | '.join(cells)} |"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _score(name: str, row: dict[str, Any]) -> tuple[float, float] | None:
    score = row.get("tasks", {}).get(name)
    if score is None:
        return None
    key = "acc_norm" if name in ("piqa", "arc_easy") and "acc_norm" in score else "acc"
    return score[key], score[f"{key}_error"]


def _task(name: str, row: dict[str, Any], plain: dict[str, Any]) -> str:
    """The score with its standard error, and what is left of the float model's lead over chance."""
    own, whole = _score(name, row), _score(name, plain)
    if own is None or whole is None:
        return ""
    lead = whole[0] - CHANCE[name]
    kept = f" ({(own[0] - CHANCE[name]) / lead:.2f})" if row is not plain and lead > 0 else ""
    return f"{own[0]:.3f} ± {own[1]:.3f}{kept}"


def settle(path: Path, text: str) -> None:
    """Writes a text that results beside it will be of; they are of one text alone.

    Raises:
        SystemExit: another is there, and so may be results that were measured on it.
    """
    if path.exists() and path.read_text("utf-8") != text:
        raise SystemExit(
            f"{path} is not the text that is asked for, but what is beside it is of it; give another --work."
        )
    path.write_text(text, "utf-8")


def main() -> None:
    """Measures, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--recipes", default=",".join(RECIPES), help="names or files; float comes first always")
    parser.add_argument("--pieces", type=int, default=48)
    parser.add_argument("--tasks", type=Path, help="a folder with piqa.jsonl, arc_easy.jsonl, …")
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument("--files", default="", help="GGUF files of the same model by other quantisers")
    parser.add_argument("--task-recipes", default="", help="only these are run on tasks, float with them")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    separator = f"\n{SEPARATOR}\n"
    settle(options.work / "text.txt", separator.join(pieces(options.corpus, options.pieces)))
    settle(options.work / "calibration.txt", separator.join(mixture(options.corpus)))
    tasks = []
    for name in CHANCE if options.tasks else ():
        tasks.append(options.work / f"{name}.jsonl")
        subset(options.tasks / f"{name}.jsonl", options.items, tasks[-1])
    chosen = {"float", *options.task_recipes.split(",")} if options.task_recipes else None
    found = {}
    for recipe in ("float", *(name for name in options.recipes.split(",") if name)):
        wanted = tasks if chosen is None or recipe in chosen else []
        found[label(recipe)] = measure(options.model, recipe, options.work, wanted)
        print("\n".join(table(found)), flush=True)
    for path in (Path(name) for name in options.files.split(",") if name):
        found[path.name] = measure_file(path, options.work)
        print("\n".join(table(found)), flush=True)
    for row in found.values():
        for quality in (row["quality"], row["quality"].get("against", {})):
            quality.pop("each", None)
    _keep(RESULTS / "yardstick.json", json.dumps(found, indent=1, sort_keys=True) + "\n")
    _keep(RESULTS / "yardstick.md", "\n".join(table(found)) + "\n")


if __name__ == "__main__":
    main()
