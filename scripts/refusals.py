"""Writes docs/refusals.md: what hikui refuses and how it is said, from the code and the tests.

    python scripts/refusals.py            writes the table anew
    python scripts/refusals.py --check    exits with 1 where the committed table is another

A sentence is the text of a `raise`; … stands for what is filled in. A test belongs to it where words that the test
expects, at least three in a row, are in the sentence.
"""

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "refusals.md"
ROOMS = ("lowering", "passes", "backends", "models")
EXIT_CODES = {"HikuiError": 1, "LoadError": 1, "UsageError": 2, "VerificationError": 3}
_FILLED = "…"
_FEWEST_WORDS = 3
_HEAD = """# What is refused, and how it is said

Written by `make refusals` from the code and the tests; … stands for what is filled in. Each sentence ends a command
with the status before it: 1 for what is wrong with the input, the machine or an artefact, 2 for a wrong request, 3 for
a promise that a pass or hikui has broken. Beside it stand the test modules that expect at least three words of it in a
row; a dash says that none does, though a test may expect fewer words, or what is filled in.
"""


@dataclass(frozen=True, order=True)
class Refusal:
    """One sentence of the code: the file that says it, the exit status, and the words."""

    file: str
    status: int
    sentence: str


def text_of(node: ast.expr) -> str | None:
    """A string as it is written, with … for what is filled in; None for what is no text."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) or _FILLED for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (text_of(node.left) or _FILLED) + (text_of(node.right) or _FILLED)
    return None


def refusals() -> list[Refusal]:
    """Every sentence that the code raises, in order."""
    found = set()
    for path in sorted(file for room in ROOMS for file in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or not node.args:
                continue
            status, sentence = EXIT_CODES.get(node.func.id), text_of(node.args[0])
            if status is not None and sentence and sentence.strip(f"{_FILLED}. "):
                found.add(Refusal(path.relative_to(ROOT).as_posix(), status, " ".join(sentence.split())))
    return sorted(found, key=lambda refusal: (refusal.file.rpartition("/")[0], refusal))


def expected_words() -> Iterator[tuple[str, str]]:
    """Runs of words that tests expect, each with its module."""
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        for node in ast.walk(tree):
            text = text_of(node) if isinstance(node, ast.expr) else None
            for run in re.split(rf"[{_FILLED}()\[\]|*+?^$]|\.\*", (text or "").replace("\\", "")):
                if len(run.split()) >= _FEWEST_WORDS:
                    yield run.strip(), path.relative_to(ROOT / "tests").as_posix()


def table() -> str:
    """The whole page."""
    words = sorted(set(expected_words()))
    lines = [_HEAD]
    room = ""
    for refusal in refusals():
        folder = refusal.file.rpartition("/")[0]
        if folder != room:
            room = folder
            lines += [f"## `{room}/`\n", "| status | sentence | said by | expected by |", "|---|---|---|---|"]
        tests = sorted({test for run, test in words if run in refusal.sentence})
        cells = (refusal.sentence, Path(refusal.file).name, ", ".join(tests) or "–")
        lines.append("| " + " | ".join([str(refusal.status), *(cell.replace("|", "\\|") for cell in cells)]) + " |")
        lines.append("")
    text = "\n".join(lines).replace(" |\n\n|", " |\n|")
    return text.rstrip("\n") + "\n"


def main() -> int:
    """Writes or checks the table; returns the exit status."""
    if "--check" in sys.argv[1:]:
        return 0 if TABLE.is_file() and TABLE.read_text("utf-8") == table() else 1
    TABLE.write_text(table(), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
