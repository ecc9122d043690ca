"""Ends what a request waits for from outside: its time is over, or its client has gone.

`asyncio.timeout` and a task that watches would do too, for 4 and 5 µs of every request; these take about one each
(docs/log.md).
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Scope

from service.api.problems import Problem

CONNECTION_LOST = "polyhead.connection_lost"
"""ASGI extension of our server: `{"future": asyncio.Future}`, done once the client's connection is closed."""

Result = TypeVar("Result")


class Interrupt:
    """Called, by a timer or a future, it cancels the task that made it; `is_cause` then claims the cancellation.

    Nests with `asyncio.timeout` and with cancellation by others. A callback that is already scheduled cannot be taken
    back, so `disarm` it when the wait is over.
    """

    __slots__ = ("_before", "_is_armed", "_is_fired", "_task")

    def __init__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._before = task.cancelling()
        self._is_armed = True
        self._is_fired = False

    def __call__(self, *_: object) -> None:
        if self._is_armed:
            self._is_armed, self._is_fired = False, True
            self._task.cancel()

    def disarm(self) -> None:
        self._is_armed = False

    def is_cause(self) -> bool:
        """Whether the `CancelledError` just caught is due to this alone. Ask once, and raise another error if so."""
        return self._is_fired and self._task.uncancel() <= self._before


async def unless_gone(scope: Scope, work: Coroutine[Any, Any, Result]) -> Result:
    """Await `work`, but cancel it when the client disconnects: what no client waits for is not computed.

    Raises 499 once `work` has ended by the cancellation.
    """
    lost: asyncio.Future[None] = scope["extensions"][CONNECTION_LOST]["future"]
    interrupt = Interrupt()
    lost.add_done_callback(interrupt)
    try:
        return await work
    except asyncio.CancelledError:
        if interrupt.is_cause():
            raise Problem(499, "client_closed_request", "the client left") from None
        raise
    finally:
        interrupt.disarm()
        lost.remove_done_callback(interrupt)
