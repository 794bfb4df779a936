"""What runs on the board: `hikui-run`, in C++, and the Python that builds it and talks to it."""
