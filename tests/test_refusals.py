"""The table of what is refused, and the words that its sentences do without."""

import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "scripts" / "refusals.py"
TABLE = SCRIPT.parent.parent / "docs" / "refusals.md"
GUESSES = re.compile(
    r"\b(perhaps|maybe|probably|likely|diverged|belongs to another|another checkpoint|itself is broken|or damaged)\b"
)


def test_the_table_is_that_of_the_code() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr or "docs/refusals.md is out of date; run `make refusals`"


def test_no_sentence_guesses_a_cause() -> None:
    rows = [line for line in TABLE.read_text("utf-8").splitlines() if re.match(r"\| \d \|", line)]
    assert len(rows) > 100
    assert not [row for row in rows if GUESSES.search(row)]
