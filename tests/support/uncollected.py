"""What only a garbage collection would free: objects that hold on to each other."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

OURS = ("service.", "uvicorn.", "starlette.", "asyncio.", "_asyncio.", "builtins.frame", "builtins.coroutine")


@contextmanager
def uncollected() -> Iterator[Counter[str]]:
    """After the block: how many objects of each kind of a server's were left so by it."""
    kinds: Counter[str] = Counter()
    flags, kept = gc.get_debug(), gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield kinds
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        names = (f"{type(found).__module__}.{type(found).__qualname__}" for found in gc.garbage)
        kinds.update(name for name in names if name.startswith(OURS))
    finally:
        gc.garbage.clear()
        gc.set_debug(flags)
        if kept:
            gc.enable()
