"""A `Link` that keeps what it is told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class RecordingLink:
    """Events in order, phases among them; never asks to stop."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def event(self, type_: str, message: str, data: Mapping[str, Any] | None = None, *, level: str = "info") -> None:
        self.events.append({"type": type_, "message": message, "data": dict(data or {}), "level": level})

    def phase(self, phase: str) -> None:
        self.event("phase_changed", phase)

    def progress(self, **values: Any) -> None:
        self.event("progress", "", values)

    def set(self, **columns: Any) -> None:
        self.event("set", "", columns)

    def check_cancelled(self) -> None:
        return

    def reserve(self, *, kind: str, method: str) -> int:
        raise AssertionError("nothing is registered here")

    def champion(self) -> dict[str, Any] | None:
        return None

    def succeed(self, *, manifest: Mapping[str, Any], evaluation: Mapping[str, Any], was_cancelled: bool) -> None:
        raise AssertionError("nothing is registered here")

    def of(self, type_: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["type"] == type_]
