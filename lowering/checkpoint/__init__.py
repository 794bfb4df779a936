"""Checkpoints on disk, float or quantised already, read tensor by tensor."""
