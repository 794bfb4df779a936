"""The reference model: a small trained Llama-style model that belongs to the project (CARD.md)."""

from pathlib import Path


def path() -> Path:
    """The folder with the checkpoint, the tokenizer and the card."""
    return Path(__file__).resolve().parent
