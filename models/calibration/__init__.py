"""A small text to measure models on where their user gives none (CARD.md)."""

from pathlib import Path


def path() -> Path:
    """The text: documents separated by `<|endoftext|>`."""
    return Path(__file__).resolve().parent / "english.txt"
