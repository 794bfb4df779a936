"""What `--debug-dump DIR` leaves: the program's text and its diff after each pass, and one line of JSON a pass."""

import json
import resource
from pathlib import Path

from hikui.lowering.errors import HikuiError
from hikui.lowering.ir.printer import diff, to_text
from hikui.lowering.ir.program import Program
from hikui.lowering.pipeline.contract import Pass, PassResult


class DebugDump:
    """A pipeline callback that writes a folder.

    Args:
        directory: made if need be; files of the same names are replaced.
        program: the traced program, written first.

    Raises:
        HikuiError: the folder cannot be written.
    """

    def __init__(self, directory: Path, program: Program) -> None:
        self._directory = directory
        self._number = 0
        self._text = to_text(program)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / "events.jsonl").write_text("")
        except OSError as error:
            raise HikuiError(f"{directory} cannot be written: {error.strerror}; choose another --debug-dump.") from None
        self._write("trace.txt", self._text)

    def before(self, step: Pass, program: Program) -> None:
        """Nothing is written before a pass."""

    def after(self, step: Pass, result: PassResult, seconds: float) -> None:
        """Writes the program after a pass, how it differs, and what the pass said."""
        self._number += 1
        after = to_text(result.program)
        self._write(f"{step.name}.txt", after)
        self._write(f"{step.name}.diff", diff(self._text, after, str(step)))
        self._text = after
        event = {
            "pass": str(step),
            "modified": result.modified,
            "seconds": round(seconds, 4),
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "notes": result.notes,
        }
        with (self._directory / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(event, ensure_ascii=False) + "\n")

    def _write(self, name: str, content: str) -> None:
        (self._directory / f"{self._number:02}-{name}").write_text(content, "utf-8")
