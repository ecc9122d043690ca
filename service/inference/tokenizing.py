"""The stage before the queue: inputs to tokens, off the event loop, a whole burst of requests in one go.

A free thread takes all that has arrived; only what the engine could not begin for long waits a moment for others. While
every thread is busy requests gather, so the busier it is the fewer changes of thread it costs each of them.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any

from modeling.errors import ModelingError
from modeling.preprocess import TextInput
from service.inference.entries import Ticket
from service.inference.errors import InferenceError, InferenceFailed, ModelNotReady
from service.inference.runtime import Runtime

_log = logging.getLogger("service.tokenizing")
# So much at once, some 20 ms of work: a request with long texts does not hold up those behind it for longer.
_MAX_CHARACTERS = 200_000
# Changes of thread cost more than what they are for where each request comes alone.
_PATIENT_S, _GATHER_S = 0.2, 0.02

Encoded = list[tuple[Ticket, list[Any] | Exception]]


class TokenEstimate:
    """Tokens from characters, before tokenising: follows what the lane's tokenizer makes of the texts that come."""

    def __init__(self, characters_per_token: float = 4.0) -> None:
        self._characters_per_token = characters_per_token

    def tokens(self, inputs: Sequence[TextInput], limit: int) -> int:
        """Of all inputs, each at most `limit`."""
        rate = self._characters_per_token
        return sum([min(limit, 2 + int(_characters(item) / rate)) for item in inputs])

    def observe(self, item: TextInput, tokens: int, limit: int) -> None:
        """Follows one tokenised input; one that was cut says nothing."""
        if tokens < limit:
            self._characters_per_token += 0.02 * (max(0.5, _characters(item) / tokens) - self._characters_per_token)


class TokenizerStage:
    """Its own threads in front of all lanes; what they have done is put into the lane's queue."""

    def __init__(self, threads: int, runtime: Runtime) -> None:
        self._executor, self._clock = runtime.tokenizer_threads(threads), runtime.clock
        self._free = threads
        self._waiting: deque[Ticket] = deque()
        self._flushing: asyncio.Handle | None = None
        self._is_patient = False

    def close(self) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)

    def submit(self, ticket: Ticket) -> None:
        """Later, the ticket has its entries or its error. Those submitted in one turn of the loop go together; those
        that will wait long for the engine gather for a moment."""
        self._waiting.append(ticket)
        is_patient = ticket.forecast_s > _PATIENT_S
        if self._flushing is not None and self._is_patient and not is_patient:
            self._flushing.cancel()
            self._flushing = None
        if self._free and self._flushing is None:
            loop, self._is_patient = asyncio.get_running_loop(), is_patient
            self._flushing = loop.call_later(_GATHER_S, self._flush) if is_patient else loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = None
        while self._free and (burst := self._next_burst()):
            try:
                encoding = asyncio.get_running_loop().run_in_executor(self._executor, _encode_burst, burst)
            except RuntimeError:  # closed
                _fail(burst, ModelNotReady("the service is shutting down", retry_after_s=1.0))
                continue
            self._free -= 1
            encoding.add_done_callback(partial(self._encoded, burst))

    def _next_burst(self) -> list[Ticket]:
        burst, characters = [], 0
        while self._waiting and characters < _MAX_CHARACTERS:
            ticket = self._waiting.popleft()
            if not ticket.is_over:
                burst.append(ticket)
                characters += sum(map(_characters, ticket.inputs))
        return burst

    def _encoded(self, burst: Sequence[Ticket], done: asyncio.Future[Encoded]) -> None:
        self._free += 1
        self._flush()
        if done.cancelled():  # closed
            _fail(burst, ModelNotReady("the service is shutting down", retry_after_s=1.0))
            return
        now = self._clock()
        by_lane: dict[Any, list[Ticket]] = {}
        for ticket, works in done.result():
            ticket.tokenized_at = now
            if isinstance(works, Exception):
                ticket.fail(works)
            elif not ticket.is_over:
                entries = ticket.fill(works)
                lane = ticket.model.lane
                lane.token_estimate.observe(ticket.inputs[0], entries[0].length, ticket.max_length)
                by_lane.setdefault(lane, []).append(ticket)
        for lane, tickets in by_lane.items():
            try:
                lane.batcher.put(tickets)
            except ModelNotReady as error:
                _fail(tickets, error)


def _encode_burst(burst: Sequence[Ticket]) -> Encoded:
    """On a tokeniser thread: one call for all requests that share a lane and their limits."""
    groups: dict[Any, list[Ticket]] = {}
    for ticket in burst:
        groups.setdefault((ticket.model.lane, ticket.truncate, ticket.max_length), []).append(ticket)
    return [pair for group in groups.values() for pair in _encode(group)]


def _encode(group: Sequence[Ticket]) -> Encoded:
    first = group[0]
    inputs = [item for ticket in group for item in ticket.inputs]
    try:
        works = first.model.lane.preprocess(inputs, truncate=first.truncate, max_length=first.max_length)
    except Exception as error:
        if len(group) > 1:  # whose fault it is shows when each is alone
            return [pair for ticket in group for pair in _encode([ticket])]
        if not isinstance(error, ModelingError | InferenceError):
            _log.exception("tokenising failed", extra={"action": "tokenizing_failed"})
            error = InferenceFailed("the input could not be tokenised")
        return [(first, error)]
    encoded: Encoded = []
    start = 0
    for ticket in group:
        encoded.append((ticket, works[start : start + len(ticket.inputs)]))
        start += len(ticket.inputs)
    return encoded


def _fail(tickets: Sequence[Ticket], error: Exception) -> None:
    for ticket in tickets:
        ticket.fail(error)


def _characters(item: TextInput) -> int:
    return len(item) if isinstance(item, str) else sum(map(len, item))
