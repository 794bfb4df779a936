"""How long the fuzz targets in Python run."""

import os

FACTOR = int(os.environ.get("HIKUI_FUZZ_FACTOR", "1"))
"""Times as many examples as in the test suite; `make fuzz` sets it."""
