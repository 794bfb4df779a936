"""The ARM kernels without a board: instructions per multiply-accumulate under emulation, and estimated cycles."""
