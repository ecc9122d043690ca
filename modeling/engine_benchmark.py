"""Measures engines against each other and against the reference.

As `python -m modeling.child_process modeling.engine_benchmark` it takes a request on stdin and runs at low priority, so
that a server goes on answering meanwhile; an engine that crashes or hangs takes nothing down with it. Progress and the
result are JSON lines on stdout; the last line before a crash names the engine that did it. It ends with its parent.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from modeling.backbone import Backbone
from modeling.child_process import private_stdout
from modeling.engines.build import REFERENCE, EngineOptions, EngineSpec, build_engine
from modeling.engines.graphs import GraphFiles
from modeling.engines.protocol import Engine, EngineBatch
from modeling.errors import EngineFailed, ModelingError
from modeling.heads import DenseLayer, TaskHead
from modeling.inputs import MODALITIES, Features, open_preprocessor, single
from modeling.weights import FloatArray

# A candidate this much slower than the fastest on the first batches cannot win: it is not measured further.
HOPELESS = 0.5
EXPORT = "export"
"""What a trial calls itself at work on before it opens the first engine that needs graphs."""
_SCREENING_BATCHES = 8
_SINGLES = 12


@dataclass(frozen=True, slots=True)
class TrialRequest:
    """`candidates` are written `runtime/precision`. Batches hold up to `batch_tokens` padded tokens."""

    backbone: str
    graphs: str
    candidates: tuple[str, ...]
    device: str = "cpu"
    threads: int = 0
    examples: int = 512
    batch_tokens: int = 1024


@dataclass(slots=True)
class EngineReport:
    """What one engine did on this device. Parity is against torch in fp32, on the same examples.

    `flips` is the share of examples on which the probe's answer differs, `max_abs_dp` the largest change of a
    probability. None where it was not measured, and then `error` says why.
    """

    engine: str
    texts_per_s: float | None = None
    single_ms: float | None = None
    rows: int = 0
    flips: float | None = None
    min_cosine: float | None = None
    max_abs_dp: float | None = None
    memory_bytes: int | None = None
    open_s: float | None = None
    error: str | None = None


@dataclass(slots=True)
class _Contender:
    spec: EngineSpec
    engine: Engine
    report: EngineReport
    seconds: list[float] = field(default_factory=list)
    vectors: list[FloatArray] = field(default_factory=list)


def run_trial(request: TrialRequest, say: Callable[[dict[str, Any]], None]) -> list[EngineReport]:
    """Exports what is missing, opens every candidate and lets them take turns on the same batches."""
    backbone = Backbone.open(Path(request.backbone))
    contenders, reports = _open(backbone, _graphs(backbone, request, say), request, say)
    examples, topics = MODALITIES[backbone.info.modality].probe_set(request.examples)
    batches, order = _batches(single(open_preprocessor(backbone).encode(examples)), request.batch_tokens)
    for number, batch in enumerate(batches):
        if number == _SCREENING_BATCHES:
            _drop_hopeless(contenders)
        for contender in _turn(contenders, number):
            say({"engine": str(contender.spec), "stage": "measure"})
            _measure(contender, batch)
    reference = next(item for item in contenders if item.spec == REFERENCE)
    head = probe(np.concatenate(reference.vectors), [topics[row] for row in order])
    for contender in contenders:
        if contender.report.error is None:
            _judge(contender, reference, head, batches)
    return reports


def _graphs(
    backbone: Backbone, request: TrialRequest, say: Callable[[dict[str, Any]], None]
) -> GraphFiles | EngineFailed | None:
    """The exported graphs, or why there are none; None if no candidate needs any. Raises `OSError`: a disk that is full
    says nothing of the backbone."""
    if not any(EngineSpec.parse(name).needs_graphs for name in request.candidates):
        return None
    from modeling.export import export_graphs

    say({"engine": EXPORT, "stage": "export"})
    try:
        return export_graphs(backbone, Path(request.graphs))
    except OSError:
        raise
    except Exception as error:  # torch's exporter raises whatever its stages raise, and messages that hold paths
        return EngineFailed(f"{backbone.info.model_type} could not be exported ({_causes(error)})")


def _causes(error: BaseException) -> str:
    cause = error.__cause__
    return type(error).__name__ + ("" if cause is None else f" from {_causes(cause)}")


def _open(
    backbone: Backbone,
    files: GraphFiles | EngineFailed | None,
    request: TrialRequest,
    say: Callable[[dict[str, Any]], None],
) -> tuple[list[_Contender], list[EngineReport]]:
    options = EngineOptions(device=request.device, threads=request.threads, compiles=True)
    contenders, reports = [], []
    for spec in dict.fromkeys([REFERENCE, *map(EngineSpec.parse, request.candidates)]):
        say({"engine": str(spec), "stage": "open"})
        report = EngineReport(str(spec))
        reports.append(report)
        started = time.perf_counter()
        try:
            if isinstance(files, EngineFailed) and spec.needs_graphs:
                raise files
            graphs = None if isinstance(files, EngineFailed) else files
            engine = build_engine(spec, backbone, graphs, options)
        except ModelingError as error:
            report.error = str(error)[:300]
            continue
        report.open_s = round(time.perf_counter() - started, 3)
        report.memory_bytes = engine.memory().weights
        contenders.append(_Contender(spec, engine, report))
    return contenders, reports


def _batches(rows: Sequence[Features], batch_tokens: int) -> tuple[list[list[Features]], list[int]]:
    """Rows of like length together, as a server's queue would form them; and the rows' numbers in that order."""
    order = sorted(range(len(rows)), key=lambda row: rows[row].cost)
    batches: list[list[Features]] = []
    for row in order:
        item = rows[row]
        if not batches or item.cost * (len(batches[-1]) + 1) > batch_tokens:
            batches.append([])
        batches[-1].append(item)
    # Short and long alternate in time, so that a candidate is screened on both.
    numbers = _spread(len(batches))
    starts = np.cumsum([0, *(len(batch) for batch in batches)])
    spread = [row for number in numbers for row in order[starts[number] : starts[number + 1]]]
    return [batches[number] for number in numbers], spread


def _spread(count: int) -> list[int]:
    """0 … count-1 in strides, so that any first part covers the whole range."""
    stride = max(1, count // _SCREENING_BATCHES)
    return [number for start in range(stride) for number in range(start, count, stride)]


def _turn(contenders: Sequence[_Contender], number: int) -> list[_Contender]:
    """Everybody who has not failed, each time another one first: what disturbs the machine disturbs all alike."""
    alive = [contender for contender in contenders if contender.report.error is None]
    start = number % max(1, len(alive))
    return [*alive[start:], *alive[:start]]


def _measure(contender: _Contender, batch: Sequence[Features]) -> None:
    """The better of two runs: the first of a new shape prepares kernels, which a long-running server pays once."""
    try:
        seconds = []
        for _ in range(2):
            started = time.perf_counter()
            vectors = contender.engine.run(EngineBatch(batch)).pooled
            seconds.append(time.perf_counter() - started)
    except ModelingError as error:
        contender.report.error = str(error)[:300]
        return
    if not np.isfinite(vectors).all():
        contender.report.error = "the vectors are not finite"
        return
    contender.seconds.append(min(seconds))
    contender.vectors.append(vectors)


def _drop_hopeless(contenders: Sequence[_Contender]) -> None:
    alive = [contender for contender in contenders if contender.report.error is None]
    best = min(sum(contender.seconds) for contender in alive)
    for contender in alive:
        share = best / sum(contender.seconds)
        if share < HOPELESS and contender.spec != REFERENCE:
            contender.report.texts_per_s = round(sum(map(len, contender.vectors)) / sum(contender.seconds), 1)
            contender.report.error = f"not measured further: {share:.2f} times the speed of the fastest"


def _judge(contender: _Contender, reference: _Contender, head: Any, batches: Sequence[Sequence[Features]]) -> None:
    report = contender.report
    ours, theirs = np.concatenate(contender.vectors), np.concatenate(reference.vectors)
    report.rows = len(ours)
    report.texts_per_s = round(len(ours) / sum(contender.seconds), 1)
    cosines = (ours * theirs).sum(1) / (np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1))
    p, q = (head.probabilities(head.logits(vectors)) for vectors in (ours, theirs))
    report.min_cosine = float(cosines.min())
    report.flips = float((p.argmax(1) != q.argmax(1)).mean())
    report.max_abs_dp = float(np.abs(p - q).max())
    singles = []
    for number in range(_SINGLES):
        alone = EngineBatch(batches[number % len(batches)][:1])
        contender.engine.run(alone)  # prepares the kernels of this shape
        started = time.perf_counter()
        contender.engine.run(alone)
        singles.append(time.perf_counter() - started)
    report.single_ms = round(statistics.median(singles) * 1000, 2)


def probe(vectors: FloatArray, topics: list[int], *, ridge: float = 1e-2) -> TaskHead:
    """Fit a linear head float32[topics, hidden] by ridge regression of the topics on standardised vectors. It is like
    the heads to come, and how many of its answers change is what users would see."""
    mean, scale = vectors.mean(0), vectors.std(0) + 1e-6
    x = (vectors - mean) / scale
    x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    y = np.eye(max(topics) + 1)[topics]
    solved = np.linalg.solve(x.T @ x + ridge * len(x) * np.eye(x.shape[1]), x.T @ y)
    weight, bias = solved[:-1] / scale[:, None], solved[-1]
    # Regression gives shares from 0 to 1; ten times that are logits as confident as a trained head's.
    weight, bias = weight * 10, (bias - mean @ weight) * 10
    return TaskHead((DenseLayer(weight.T.astype(np.float32), bias.astype(np.float32)),))


def main() -> None:
    request = TrialRequest(**json.loads(sys.stdin.readline()))
    out = private_stdout()

    def say(line: dict[str, Any]) -> None:
        out.write(json.dumps(line) + "\n")
        out.flush()

    reports = run_trial(request, say)
    say({"reports": [asdict(report) for report in reports]})


if __name__ == "__main__":
    main()
