# `make` sets everything up; the other verbs do that first where it has not been done.

PYTHON ?= python3
# Processes that tests run in; each takes up to 2 GB.
JOBS ?= 2
PYTEST_OPTIONS ?=
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: install sysroot demo test lint typecheck bench bench-quick bench-arm fuzz schema refusals clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt scripts/debian.sh
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hikui needs Python 3.11 or later; name one with make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,cross]'
	bash scripts/debian.sh
	touch $@

# What foreign artefacts need to run here under qemu-user; without it those tests are skipped with the reason.
sysroot: $(INSTALLED)
	bash scripts/sysroot.sh || test $$? -eq 3

demo: sysroot
	$(BIN)/python examples/demo.py

test: sysroot
	$(BIN)/python -m pytest -n $(JOBS) $(PYTEST_OPTIONS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(INSTALLED)
	$(BIN)/mypy

# The measurements behind docs/figures.md that need nothing beside the checkout; benchmarks/quality.py wants texts.
# Other libraries take part where they are installed: $(BIN)/pip install '.[peers,plot]'.
bench: sysroot
	$(BIN)/python -m benchmarks.kernels
	$(BIN)/python -m benchmarks.parity
	$(BIN)/python -m benchmarks.lower_memory

# Instructions under qemu-user and estimated cycles of the ARM kernels; writes benchmarks/results/arm.json.
bench-arm: $(INSTALLED)
	$(BIN)/python -m benchmarks.arm

# One thread, x86: at most three minutes; writes benchmarks/results/quick.json.
bench-quick: $(INSTALLED)
	$(BIN)/python -m benchmarks.kernels.quick

# Two million mutated files for the board runner's readers under the sanitisers; writes benchmarks/results/fuzz.json; then
# twenty times the tests of the readers in Python and of ONNX nodes.
fuzz: $(INSTALLED)
	$(BIN)/python -m tests.fuzz.runner_files
	HIKUI_FUZZ_FACTOR=20 $(BIN)/python -m pytest -n 2 -q tests/fuzz

# What editors check recipes against; a test holds it to the passes.
schema: $(INSTALLED)
	$(BIN)/hikui passes --schema > docs/recipe.schema.json

refusals: $(INSTALLED)
	$(BIN)/python scripts/refusals.py

clean:
	rm -rf build dist out .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
