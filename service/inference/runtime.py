"""Time and threads, as the hot path sees them: a simulation brings its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass

from service.inference.engine_thread import EngineThread


def _tokenizer_threads(count: int) -> Executor:
    return ThreadPoolExecutor(count, thread_name_prefix="tokenizer")


def _loader_thread() -> Executor:
    return ThreadPoolExecutor(1, thread_name_prefix="model-loader")


@dataclass(frozen=True, slots=True)
class Runtime:
    """`clock` in seconds, as `time.monotonic` counts them."""

    clock: Callable[[], float] = time.monotonic
    engine_thread: Callable[..., EngineThread] = EngineThread
    tokenizer_threads: Callable[[int], Executor] = _tokenizer_threads
    loader_thread: Callable[[], Executor] = _loader_thread
