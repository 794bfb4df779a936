"""What runs work: texts through a program, threads, processes, and finished work on disk."""
