"""Which format each site gets."""
