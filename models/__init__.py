"""The reference model, models that `hikui fetch` brings, and shapes for synthetic checkpoints."""
