"""Times hikui's products beside other libraries' and beside what the machine itself can do.

    python -m benchmarks.kernels                 everything, for tens of minutes
    python -m benchmarks.kernels --only kind=int4 m=1 --rounds 21
    python -m benchmarks.kernels.quick           a few minutes: benchmarks/results/quick.json

All of it multiplies float activations with a low-bit matrix: what a library does to quantise the activations is in its
time. In each setting (shape, rows, threads, cold or in cache) all contestants and the machine's own limits take turns,
round by round; a figure is the median over the rounds with its quartiles, a ratio the median of the rounds' ratios. One
thread is timed by the CPU time of the process, which other processes disturb least, several by the clock. "Cold" walks
over so many copies of the weights (150 MB and more) that they come from memory, as in a model; "in cache" repeats one
product.
"""
