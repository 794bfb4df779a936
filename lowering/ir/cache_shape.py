"""What a layer's key-value cache is made of; nothing here needs torch, so that a runner starts quickly."""

import math
from dataclasses import dataclass

FLOAT_CACHE = "float32"
CACHE_FORMATS = (FLOAT_CACHE, "int8", "int4")

_CODES = {"int8": ("int8", 1), "int4": ("uint8", 2)}
"""dtype of the codes, and how many a byte holds."""

_ITEM_BYTES = {"float32": 4, "float16": 2, "int8": 1, "uint8": 1}


@dataclass(frozen=True)
class CacheTensor:
    """One tensor of a cache: what it is (`key_cache`, `key_scale`, …), its shape and its dtype's name."""

    kind: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class CacheShape:
    """A layer's cache: key-value heads, their size, and how both keys and values are stored.

    Attributes:
        format: `float32`, or `int8` or `int4` with a scale for each token and head (`formats/cache.py`).
    """

    heads: int
    head_size: int
    format: str = FLOAT_CACHE

    def tensors(self, context: int) -> tuple[CacheTensor, ...]:
        """The tensors of a cache of `context` tokens, in the order of a program's inputs and outputs."""
        sides = ("key", "value")
        if self.format == FLOAT_CACHE:
            shape = (1, self.heads, context, self.head_size)
            return tuple(CacheTensor(f"{side}_cache", shape, FLOAT_CACHE) for side in sides)
        dtype, codes = _CODES[self.format]
        shape = (1, self.heads, context, self.head_size // codes)
        return (
            *(CacheTensor(f"{side}_cache", shape, dtype) for side in sides),
            *(CacheTensor(f"{side}_scale", (1, self.heads, context), "float16") for side in sides),
        )

    def nbytes(self, context: int) -> int:
        """Bytes of a cache of `context` tokens, scales counted."""
        return sum(tensor.nbytes for tensor in self.tensors(context))
