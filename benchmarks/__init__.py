"""Measurements behind the figures of README and docs/figures.md; each module is a command."""
