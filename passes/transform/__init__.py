"""Equivalent transforms, folded into the weights before they are rounded."""
