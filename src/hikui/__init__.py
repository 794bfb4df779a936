"""hikui lowers large language models to low-bit artefacts that many small machines run."""

__version__ = "0.1.0"
