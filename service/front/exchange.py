"""The engine process's side of the frames: each `Ask` becomes a task on the predictor, each `Count` a count."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

from service.api.direct import Inference
from service.api.guard import DrainState
from service.api.measure import NO_MODEL, Counts
from service.api.problems import STATUS_BY_ERROR
from service.front.frames import (
    MAX_ANSWER_BYTES,
    Answered,
    Ask,
    Cancel,
    Count,
    Failed,
    FrameConnection,
    MalformedFrame,
    decode_request,
    failure,
    frame,
)
from service.inference.errors import InferenceFailed

_log = logging.getLogger("service.front")


@asynccontextmanager
async def exchange(
    services: Inference,
    drain: DrainState,
    counts: Counts,
    *,
    path: str,
    max_request_bytes: int,
    max_answer_bytes: int = MAX_ANSWER_BYTES,
) -> AsyncIterator[None]:
    """Answers frames on the Unix socket `path` until the block ends. Requests of frames are in flight for `drain` too.

    Whoever connects is believed, so `path` must lie where only this user can reach it.
    """
    ends: set[_End] = set()

    def accept() -> FrameConnection:
        end = _End(services, drain, counts, max_request_bytes, max_answer_bytes, ends)
        ends.add(end)
        return end

    server = await asyncio.get_running_loop().create_unix_server(accept, path)
    try:
        yield
    finally:
        server.close()
        for end in list(ends):
            end.transport.abort()
        await server.wait_closed()


class _End(FrameConnection):
    """One front end's connection. When it is lost, so is the interest in what it asked."""

    def __init__(
        self,
        services: Inference,
        drain: DrainState,
        counts: Counts,
        max_request_bytes: int,
        max_answer_bytes: int,
        ends: set[_End],
    ) -> None:
        super().__init__(decode_request, max_request_bytes, on_message=self._take, on_lost=self._lost)
        self._services, self._drain, self._counts = services, drain, counts
        self._max_answer_bytes = max_answer_bytes
        self._ends = ends
        self._tasks: dict[int, asyncio.Task[None]] = {}

    # A front end that does not read its answers gets none computed.

    def pause_writing(self) -> None:
        super().pause_writing()
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        self.transport.resume_reading()

    def _take(self, message: Ask | Cancel | Count) -> None:
        if isinstance(message, Ask):
            if message.id in self._tasks:
                raise MalformedFrame(f"the id {message.id} is in use")
            self._drain.enter()
            task = asyncio.get_running_loop().create_task(self._answer(message, time.monotonic() + message.remaining_s))
            self._tasks[message.id] = task
            task.add_done_callback(lambda _: self._ended(message.id))
        elif isinstance(message, Cancel):
            task_or_none = self._tasks.get(message.id)
            if task_or_none is not None:
                task_or_none.cancel()
        else:
            asked = message.asked
            labels = NO_MODEL if asked is None else self._services.pool.labels_of(asked.tenant, asked.ref)
            self._counts.count_request(labels, status=message.status, seconds=message.seconds)

    def _ended(self, id_: int) -> None:
        del self._tasks[id_]
        self._drain.leave()

    def _lost(self, fault: MalformedFrame | None) -> None:
        self._ends.discard(self)
        if fault is not None:
            _log.error("a front end's connection was closed: %s", fault)
        for task in self._tasks.values():
            task.cancel()

    async def _answer(self, ask: Ask, deadline: float) -> None:
        services, asked = self._services, ask.options
        options = services.make_options(
            asked.top_k, asked.threshold, asked.truncate, asked.max_length, asked.return_embedding
        )
        try:
            result: Any = await services.predictor.predict(
                ask.tenant, ask.ref, ask.inputs, options, deadline=deadline, needs_labels=ask.needs_labels
            )
            answer = frame(Answered(ask.id, result))
            if len(answer) > self._max_answer_bytes:
                raise InferenceFailed("the answer is too large; ask for fewer inputs, or for fewer scores with top_k")
        except Exception as error:
            answer = frame(_failed(ask.id, error))
        self.send(answer)


def _failed(id_: int, error: Exception) -> Failed:
    if not any(cls in STATUS_BY_ERROR for cls in type(error).__mro__):
        fault = os.urandom(8).hex()  # the front end logs it beside the request's id
        _log.error("unexpected error of a prediction, fault %s", fault, exc_info=cast(Any, error))
        return Failed(id_, message=fault)
    return failure(id_, error)
