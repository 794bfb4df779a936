"""Rounding matrices, and packing them."""
