"""Threads for what blocks, by what it waits for: a database that is away holds up no upload, and neither holds up what
asyncio's own few threads do (metrics, large JSON, hashing)."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Threads:
    """Like `asyncio.to_thread`, on threads of its own, which start when they are needed."""

    def __init__(self, name: str, count: int) -> None:
        self._executor = ThreadPoolExecutor(count, thread_name_prefix=name)

    async def __call__(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Return what `function` returns."""
        call = partial(contextvars.copy_context().run, function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._executor, call)


on_database: Final = Threads("database", 8)
"""As many as the connections that one process opens."""
on_disk: Final = Threads("disk", 4)
on_process: Final = Threads("process", 6)
"""Wait for child processes, minutes long: four checks of uploads, an import, and the backbones at start."""
on_answers: Final = Threads("answers", 1)
"""Decodes long texts whose places are answered: seconds of pure computation."""
on_rows: Final = Threads("rows", 2)
"""Read a dataset's rows for a job's plan, which takes seconds."""
