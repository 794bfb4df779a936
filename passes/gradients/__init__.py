"""The graph's own nodes as functions that gradients flow through."""
