# `make` sets everything up; the other verbs do that first where it has not been done.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: install sysroot demo test lint typecheck bench schema clean

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
	$(BIN)/python -m pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(INSTALLED)
	$(BIN)/mypy

# The measurements behind the README's figures that need nothing beside the checkout; benchmarks/quality.py wants texts.
bench: sysroot
	$(BIN)/python -m benchmarks.kernels
	$(BIN)/python -m benchmarks.parity
	$(BIN)/python -m benchmarks.lower_memory

# What editors check recipes against; a test holds it to the passes.
schema: $(INSTALLED)
	$(BIN)/hikui passes --schema > docs/recipe.schema.json

clean:
	rm -rf build dist out .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
