"""`python -m hikui.lowering.cli` is `hikui`."""

from hikui.lowering.cli import main

main()
