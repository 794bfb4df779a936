"""`python -m hikui.lowering.app.cli` is `hikui`."""

from hikui.lowering.app.cli import main

main()
