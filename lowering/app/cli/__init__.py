"""The command line: `hikui COMMAND …`.

The modules of the commands import nothing heavy at the top, so that `hikui --help` is quick. Results go to stdout
(JSON with `--json`), progress and errors to stderr; the exit status is 0, 1 for what went wrong, 2 for
a wrong request, and 3 for a defect of hikui or of a pass.
"""

import os
import sys
import traceback
from collections.abc import Sequence

from hikui.lowering.errors import DEFECT, HikuiError, UsageError, VerificationError
from hikui.lowering.json_text import not_utf8


def run(arguments: Sequence[str]) -> int:
    """Runs one command and returns the exit status; `--debug` anywhere lets errors through with their traceback."""
    from hikui.lowering.app.cli import console
    from hikui.lowering.app.cli.application import application, quieten

    for argument in arguments:
        if (at := not_utf8(argument)) is not None:
            print(
                f"hikui: the argument {argument!a} is not UTF-8 at character {at + 1}; give it, or name the file, "
                "in UTF-8.",
                file=sys.stderr,
            )
            return UsageError.exit_code
    debug = "--debug" in arguments
    console.debug.set(debug)
    if not debug:
        quieten()
    if sys.stdout is None:
        print("hikui: the standard output is closed.", file=sys.stderr)
        return HikuiError.exit_code
    try:
        application()(args=[argument for argument in arguments if argument != "--debug"], prog_name="hikui")
        return 0
    except SystemExit as done:
        # Typer ends every command so, and has said what is wrong with a wrong request.
        code = done.code if isinstance(done.code, int) else 0
        lost = None if code else _lost_output()
        if lost is None:
            return code
        print(f"hikui: the output cannot be written: {lost}.", file=sys.stderr)
        return HikuiError.exit_code
    except Exception as error:
        if debug:
            raise
        lost = _lost_output(error)
        if lost is not None:
            print(f"hikui: the output cannot be written: {lost}.", file=sys.stderr)
            return HikuiError.exit_code
        print(f"hikui: {_sentence(error)}", file=sys.stderr)
        return error.exit_code if isinstance(error, HikuiError) else DEFECT


def _lost_output(error: Exception | None = None) -> str | None:
    """Why the output could not be written, or what is left in its buffer cannot; None where all has been written."""
    try:
        if isinstance(error, OSError) and error.filename is None and _from_echo(error):
            raise error
        sys.stdout.flush()
    except OSError as lost:
        # Python would try again at its end, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return lost.strerror or str(lost)
    return None


def _from_echo(error: OSError) -> bool:
    """Whether an error comes from where commands print."""
    innermost = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        innermost = frame
    return innermost is not None and innermost.f_globals.get("__name__", "").partition(".")[0] in ("click", "typer")


def _sentence(error: Exception) -> str:
    """What went wrong, and in which pass."""
    where = "".join(f"{note}: " for note in getattr(error, "__notes__", ()))
    reason = " ".join(str(error).split())
    if isinstance(error, HikuiError) and not isinstance(error, VerificationError):
        return f"{where}{reason}"
    kind = "" if isinstance(error, HikuiError) else f"{type(error).__name__}: "
    return f"a defect of hikui or of a pass ({where}{kind}{reason}); run again with --debug and report it."


def main() -> None:
    """The entry point."""
    sys.exit(run(sys.argv[1:]))
