"""The command line: `hikui COMMAND …`.

The modules of the commands import nothing heavy at the top, so that `hikui --help` is quick. Results go to stdout
(JSON with `--json`), progress and errors to stderr; the exit status is 0, 1 for what went wrong, 2 for a wrong request.
"""

import sys
from collections.abc import Sequence

from hikui.lowering.errors import HikuiError


def run(arguments: Sequence[str]) -> int:
    """Runs one command and returns the exit status; `--debug` anywhere lets errors through with their traceback."""
    from hikui.lowering.app.cli.application import application, quieten

    debug = "--debug" in arguments
    if not debug:
        quieten()
    try:
        application()(args=[argument for argument in arguments if argument != "--debug"], prog_name="hikui")
    except SystemExit as done:
        # Typer ends every command so, and has said what is wrong with a wrong request.
        return done.code if isinstance(done.code, int) else 0
    except HikuiError as error:
        if debug:
            raise
        print(f"hikui: {error}", file=sys.stderr)
        return error.exit_code
    except Exception as error:
        if debug:
            raise
        reason = " ".join(str(error).split())
        print(
            f"hikui: a defect of hikui ({type(error).__name__}: {reason}); run again with --debug and report it.",
            file=sys.stderr,
        )
    return 1


def main() -> None:
    """The entry point."""
    sys.exit(run(sys.argv[1:]))
