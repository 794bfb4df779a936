"""The CUDA kernels on a GPU: numbers and times. `python -m benchmarks.cuda` does both."""
