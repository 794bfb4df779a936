"""Keeps the resident set near what is in use."""

import ctypes
from contextlib import suppress


def give_back() -> None:
    """Returns freed memory to the system.

    glibc keeps freed blocks of up to 32 MB for itself, and matrices that come and go leave its heap full of holes: on a
    checkpoint of a billion parameters that is half a gigabyte. Does nothing where the C library cannot.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
