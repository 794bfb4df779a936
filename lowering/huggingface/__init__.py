"""What is read of a Hugging Face folder through transformers, and what is refused before transformers sees it."""
