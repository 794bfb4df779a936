"""Scales that are learned block by block."""
