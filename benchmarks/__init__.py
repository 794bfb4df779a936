"""Measurements behind the figures of the README; each module is a command."""
