"""Gives memory that was freed back to the system."""

from __future__ import annotations

import ctypes
import sys

import pyarrow as pa


def release_free_memory() -> None:
    """What the preparation of the data leaves behind would stand beside the training's own until the end.

    Of 50,000 rows of 130 words that is 35 MB in glibc's arenas and 100 MB in Arrow's pool.
    """
    pa.default_memory_pool().release_unused()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)
