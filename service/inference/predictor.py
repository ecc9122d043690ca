"""The life of one request: lease → admit → preprocess → queue → answers. Everything taken is given back at the end.

All the way it is one `Ticket` and one future: stages pass the ticket on, and its caller wakes once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from modeling.heads import normalized
from modeling.inputs import MODALITIES, Example
from modeling.tasks import Answer, Options, RowOutput, Task
from modeling.weights import FloatArray
from service.inference.capacity import AdmissionController
from service.inference.engine_worker import Runtime
from service.inference.errors import (
    BatchTooLarge,
    DeadlineExceeded,
    EmptyInput,
    ModelNotReady,
    NotPredictable,
    ParameterUnfit,
    QueueFull,
)
from service.inference.lanes import Lane, ServedModel
from service.inference.preprocessing import PreprocessorStage
from service.inference.queue import QueueEntry, Ticket
from service.metrics import ModelSeries, ServingMetrics
from service.threads import on_answers

_ON_LOOP = 2_048  # places of a text that are decoded within some milliseconds


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds, the longest over the request's inputs."""

    queue: float
    preprocess: float
    inference: float
    total: float


@dataclass(frozen=True, slots=True)
class PredictResult:
    model: str
    version: int | None
    task: str
    answers: list[Answer]
    """One per input, as the model's task makes them; `index` is left to the caller."""
    vectors: list[FloatArray]
    """The backbone's vectors float32[hidden], one per input; empty if the request did not ask for them."""
    input_tokens: int
    engine: str
    batch_rows: int
    timings: Timings


class Predictor:
    def __init__(
        self,
        admission: AdmissionController,
        metrics: ServingMetrics,
        *,
        max_inputs: int,
        preprocessor_threads: int,
        runtime: Runtime = Runtime(),
    ) -> None:
        self._admission, self._metrics = admission, metrics
        self._max_inputs, self._clock = max_inputs, runtime.clock
        self._preprocessors = PreprocessorStage(preprocessor_threads, runtime)

    def close(self) -> None:
        self._preprocessors.close()

    async def predict(
        self,
        model: ServedModel,
        inputs: Sequence[Example],
        options: Options,
        *,
        deadline: float,
        needs_labels: bool = True,
        max_inputs: int | None = None,
    ) -> PredictResult:
        """Returns `model`'s answers for `inputs`, in their order. `deadline` is in `time.monotonic` seconds.

        A request may bring `max_inputs`; more than the usual number are computed in several parts, one after the other,
        by the same version. Raises `ModelNotReady`, `EmptyInput`, `BatchTooLarge`, `QueueFull`, `InputTooLong`,
        `DeadlineExceeded`, `NotPredictable`, `ParameterUnfit`, `InferenceFailed`.
        """
        started = self._clock()
        check_inputs(inputs, max_inputs or self._max_inputs)
        expanded = [model.task.expand(item, options) if model.task.expands else [item] for item in inputs]
        refuse_empty(model.task, expanded)
        with model.lease():
            refuse_unable(model, options, needs_labels=needs_labels)
            check_options(model.task, options)
            series = self._metrics.of_model(model.metric_labels)
            series.in_progress.inc()
            tickets: list[Ticket] = []
            rows_of: list[list[QueueEntry]] = []
            try:
                for first in range(0, len(expanded), self._max_inputs):
                    part = expanded[first : first + self._max_inputs]
                    ticket = await self._computed(model, series, part, options, deadline=deadline)
                    rows_of += by_input(ticket.let_go(), [len(own) for own in part])
                    tickets.append(ticket)
            except QueueFull as error:
                series.rejected[error.reason].inc()
                raise
            except DeadlineExceeded:
                series.rejected["deadline"].inc()
                raise
            finally:
                series.in_progress.dec()
            answers = await _answers(model, rows_of, options, is_late=lambda: self._clock() > deadline)
            for histogram, values in zip(series.answers, model.task.observed(answers, model.calibration), strict=True):
                for value in values:
                    histogram.observe(value)
            vectors = [_embedding(model, rows) for rows in rows_of] if options.return_embedding else []
            series.preprocess_duration.observe(tickets[0].preprocessed_at - started)
            return _result(model, tickets, rows_of, answers, vectors, started=started, ended=self._clock())

    async def _computed(
        self,
        model: ServedModel,
        series: ModelSeries,
        expanded: Sequence[Sequence[Example]],
        options: Options,
        *,
        deadline: float,
    ) -> Ticket:
        """The ticket of some inputs, with all of its entries computed."""
        now = self._clock()
        examples = [example for own in expanded for example in own]
        if options.prompt_name is not None:
            examples = with_prompt(model, examples, options.prompt_name)
        ticket = self._admit(model, series, examples, options, deadline=deadline, now=now)
        try:
            await self._answered(model.lane, ticket, deadline - now)
        finally:
            self._admission.release(len(examples))
        return ticket

    def _admit(
        self,
        model: ServedModel,
        series: ModelSeries,
        examples: Sequence[Example],
        options: Options,
        *,
        deadline: float,
        now: float,
    ) -> Ticket:
        """A place for the request, by an estimate of its tokens, before anything is spent on it."""
        lane = model.lane
        max_length = min(options.max_length or lane.max_length, model.max_length or lane.max_length, lane.max_length)
        ticket = Ticket(
            model,
            series,
            examples,
            deadline,
            asyncio.get_running_loop().create_future(),
            truncate=options.truncate,
            max_length=max_length,
            tokens=lane.estimate(examples, max_length, in_windows=model.task.reads_windows),
        )
        forecast = lane.worker.forecast(ticket.tokens)
        self._admission.admit(len(examples), forecast=forecast, time_left_s=deadline - now)
        try:
            lane.worker.announce(ticket)
        except ModelNotReady:
            self._admission.release(len(examples))
            raise
        return ticket

    async def _answered(self, lane: Lane, ticket: Ticket, time_left_s: float) -> None:
        """Waits for all entries; on every way out, what is left of them leaves the queue."""
        timer = asyncio.get_running_loop().call_later(time_left_s, ticket.expire)
        self._preprocessors.submit(lane, ticket)
        try:
            await ticket.future
        finally:
            timer.cancel()
            lane.worker.withdraw(ticket)
            if not ticket.future.cancel() and not ticket.future.cancelled():
                ticket.future.exception()  # seen, even where the caller was cancelled in the same moment


def check_inputs(inputs: Sequence[Example], max_inputs: int) -> None:
    if not inputs:
        raise EmptyInput("inputs is empty; give at least one")
    if len(inputs) > max_inputs:
        raise BatchTooLarge(f"the request has {len(inputs)} inputs, the limit is {max_inputs}; send several requests")


def refuse_empty(task: Task, expanded: Sequence[Sequence[Example]]) -> None:
    """Raises `EmptyInput` for an input with nothing in it, or in one of the rows that it becomes."""
    is_empty = MODALITIES[task.modality].is_empty
    for index, examples in enumerate(expanded):
        if not examples or any(map(is_empty, examples)):
            raise EmptyInput(f"input {index} is empty; leave it out or give it a {task.modality}")


def refuse_unable(model: ServedModel, options: Options, *, needs_labels: bool) -> None:
    """Raises `NotPredictable` if labels are asked of a backbone, or vectors of a model that has none."""
    if options.return_embedding and not model.has_embedding:
        raise NotPredictable(
            f"{model.name} is a baseline over words and has no embeddings; ask for its labels, or ask a backbone or a "
            "version trained on one"
        )
    if needs_labels and not model.task.has_answers and not options.return_embedding:
        raise NotPredictable(
            f"{model.name} is a backbone without labels; set parameters.return_embedding or use /v1/embeddings"
        )


def check_options(task: Task, options: Options) -> None:
    """Raises `ParameterUnfit` for a parameter that means nothing for the task."""
    for name in ("top_k", "threshold", "aggregation_strategy", "offset_unit"):
        if getattr(options, name) is not None and name not in task.options:
            raise ParameterUnfit(f"{name} means nothing for {task.name}; leave {name} out", parameter=name)


def with_prompt(model: ServedModel, examples: Sequence[Example], name: str) -> list[Example]:
    """The examples behind the prompt of this name. Raises `ParameterUnfit` if the model has none."""
    prompts = model.prompts
    if name not in prompts:
        known = f"its prompts are {', '.join(sorted(prompts))[:300]}" if prompts else "it has no prompts"
        raise ParameterUnfit(
            f"prompt_name: {model.name} has no prompt {name[:140]!r}; {known}", parameter="prompt_name"
        )
    prompted = MODALITIES[model.task.modality].with_prompt
    return [prompted(example, prompts[name]) for example in examples]


async def _answers(
    model: ServedModel, rows_of: Sequence[Sequence[QueueEntry]], options: Options, *, is_late: Callable[[], bool]
) -> list[Answer]:
    """One for each input; those of long texts that are answered place by place, off the event loop, where long ones
    wait for each other. Raises `DeadlineExceeded` if it is late before they have begun."""

    def answered() -> list[Answer]:
        if is_late():
            raise DeadlineExceeded("the deadline passed before the answer was ready")
        return [_answer(model, rows, options) for rows in rows_of]

    if model.task.needs == "states" and sum([_places(row) for rows in rows_of for row in rows]) > _ON_LOOP:
        return await on_answers(answered)
    return [_answer(model, rows, options) for rows in rows_of]


def _places(row: QueueEntry) -> int:
    return 0 if row.scores is None else len(row.scores)


def _answer(model: ServedModel, rows: Sequence[QueueEntry], options: Options) -> Answer:
    outputs = [RowOutput(row.scores, row.work.extra) for row in rows if row.scores is not None]  # a backbone has none
    return model.task.reduce(outputs, model.labels, model.calibration, options)


def _embedding(model: ServedModel, rows: Sequence[QueueEntry]) -> FloatArray:
    """The vector of one input: the mean of its rows'."""
    vectors = [row.vector for row in rows if row.vector is not None]
    vector = vectors[0] if len(vectors) == 1 else np.mean(np.stack(vectors), axis=0)
    return normalized(vector[None])[0] if model.normalize_embedding else vector


def by_input(entries: Sequence[QueueEntry], examples: Sequence[int]) -> list[list[QueueEntry]]:
    """Group rows by the input that they are of; `examples` counts those that each input became."""
    if len(entries) == len(examples):
        return [[entry] for entry in entries]
    input_of = np.repeat(np.arange(len(examples)), examples).tolist()
    groups: list[list[QueueEntry]] = [[] for _ in examples]
    for entry in entries:
        groups[input_of[entry.place]].append(entry)
    return groups


def _result(
    model: ServedModel,
    tickets: Sequence[Ticket],
    rows_of: Sequence[Sequence[QueueEntry]],
    answers: list[Answer],
    vectors: list[FloatArray],
    *,
    started: float,
    ended: float,
) -> PredictResult:
    return PredictResult(
        model=model.name,
        version=model.version,
        task=model.task.name,
        answers=answers,
        vectors=vectors,
        input_tokens=sum([row.length for rows in rows_of for row in rows]),
        engine=tickets[0].engine,
        batch_rows=max([ticket.batch_rows for ticket in tickets]),
        timings=Timings(
            queue=max([ticket.started_at - ticket.enqueued_at for ticket in tickets]),
            preprocess=tickets[0].preprocessed_at - started,
            inference=max([ticket.inference_s for ticket in tickets]),
            total=ended - started,
        ),
    )
