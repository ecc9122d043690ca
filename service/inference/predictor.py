"""The life of one request: lease → admit → tokenise → queue → answers. Everything taken is given back at the end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from model_registry.refs import ModelRef
from modeling.heads import normalized, softmax
from modeling.preprocess import TextInput
from modeling.weights import FloatArray
from service.inference.admission import AdmissionController
from service.inference.batching import EntryResult, QueueEntry
from service.inference.errors import BatchTooLarge, DeadlineExceeded, EmptyInput, NotPredictable, QueueFull
from service.inference.model_pool import ModelPool
from service.inference.served import ServedModel
from service.metrics import ServingMetrics


@dataclass(frozen=True, slots=True)
class PredictOptions:
    """`top_k` bounds the scores returned; below `threshold` the model abstains; embeddings only if asked for."""

    top_k: int | None = None
    threshold: float | None = None
    truncate: bool = True
    max_length: int | None = None
    return_embedding: bool = False


@dataclass(frozen=True, slots=True)
class Prediction:
    """`label` is None where the model abstains or has no labels. `scores` stand best first."""

    label: str | None
    score: float | None
    scores: list[tuple[str, float]]
    embedding: FloatArray | None


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds, the longest over the request's inputs."""

    queue: float
    tokenize: float
    inference: float
    total: float


@dataclass(frozen=True, slots=True)
class PredictResult:
    model: str
    version: int | None
    task: str
    predictions: list[Prediction]
    input_tokens: int
    engine: str
    batch_rows: int
    timings: Timings


class Predictor:
    def __init__(
        self, pool: ModelPool, admission: AdmissionController, metrics: ServingMetrics, *, max_inputs: int,
        tokenizer_threads: int,
    ) -> None:  # fmt: skip
        self._pool, self._admission, self._metrics = pool, admission, metrics
        self._max_inputs = max_inputs
        self._tokenizers = ThreadPoolExecutor(tokenizer_threads, thread_name_prefix="tokenizer")

    def close(self) -> None:
        self._tokenizers.shutdown(wait=True, cancel_futures=True)

    async def predict(
        self, tenant: str, ref: ModelRef, inputs: Sequence[TextInput], options: PredictOptions, *, deadline: float,
        needs_labels: bool = True,
    ) -> PredictResult:  # fmt: skip
        """Answers for `inputs`, in their order. `deadline` is in `time.monotonic` seconds.

        Raises `ModelNotFound`, `ModelNotReady`, `EmptyInput`, `BatchTooLarge`, `QueueFull`, `InputTooLong`,
        `DeadlineExceeded`, `NotPredictable`, `InferenceFailed`.
        """
        started = time.monotonic()
        check_inputs(inputs, self._max_inputs)
        with self._pool.lease(tenant, ref) as model:
            labels = model.metric_labels
            if needs_labels and not model.labels and not options.return_embedding:
                raise NotPredictable(
                    f"{model.name} is a backbone without labels; set parameters.return_embedding or use /v1/embeddings"
                )
            wait_s = model.lane.batcher.predicted_wait_s()
            with self._metrics.requests_in_progress.labels(*labels).track_inprogress():
                try:
                    with self._admission.reserve(len(inputs), predicted_wait_s=wait_s):
                        return await self._run(model, inputs, options, started, deadline)
                except QueueFull as error:
                    self._metrics.rejected_total.labels(*labels, error.reason).inc()
                    raise
                except DeadlineExceeded:
                    self._metrics.rejected_total.labels(*labels, "deadline").inc()
                    raise

    async def _run(
        self, model: ServedModel, inputs: Sequence[TextInput], options: PredictOptions, started: float, deadline: float
    ) -> PredictResult:
        work = await self._tokenize(model, inputs, options)
        tokenized = time.monotonic()
        self._metrics.tokenize_duration_seconds.labels(*model.metric_labels).observe(tokenized - started)
        entries = self._enqueue(model, work, deadline)
        results = await self._collect(entries, deadline)
        predictions = [answer(model, result, options) for result in results]
        confidence = self._metrics.prediction_confidence.labels(*model.metric_labels)
        for prediction in predictions:
            if prediction.scores:
                confidence.observe(prediction.scores[0][1])
        ended = time.monotonic()
        return PredictResult(
            model=model.name,
            version=model.version,
            task=model.task,
            predictions=predictions,
            input_tokens=sum(item.length for item in work),
            engine=results[0].engine,
            batch_rows=max(result.batch_rows for result in results),
            timings=Timings(
                queue=max(result.queue_s for result in results),
                tokenize=tokenized - started,
                inference=max(result.inference_s for result in results),
                total=ended - started,
            ),
        )

    async def _tokenize(
        self, model: ServedModel, inputs: Sequence[TextInput], options: PredictOptions
    ) -> list[QueueEntry]:
        limits = [limit for limit in (options.max_length, model.max_length) if limit is not None]
        length = min(limits) if limits else None
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._tokenizers, lambda: model.lane.preprocess(inputs, truncate=options.truncate, max_length=length)
        )

    def _enqueue(self, model: ServedModel, work: Sequence[QueueEntry], deadline: float) -> list[QueueEntry]:
        loop = asyncio.get_running_loop()
        entries = [QueueEntry(item, model, deadline, loop.create_future()) for item in work]
        for entry in entries:
            model.lane.batcher.put(entry)
        return entries

    async def _collect(self, entries: Sequence[QueueEntry], deadline: float) -> list[EntryResult]:
        """Waits for all; on the way out nothing stays queued that nobody waits for."""
        futures = [entry.future for entry in entries]
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                return list(await asyncio.gather(*futures))
        except TimeoutError as error:
            raise DeadlineExceeded("the deadline passed before the answer was ready") from error
        finally:
            for future in futures:
                if not future.cancel() and not future.cancelled():
                    future.exception()  # marks it as seen: the first error is the one that is reported


def check_inputs(inputs: Sequence[TextInput], max_inputs: int) -> None:
    if not inputs:
        raise EmptyInput("inputs is empty; give at least one text")
    if len(inputs) > max_inputs:
        raise BatchTooLarge(f"the request has {len(inputs)} inputs, the limit is {max_inputs}; send several requests")
    for index, item in enumerate(inputs):
        parts = (item,) if isinstance(item, str) else item
        if not any(part.strip() for part in parts):
            raise EmptyInput(f"input {index} is empty; leave it out or give it a text")


def answer(model: ServedModel, result: EntryResult, options: PredictOptions) -> Prediction:
    """One row's logits and vector as the caller sees them. Pure."""
    embedding = None
    if options.return_embedding:
        embedding = normalized(result.vector[None])[0] if model.normalize_embedding else result.vector
    if result.logits is None:
        return Prediction(label=None, score=None, scores=[], embedding=embedding)
    probabilities = softmax(result.logits / np.float32(model.temperature))
    order = np.argsort(-probabilities, kind="stable")[: options.top_k]
    scores = [(model.labels[index], float(probabilities[index])) for index in order]
    label, score = scores[0]
    is_unsure = options.threshold is not None and score < options.threshold
    return Prediction(label=None if is_unsure else label, score=score, scores=scores, embedding=embedding)
