"""The contract of a pass, pipelines of passes, and recipes."""
