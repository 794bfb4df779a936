"""The reference model, and shapes of models for synthetic checkpoints."""
