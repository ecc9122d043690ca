"""How far a run is, and how long it still takes: one percent and one estimate over all its stages.

The percent is the share of the time that has passed, by what is known of the time to come. Estimates are corrected by
what was measured: within a stage by its own speed, beyond it by how long the stages before it took. It never falls.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

_MOST_PERCENT = 99.0  # until the version is registered
_LEAST_SHARE = 0.01  # of a stage, from which its own speed counts
_TELLING_SHARE = 0.1  # from which it counts for the stages to come, too
_TELLING_S = 1.0
_FACTORS = (0.1, 10.0)
_BEAT_S = 2.0
_LEAST_LOAD = 0.02  # of a processor: a process that computes nothing is not alive


@dataclass(slots=True)
class Stage:
    """A part of a run and the seconds that it is expected to take. `is_telling`: its speed tells that of others."""

    name: str
    seconds: float
    is_telling: bool = True


@dataclass(slots=True)
class _Current:
    stage: Stage
    begun: float
    first: tuple[float, float] | None = None  # share done and time of the first report, which may be of a resumption
    last: tuple[float, float] | None = None

    def total_s(self) -> float | None:
        """What the whole stage takes by its own speed; None while that is unknown."""
        if self.first is None or self.last is None or self.last[0] - self.first[0] < _LEAST_SHARE:
            return None
        return (self.last[1] - self.first[1]) / (self.last[0] - self.first[0])

    def left_s(self, now: float, factor: float) -> float:
        total = self.total_s()
        if total is not None and self.last is not None:
            return max(0.0, (1 - self.last[0]) * total - (now - self.last[1]))
        # Longer than was expected: a quarter of what it has taken may always be left.
        return max(self.stage.seconds * factor - (now - self.begun), (now - self.begun) / 4)


class Pace:
    """The stages of one run. Thread-safe. `elapsed_s` and `percent` are what earlier attempts came to."""

    def __init__(
        self, *, elapsed_s: float = 0.0, percent: float = 0.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._begun, self._percent = clock() - elapsed_s, percent
        self._ahead: list[Stage] = []
        self._current: _Current | None = None
        self._part = (0.0, 1.0)
        self._factor = 1.0
        self._details: dict[str, Any] = {}
        self.deadline: float | None = None  # of the methods, by the same clock

    def plan(self, stages: Sequence[Stage]) -> None:
        """What the run will do, in order; the last stage is what comes after the methods."""
        with self._lock:
            self._ahead = list(stages)

    def enter(self, name: str, seconds: float | None = None) -> None:
        """A stage begins, and those before it have ended or were left out. `seconds`: a better estimate of it."""
        with self._lock:
            self._factor = self._factor_now()
            names = [stage.name for stage in self._ahead]
            stage = Stage(name, 0.0)
            if name in names:
                stage, self._ahead = self._ahead[names.index(name)], self._ahead[names.index(name) + 1 :]
            if seconds is not None:
                stage.seconds = seconds / (self._factor if stage.is_telling else 1.0)
            self._current, self._details, self._part = _Current(stage, self._clock()), {}, (0.0, 1.0)

    def leave_out(self, name: str) -> None:
        with self._lock:
            self._ahead = [stage for stage in self._ahead if stage.name != name]

    def seconds_of(self, estimate: float) -> float:
        """An estimate, corrected by what was measured in this run."""
        with self._lock:
            return estimate * self._factor_now()

    @contextlib.contextmanager
    def part(self, number: int, of: int) -> Iterator[None]:
        """Inside, what is reported of a stage is of one of its equal parts, counted from 0."""
        before, self._part = self._part, (number / max(1, of), 1 / max(1, of))
        try:
            yield
        finally:
            self._part = before

    def at(self, done: int, total: int, **details: Any) -> dict[str, Any]:
        """Steps or rows that the current stage has behind it, of all; gives what `values` gives."""
        start, size = self._part
        share = start + size * min(1.0, done / max(1, total))
        with self._lock:
            if self._current is not None:
                now = self._clock()
                self._current.first = self._current.first or (share, now)
                if self._current.last is None or share >= self._current.last[0]:
                    self._current.last = (share, now)
            self._details = {"step": done, "total_steps": total, **details}
        return self.values()

    def values(self) -> dict[str, Any]:
        """`percent` and `eta_seconds` of the whole run, and the steps of the stage."""
        with self._lock:
            now = self._clock()
            left = self._left_s(now)
            if left is not None:
                elapsed = now - self._begun
                share = elapsed / max(1e-9, elapsed + left)
                self._percent = max(self._percent, min(_MOST_PERCENT, 100 * share))
            eta = None if left is None else round(left, 1)
            return {"percent": round(self._percent, 1), "eta_seconds": eta, **self._details}

    def _left_s(self, now: float) -> float | None:
        if self._current is None or not (self._ahead or self._current.stage.seconds):
            return None
        factor = self._factor_now()
        current = self._current.left_s(now, self._factor if self._current.stage.is_telling else 1.0)
        *methods, after = [stage.seconds * (factor if stage.is_telling else 1.0) for stage in self._ahead] or [0.0]
        left = current + sum(methods)
        if self.deadline is not None and self._ahead:
            left = min(left, max(0.0, self.deadline - now))
        return left + after

    def _factor_now(self) -> float:
        """How much longer stages take than expected, by the current one if it has come far enough to tell."""
        current = self._current
        if current is None or not current.stage.is_telling or current.stage.seconds <= 0:
            return self._factor
        total = current.total_s()
        if total is None or current.first is None or current.last is None:
            return self._factor
        if current.last[0] - current.first[0] < _TELLING_SHARE or total < _TELLING_S:
            return self._factor
        return min(_FACTORS[1], max(_FACTORS[0], total / current.stage.seconds))


@contextlib.contextmanager
def beating(pace: Pace, tell: Callable[..., None], *, every_s: float = _BEAT_S) -> Iterator[None]:
    """Tells of the pace from a thread of its own while the process computes, also where a long call reports nothing.

    A process that hangs uses no processor time, and is silent.
    """
    ended = threading.Event()

    def beat() -> None:
        used = time.process_time()
        while not ended.wait(every_s):
            before, used = used, time.process_time()
            if used - before >= _LEAST_LOAD * every_s:
                tell(**pace.values())

    thread = threading.Thread(target=beat, daemon=True, name="pace")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
