"""Does an engine that serves answer as the reference did? The written weights on an exported graph against torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from finetune.evaluation.gates import Gate, parity
from finetune.training.methods.candidate import Candidate, Servable
from finetune.training.run_context import Run, embed
from finetune.training.windows import tagged_by
from modeling.adapters import Adapter
from modeling.backbone import GRAPHS_FOLDER, Backbone
from modeling.engines.build import REFERENCE, EngineOptions, build_engine
from modeling.engines.graphs import GraphFiles, graphs_key
from modeling.engines.onnx import is_available, onnx_engine
from modeling.engines.protocol import Engine
from modeling.errors import ModelingError
from modeling.heads import TaskHead
from modeling.inputs import Example, open_preprocessor
from modeling.tasks import Calibration
from modeling.weights import FloatArray

MOST_ROWS = 1000
_KEY = "parity"


def engine_parity(
    run: Run,
    best: Candidate,
    servable: Servable,
    folder: Path,
    *,
    graphs_root: Path | None,
    answering: Calibration = Calibration(),
) -> Gate:
    """Torch in fp32 against ONNX Runtime in fp32 on up to 1000 test rows; skipped where there is no graph at hand.

    `folder` holds the version's weights as written, with the graph of those that are its own; for the others the
    backbone's export must be in the cache, where a server has put it.
    """
    examples = list(run.test.examples[:MOST_ROWS])
    files = _graphs(run, best, folder, graphs_root)
    reason = _reason_to_skip(best, examples, files)
    if reason is not None:
        return Gate("engine_parity", "skipped", f"skipped: {reason}")
    try:
        return _compared(run, best, servable, examples, folder, files, answering)
    except (ModelingError, OSError) as error:
        return Gate("engine_parity", "failed", f"the graph could not be run: {error}"[:500])


def _reason_to_skip(best: Candidate, examples: Sequence[Example], files: GraphFiles) -> str | None:
    if best.kind == "baseline":
        return "the baseline is served by the code that was evaluated"
    if best.kind not in {"head", "lora", "full"}:
        return f"versions of kind {best.kind} are served by torch"
    if not examples:
        return "there are no rows to compare on"
    if not is_available():
        return "onnxruntime is not installed on this worker"
    if not files.is_complete:
        of_own = "the version was not exported" if best.kind == "full" else "no server has exported this backbone yet"
        return f"{of_own}, so there is no graph to compare with"
    return None


def _graphs(run: Run, best: Candidate, folder: Path, graphs_root: Path | None) -> GraphFiles:
    if best.kind == "full":
        return GraphFiles(folder / "full" / GRAPHS_FOLDER)
    return GraphFiles((graphs_root or Path("/nonexistent")) / graphs_key(run.backbone.info.digest))


def _compared(
    run: Run,
    best: Candidate,
    servable: Servable,
    examples: Sequence[Example],
    folder: Path,
    files: GraphFiles,
    answering: Calibration,
) -> Gate:
    backbone, reference = run.backbone, run.reference.engine
    if best.kind == "full":
        backbone = Backbone.open(folder / "full")
        reference = build_engine(REFERENCE, backbone, None, EngineOptions())
    adapter = Adapter.read(folder / "adapter") if best.kind == "lora" else None
    other = onnx_engine(files, open_preprocessor(backbone).collate, threads=run.plan.cpu_threads)
    assert servable.head is not None
    if run.rules.by_position:
        pair = [_tagged(engine, run, examples, adapter, servable.head) for engine in (reference, other)]
        flips = run.rules.flips(pair[0], pair[1], answering)
        wanted, got = (np.concatenate([one.logits for one in tagged]) for tagged in pair)
    else:
        wanted, got = (_vectors(engine, run, examples, adapter) for engine in (reference, other))
        flips = run.rules.flips(servable.head.logits(wanted), servable.head.logits(got), answering)
    return parity("onnx/fp32", rows=len(examples), flips=flips, least_cosine=least_cosine(wanted, got))


def _tagged(engine: Engine, run: Run, examples: Sequence[Example], adapter: Adapter | None, head: TaskHead) -> Any:
    with _loaded(engine, adapter) as key:
        return tagged_by(engine, head, run.preprocessor, examples, key)


def _vectors(engine: Engine, run: Run, examples: Sequence[Example], adapter: Adapter | None) -> FloatArray:
    with _loaded(engine, adapter) as key:
        return embed(engine, run.preprocessor, examples, adapter=key)


@contextlib.contextmanager
def _loaded(engine: Engine, adapter: Adapter | None) -> Iterator[str | None]:
    """The key under which the engine has the adapter meanwhile."""
    if adapter is None:
        yield None
        return
    engine.load_adapter(_KEY, adapter)
    try:
        yield _KEY
    finally:
        engine.unload_adapter(_KEY)


def least_cosine(one: FloatArray, other: FloatArray) -> float:
    """The smallest cosine between rows of two arrays float32[rows, width]; NaN counts as turned away."""
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    cosines = (one * other).sum(1) / np.maximum(lengths, 1e-12)
    return float(np.nan_to_num(cosines, nan=-1.0).min())
