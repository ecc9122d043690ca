"""Finds the engine to serve a backbone on: remembered for this device, or measured in a process of its own.

`engine_choice` decides, `modeling.engine_benchmark` measures; here is what runs, waits, remembers and falls back.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from model_registry.engine_reports import EngineMeasurement, EngineReports
from model_registry.errors import DatabaseUnavailable
from model_registry.spare_time import take_spare_time_only
from modeling.backbone import GRAPHS_FOLDER, Backbone
from modeling.engine_benchmark import EXPORT, EngineReport, TrialRequest
from modeling.engines.build import (
    CAPTURED,
    COMPILED,
    REFERENCE,
    TENSORRT,
    EngineOptions,
    EngineSpec,
    build_engine,
    candidates,
)
from modeling.engines.device import fingerprint
from modeling.engines.graphs import GraphFiles, graphs_key
from modeling.engines.protocol import Engine
from modeling.errors import EngineFailed, ModelingError
from service.inference.engine_choice import MIN_GAIN, EngineChoice, ParityBound, choose

_log = logging.getLogger("service.engine_selection")
_LINE_BYTES = 1 << 20
_SPEEDS = ("texts_per_s", "single_ms")
_TURN_S, _SHARE = 0.02, 0.1


@dataclass(frozen=True, slots=True)
class SelectionPolicy:
    """`engine` is auto or a runtime; `precision` auto or one. A trial that says nothing for `stall_s` is ended."""

    engine: str = "auto"
    precision: str = "auto"
    allow_int8: bool = False
    allow_compile: bool = False
    allow_cuda_graphs: bool = False
    allow_tensorrt: bool = False
    stall_s: float = 600.0
    examples: int = 512
    batch_tokens: int = 1024
    bound: ParityBound = field(default_factory=ParityBound)

    @property
    def is_reference_only(self) -> bool:
        return self.engine == "torch" and self.precision in {"auto", "fp32"} and not self.allow_compile

    def admits(self, spec: EngineSpec) -> bool:
        runtime = {COMPILED: "torch", CAPTURED: "onnx"}.get(spec.runtime, spec.runtime)
        return self.engine in {"auto", runtime} and self.precision in {"auto", spec.precision}


class EngineSelector:
    """One per process. `open…` block and belong on a loader thread; `select` is for the event loop."""

    def __init__(
        self,
        policy: SelectionPolicy,
        options: EngineOptions,
        cache: Path,
        reports: EngineReports | None,
        *,
        on_fallback: Callable[[str, EngineSpec, Exception], None] = lambda backbone, engine, error: None,
    ) -> None:
        """`on_fallback` hears of a remembered engine that does not open, on the thread that tried."""
        self.policy, self._options, self._cache, self._reports = policy, options, cache, reports
        self._on_fallback = on_fallback
        self._device = fingerprint(options.device)
        self._one_trial = asyncio.Lock()
        self.known: dict[str, EngineMeasurement] = {}
        """What this process chose by, whether measured or remembered; by digest."""

    def open(self, spec: EngineSpec, backbone: Backbone) -> Engine:
        """Raises `EngineFailed`."""
        return build_engine(spec, backbone, self._graphs(backbone), self._options)

    def open_first(self, backbone: Backbone, *, like: Backbone | None = None) -> tuple[Engine, bool]:
        """The engine to start with, and whether it is the final one: what was chosen earlier, else what was chosen for
        weights of the same shape where its graphs are there already, else the reference."""
        remembered = self._remembered(backbone)
        likely = remembered or (None if like is None else self._remembered(like))
        if likely is not None and (remembered is not None or self._has_what_it_needs(likely, backbone)):
            try:
                return self.open(EngineSpec.parse(likely.chosen), backbone), remembered is not None
            except ModelingError as error:
                _log.warning(
                    f"{likely.chosen} was chosen earlier but does not open: {error}",
                    extra={"action": "engine_fallback"},
                )
                self._on_fallback(backbone.info.name, EngineSpec.parse(likely.chosen), error)
                self.known.pop(backbone.info.digest, None)
                self._graphs(backbone).discard()  # they may be damaged
        return self.open(REFERENCE, backbone), self.policy.is_reference_only

    async def select(
        self, backbone: Backbone, *, like: Backbone | None = None, in_demand: Callable[[], bool] = lambda: False
    ) -> EngineChoice:
        """Measures and remembers. With `like`, weights of the same shape, only what serves there is tried, at their
        speed and in little of the processor's time while requests are `in_demand`.

        Raises `EngineFailed` where no measurement came about.
        """
        files = await asyncio.to_thread(self._graphs, backbone)
        async with self._one_trial:
            measured = None if like is None else await asyncio.to_thread(self._remembered, like)
            names = await asyncio.to_thread(self._candidates, measured)
            reports = await measure(
                TrialRequest(
                    backbone=str(backbone.folder),
                    graphs=str(files.folder),
                    candidates=tuple(names),
                    device=self._options.device,
                    threads=self._options.threads,
                    examples=self.policy.examples,
                    batch_tokens=self.policy.batch_tokens,
                ),
                stall_s=self.policy.stall_s,
                in_demand=None if measured is None else in_demand,  # what serves is good enough to wait for its proof
            )
        # A trial that pauses cannot tell how fast an engine is.
        known = [] if measured is None else measured.engines
        speeds = {row["engine"]: {name: row[name] for name in _SPEEDS} for row in known}
        rows = [asdict(report) | speeds.get(report.engine, {}) for report in reports]
        least = MIN_GAIN if self.policy.engine == "auto" else 0.0  # asked for by name, it serves if it is equal
        choice = choose(rows, reference=str(REFERENCE), bound=self.policy.bound, least_gain=least)
        await asyncio.to_thread(self._remember, backbone, choice, rows)
        return choice

    def measurements(self, digests: Sequence[str]) -> list[EngineMeasurement]:
        """Of all devices. Raises `DatabaseUnavailable`."""
        return [] if self._reports is None else self._reports.of(digests)

    def _candidates(self, like: EngineMeasurement | None) -> list[str]:
        policy = self.policy
        found = candidates(
            self._options.device,
            allow_int8=policy.allow_int8 or policy.precision == "int8",
            allow_compile=policy.allow_compile,
            allow_cuda_graphs=policy.allow_cuda_graphs,
            allow_tensorrt=policy.allow_tensorrt or policy.engine == TENSORRT,
        )
        admitted = [str(spec) for spec in found if policy.admits(spec)]
        return [name for name in admitted if like is None or name == like.chosen]

    def _graphs(self, backbone: Backbone) -> GraphFiles:
        """In the cache; a version that brings its export is not exported here again."""
        files = GraphFiles(self._cache / graphs_key(backbone.info.digest))
        brought = GraphFiles(backbone.folder / GRAPHS_FOLDER)
        if not files.description.is_file() and brought.is_complete:
            try:
                files.adopt(brought)
            except OSError as error:  # then it is exported, as if it had not come with one
                _log.warning(f"the export of {backbone.info.name} was not taken over: {error}")
        return files

    def _has_what_it_needs(self, found: EngineMeasurement, backbone: Backbone) -> bool:
        return not EngineSpec.parse(found.chosen).needs_graphs or self._graphs(backbone).description.is_file()

    def _device_key(self) -> str:
        policy = {
            "engine": self.policy.engine,
            "precision": self.policy.precision,
            "int8": self.policy.allow_int8,
            "compile": self.policy.allow_compile,
            "graphs": self.policy.allow_cuda_graphs,
            "tensorrt": self.policy.allow_tensorrt,
        }
        values = [self._device.key, policy, self._options.threads, self.policy.batch_tokens, asdict(self.policy.bound)]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def _remembered(self, backbone: Backbone) -> EngineMeasurement | None:
        if self._reports is None or self.policy.is_reference_only:
            return None
        try:
            found = self._reports.get(backbone.info.digest, self._device_key())
        except DatabaseUnavailable:
            return None
        if found is None:
            return None
        if not self._has_what_it_needs(found, backbone):
            return None
        self.known[backbone.info.digest] = found
        return found

    def _remember(self, backbone: Backbone, choice: EngineChoice, rows: list[dict[str, Any]]) -> None:
        engines = [row | {"refused": choice.refused.get(row["engine"])} for row in rows]
        measurement = EngineMeasurement(
            backbone.info.digest, self._device_key(), asdict(self._device), choice.engine, engines
        )
        self.known[backbone.info.digest] = measurement
        if self._reports is None:
            return
        try:
            self._reports.put(measurement)
        except DatabaseUnavailable as error:
            _log.warning(f"the measurement could not be kept: {error}", extra={"action": "engine_report_lost"})


async def measure(
    request: TrialRequest,
    *,
    stall_s: float,
    in_demand: Callable[[], bool] | None = None,
    command: Sequence[str] = (sys.executable, "-m", "modeling.child_process", "modeling.engine_benchmark"),
) -> list[EngineReport]:
    """Runs the trial; an engine that takes the process down, or hangs, is left out of the next try. With
    `in_demand` it is patient: it takes only spare time, and a tenth of that while requests are in demand.

    Raises `EngineFailed` where the reference itself fails.
    """
    lost: list[EngineReport] = []
    while True:
        left = tuple(name for name in request.candidates if name not in {report.engine for report in lost})
        reports, culprit, reason = await _attempt(replace(request, candidates=left), stall_s, in_demand, command)
        if reports is not None:
            return [*reports, *lost]
        if culprit == EXPORT:
            without = [name for name in left if EngineSpec.parse(name).needs_graphs]
            lost += [EngineReport(name, error=f"{reason} during the export") for name in without]
            continue
        if culprit not in left or culprit == str(REFERENCE):
            raise EngineFailed(f"engines could not be measured: {reason} during {culprit or 'the start'}")
        lost.append(EngineReport(culprit, error=f"{reason} while it was measured"))


async def _attempt(
    request: TrialRequest, stall_s: float, in_demand: Callable[[], bool] | None, command: Sequence[str]
) -> tuple[list[EngineReport] | None, str | None, str]:
    """The reports; or None, which engine ran last and what happened to it."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=_LINE_BYTES,
    )
    assert process.stdin is not None and process.stdout is not None
    culprit: str | None = None
    pace = _Pace(process, in_demand)
    silence = asyncio.create_task(pace.until_silent(stall_s))
    try:
        process.stdin.write(json.dumps(asdict(request)).encode() + b"\n")
        while True:
            reading = asyncio.create_task(process.stdout.readline())
            await asyncio.wait((reading, silence), return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                reading.cancel()
                return None, culprit, f"no sign of life for {stall_s:.0f} s"
            line = reading.result()
            if not line:
                return None, culprit, f"the process ended with status {await process.wait()}"
            pace.heard()
            message = json.loads(line)
            if "reports" in message:
                return [EngineReport(**report) for report in message["reports"]], None, ""
            culprit = message.get("engine")
    finally:
        silence.cancel()
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        process._transport.close()  # type: ignore[attr-defined]  # the pipes, without waiting for what is in them
        await asyncio.sleep(0)  # they end in the loop's next turn


class _Pace:
    """With `in_demand`, a process takes only spare time, and a tenth of that while requests are in demand: priority
    alone lets batches take up to half as long again."""

    def __init__(self, process: asyncio.subprocess.Process, in_demand: Callable[[], bool] | None) -> None:
        self._process, self._in_demand = process, in_demand
        self._awake_s, self._may_stop = 0.0, False
        if in_demand is not None:
            take_spare_time_only(process.pid)

    def heard(self) -> None:
        """It has written a line. From the first on the kernel ends it with its parent, also while it is stopped."""
        self._awake_s, self._may_stop = 0.0, sys.platform == "linux"

    async def until_silent(self, stall_s: float) -> None:
        """Returns when it has been awake for `stall_s` without a line."""
        while self._awake_s < stall_s:
            if self._may_stop and self._in_demand is not None and self._in_demand():
                with contextlib.suppress(ProcessLookupError):
                    self._process.send_signal(signal.SIGSTOP)
                    await asyncio.sleep(_TURN_S / _SHARE - _TURN_S)
                    self._process.send_signal(signal.SIGCONT)
            await asyncio.sleep(_TURN_S)
            self._awake_s += _TURN_S
