"""What turns a program into something that runs: kernels, the two backends, and what runs on the board."""
