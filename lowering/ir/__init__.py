"""The program: graph, ops, weights, its text, its checks, and the interpreter."""
