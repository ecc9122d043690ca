"""The `Link` of a training process: JSON over its standard pipes, one object a line, in both directions.

Downwards go cancel requests and answers; upwards events, questions and the result.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Mapping
from typing import IO, Any

from finetune.jobs.failures import Cancelled, Stopped
from finetune.jobs.link import finite
from finetune.jobs.records import EventType, JobPhase


class PipeLink:
    """A `Link` over two pipes. A thread reads, so that a cancel is seen in the middle of a step."""

    def __init__(self, source: IO[str], sink: IO[str], *, progress_every_s: float = 0.5) -> None:
        self._sink = sink
        self._lock = threading.Lock()
        self._answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._end: Cancelled | Stopped | None = None
        self._progress_every_s = progress_every_s
        self._last_progress = 0.0
        threading.Thread(target=self._read, args=(source,), daemon=True, name="supervisor-link").start()

    def event(
        self, type_: EventType, message: str, data: Mapping[str, Any] | None = None, *, level: str = "info"
    ) -> None:
        self._send({"kind": "event", "type": type_, "message": message, "data": dict(data or {}), "level": level})

    def phase(self, phase: JobPhase) -> None:
        self._send({"kind": "phase", "phase": phase})

    def progress(self, **values: Any) -> None:
        now = time.monotonic()
        is_last = values.get("step") is not None and values["step"] == values.get("total_steps")
        if is_last or now - self._last_progress >= self._progress_every_s:
            self._last_progress = now
            self._send({"kind": "progress", "values": values})

    def set(self, **columns: Any) -> None:
        self._send({"kind": "set", "columns": columns})

    def check_cancelled(self) -> None:
        if self._end is not None:
            raise self._end

    def reserve(self, *, kind: str, method: str) -> int:
        return int(self._asked({"kind": "reserve", "version_kind": kind, "method": method})["version"])

    def champion(self) -> dict[str, Any] | None:
        found: dict[str, Any] | None = self._asked({"kind": "champion"})["champion"]
        return found

    def succeed(self, *, manifest: Mapping[str, Any], evaluation: Mapping[str, Any], was_cancelled: bool) -> None:
        self._send(
            {
                "kind": "succeeded",
                "manifest": dict(manifest),
                "evaluation": dict(evaluation),
                "was_cancelled": was_cancelled,
            }
        )

    def fail(self, failure: Mapping[str, Any]) -> None:
        self._send({"kind": "failed", "failure": dict(failure)})

    def cancelled(self) -> None:
        self._send({"kind": "cancelled"})

    def stopped(self) -> None:
        self._send({"kind": "stopped"})

    def _asked(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The supervisor's answer, which takes as long as the database is away. Raises `Stopped` if it is gone."""
        self._send(message)
        answer = self._answers.get()
        if answer is None:
            raise Stopped
        return answer

    def _send(self, message: Mapping[str, Any]) -> None:
        line = json.dumps(finite(message), allow_nan=False)
        with self._lock:
            self._sink.write(line + "\n")
            self._sink.flush()

    def _read(self, source: IO[str]) -> None:
        for line in source:
            message = json.loads(line)
            if message["kind"] == "cancel":
                self._end = Cancelled(keep_best=message["keep_best"])
            elif message["kind"] == "stop":
                self._end = Stopped()
            else:
                self._answers.put(message)
        self._answers.put(None)
