"""A front end's connection to the engine process: `Predictor.predict` over frames, and what it counts.

One stream, many requests in flight. When it breaks, those fail with `ModelNotReady` and it is opened again.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Final

from model_registry.refs import ModelRef
from service.front.frames import (
    MAX_ANSWER_BYTES,
    MAX_TOP_K,
    Answered,
    Ask,
    Asked,
    Cancel,
    Count,
    Failed,
    FrameConnection,
    MalformedFrame,
    Options,
    Result,
    decode_answer,
    error_of,
    frame,
)
from service.inference.errors import DeadlineExceeded, ModelNotReady

_log = logging.getLogger("service.front")
OVERDUE_S: Final = 5.0
"""The engine process ends a request at its deadline; one that hangs is given up so much later."""
FIRST_DELAY_S: Final = 0.05
LONGEST_DELAY_S: Final = 2.0
COUNT_WITHIN_S: Final = 0.02
"""A count waits so long for a request to travel with: reading it by itself costs the engine process as much again."""
_MAX_WAITING_COUNTS: Final = 10_000


def make_options(
    top_k: int | None, threshold: float | None, truncate: bool, max_length: int | None, return_embedding: bool, /
) -> Options:
    return Options(None if top_k is None else min(top_k, MAX_TOP_K), threshold, truncate, max_length, return_embedding)


def unreachable() -> ModelNotReady:
    return ModelNotReady("the process that runs the models cannot be reached right now", retry_after_s=1.0)


class EngineLink:
    """Stands for the predictor, the pool's names and the metrics of the engine process at the socket `path`."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._connection: FrameConnection | None = None
        self._pending: dict[int, asyncio.Future[Result]] = {}
        self._ids = itertools.count(1)
        self._waiting_counts: deque[Count] = deque(maxlen=_MAX_WAITING_COUNTS)
        self._flush_timer: asyncio.TimerHandle | None = None
        self._open = asyncio.Event()

    async def run(self) -> None:
        """Keeps the connection open until cancelled."""
        loop = asyncio.get_running_loop()
        delay_s = FIRST_DELAY_S
        while True:
            lost: asyncio.Future[MalformedFrame | None] = loop.create_future()
            try:
                _, connection = await loop.create_unix_connection(
                    lambda lost=lost: FrameConnection(  # type: ignore[misc]
                        decode_answer, MAX_ANSWER_BYTES, on_message=self._take, on_lost=lost.set_result
                    ),
                    self._path,
                )
            except OSError:
                await asyncio.sleep(delay_s)
                delay_s = min(LONGEST_DELAY_S, 2 * delay_s)
                continue
            try:
                self._opened(connection)
                delay_s = FIRST_DELAY_S
                fault = await asyncio.shield(lost)
            finally:
                self._closed()
                connection.transport.abort()
            _log.warning("the connection to the engine process broke: %s", fault or "closed")
            await asyncio.sleep(delay_s)

    async def opened(self) -> None:
        """Returns once the connection is there."""
        await self._open.wait()

    async def predict(
        self,
        tenant: str,
        ref: ModelRef,
        inputs: Sequence[str | tuple[str, str]],
        options: Options,
        *,
        deadline: float,
        needs_labels: bool = True,
    ) -> Result:
        """As `Predictor.predict`, with the same errors; `ModelNotReady` also where the connection is or gets lost.
        A caller that is cancelled cancels the work."""
        connection = self._connection
        if connection is None:
            raise unreachable()
        id_ = next(self._ids)
        answer: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._pending[id_] = answer
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic()) + OVERDUE_S):
                await connection.writable()
                remaining_s = deadline - time.monotonic()
                ask = frame(Ask(id_, tenant, ref, list(inputs), options, remaining_s, needs_labels))
                connection.send(self._counts() + ask if self._waiting_counts else ask)
                return await answer
        except asyncio.CancelledError:
            connection.send(frame(Cancel(id_)))
            raise
        except TimeoutError as error:
            connection.send(frame(Cancel(id_)))
            raise DeadlineExceeded("the deadline passed before the answer was ready") from error
        finally:
            del self._pending[id_]

    def labels_of(self, tenant: str, ref: ModelRef) -> Asked:
        """What `count_request` takes as labels: their names are looked up where they are known."""
        return Asked(tenant, ref)

    def count_request(self, labels: Asked | tuple[str, ...], *, status: int, seconds: float) -> None:
        """As `ServingMetrics.count_request`, a moment later. While the connection takes none, the latest are kept."""
        self._waiting_counts.append(Count(labels if isinstance(labels, Asked) else None, status, seconds))
        if self._flush_timer is None:
            self._flush_timer = asyncio.get_running_loop().call_later(COUNT_WITHIN_S, self.flush)

    def flush(self) -> None:
        """Sends what is counted and not yet told."""
        if self._flush_timer is not None:
            self._flush_timer.cancel()
            self._flush_timer = None
        if self._connection is not None and self._connection.is_writable and self._waiting_counts:
            self._connection.send(self._counts())

    def _counts(self) -> bytes:
        found = b"".join(map(frame, self._waiting_counts))
        self._waiting_counts.clear()
        return found

    def _opened(self, connection: FrameConnection) -> None:
        self._connection = connection
        self._open.set()
        self.flush()

    def _closed(self) -> None:
        self._connection = None
        for answer in self._pending.values():
            if not answer.done():
                answer.set_exception(unreachable())

    def _take(self, message: Answered | Failed) -> None:
        answer: asyncio.Future[Any] | None = self._pending.get(message.id)
        if answer is None or answer.done():
            return  # its client has gone
        if isinstance(message, Answered):
            answer.set_result(message.result)
        else:
            answer.set_exception(error_of(message))
