"""Every metric of the serving process: names, labels and buckets in one file.

Knows prometheus_client and nothing of requests, batches or models: the predictor, the engine worker, the model pool and
the registry watcher each observe into the attributes here, which carry the metric's name without the prefix.

Series of a model exist from `start_model` to `stop_model`, those of an engine from `start_engine` to `stop_engine`, so
that a rate is 0 before the first request instead of missing, and the first failure counts as an increase.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

from prometheus_client import (
    CONTENT_TYPE_PLAIN_0_0_4,
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from modeling.tasks import TASKS

NAMESPACE: Final = "polyhead"

REQUEST_LABELS: Final = ("model", "version", "task", "tenant")
ENGINE_LABELS: Final = ("backbone", "engine")
ModelLabels = tuple[str, str, str, str]
"""Values of `REQUEST_LABELS`."""
ALIAS_LABELS: Final = ("tenant", "model", "alias")

MODEL_STATES: Final = ("loading", "warming", "ready", "draining", "unloading", "failed")
JOB_STATES: Final = (
    "validating_files",
    "queued",
    "running",
    "succeeded",
    "failed",
    "cancelled",
    "cancelling",
    "pausing",
    "paused",
)

# Label values whose series are created at load; any other value creates its own on first use.
REQUEST_CODES: Final = ("200", "422", "429", "500", "503", "504")
MANAGEMENT_CODES: Final = ("200", "500", "503")
METHODS: Final = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})
REJECT_REASONS: Final = ("queue_full", "token_budget", "deadline")
CANCEL_STAGES: Final = ("queued", "running")

DURATION_BUCKETS_S: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30)
MANAGEMENT_BUCKETS_S: Final = (0.005, 0.025, 0.1, 0.5, 1, 2.5, 5, 10, 30, 120)
LOAD_BUCKETS_S: Final = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
BATCH_SIZE_BUCKETS: Final = tuple(2**power for power in range(0, 11))
BATCH_TOKENS_BUCKETS: Final = tuple(2**power for power in range(4, 18))
PADDING_BUCKETS: Final = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1)
CONFIDENCE_BUCKETS: Final = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)
LABEL_COUNT_BUCKETS: Final = (0, 1, 2, 3, 4, 5, 7, 10, 20, 50)
QUANTILE_BUCKETS: Final = (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.999, 1)  # the ends: beyond all seen before


@dataclass(frozen=True, slots=True)
class ModelSeries:
    """The series that a request to one model touches. Looking one up by its labels costs more than what it is for.

    `answers` describe what was answered, one histogram per name in the task's `observes`.
    """

    in_progress: Gauge
    preprocess_duration: Histogram
    answers: tuple[Histogram, ...]
    rejected: Mapping[str, Counter]
    cancelled_queued: Counter
    cancelled_running: Counter


@dataclass(frozen=True, slots=True)
class EngineSeries:
    """The series of one engine and its queue."""

    queue_requests: Gauge
    queue_tokens: Gauge
    queue_duration: Histogram
    inference_duration: Histogram
    batch_size: Histogram
    batch_tokens: Histogram
    padding_ratio: Histogram
    tokens_limit: Gauge
    restarts: Counter

    def follow_queue(self, requests: Callable[[], float], tokens: Callable[[], float]) -> None:
        """Reads both when they are asked for, so that the queue spends nothing on them."""
        self.queue_requests.set_function(requests)
        self.queue_tokens.set_function(tokens)

    def observe(self, *, rows: int, useful: int, padded: int, seconds: float, waits_s: Sequence[float]) -> None:
        """One batch: its tokens without and with padding, and how long each of its rows waited."""
        self.batch_size.observe(rows)
        self.batch_tokens.observe(useful)
        self.padding_ratio.observe(1 - useful / padded)
        self.inference_duration.observe(seconds)
        for wait_s in waits_s:
            self.queue_duration.observe(wait_s)


Metric = TypeVar("Metric", Counter, Gauge, Histogram)


class Declared(Generic[Metric]):
    """A metric of a class, named as its attribute is. Each instance makes its own."""

    def __init__(self, kind: type[Metric], documentation: str, labels: Sequence[str], **options: Any) -> None:
        self._kind: Any = kind
        self._documentation, self._labels, self._options = documentation, labels, options

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: object, owner: type) -> Metric:  # what an instance holds comes before this
        raise AttributeError(f"{owner.__name__} declares {self._name}; its instances have it")

    def made(self, registry: CollectorRegistry) -> Metric:
        metric: Metric = self._kind(
            self._name, self._documentation, self._labels, namespace=NAMESPACE, registry=registry, **self._options
        )
        return metric


def counter(documentation: str, *labels: str) -> Declared[Counter]:
    return Declared(Counter, documentation, labels)


def gauge(documentation: str, *labels: str) -> Declared[Gauge]:
    return Declared(Gauge, documentation, labels)


def histogram(documentation: str, *labels: str, buckets: tuple[float, ...]) -> Declared[Histogram]:
    return Declared(Histogram, documentation, labels, buckets=buckets)


class ServingMetrics:
    """The metrics of one serving process. Thread-safe: observe from the event loop and from engine threads.

    `registry` must not hold process collectors yet; by default a new one is made, so two instances never collide.
    """

    # Requests: model, version, task
    requests_total = counter("Requests answered, by HTTP status code", *REQUEST_LABELS, "code")
    request_duration_seconds = histogram(
        "Time from a request's arrival to its answer",
        *REQUEST_LABELS,
        buckets=DURATION_BUCKETS_S,
    )
    tokenize_duration_seconds = histogram(
        "Time spent turning a request's inputs into tensors",
        *REQUEST_LABELS,
        buckets=DURATION_BUCKETS_S,
    )
    requests_in_progress = gauge("Requests accepted and not answered yet", *REQUEST_LABELS)
    rejected_total = counter("Requests refused before any compute", *REQUEST_LABELS, "reason")
    cancelled_total = counter(
        "Requests whose client left or whose deadline passed, by the stage reached",
        *REQUEST_LABELS,
        "stage",
    )
    prediction_confidence = histogram(
        "Calibrated probability of the predicted label",
        *REQUEST_LABELS,
        buckets=CONFIDENCE_BUCKETS,
    )
    prediction_labels = histogram("Labels given to an input", *REQUEST_LABELS, buckets=LABEL_COUNT_BUCKETS)
    prediction_quantile = histogram(
        "Place of the answered value among the version's answers on validation",
        *REQUEST_LABELS,
        buckets=QUANTILE_BUCKETS,
    )

    # Queue, batches and engines: backbone, engine
    queue_requests = gauge("Entries waiting for a batch", *ENGINE_LABELS)
    queue_tokens = gauge("Tokens waiting for a batch", *ENGINE_LABELS)
    queue_duration_seconds = histogram(
        "Time an entry waited for its batch",
        *ENGINE_LABELS,
        buckets=DURATION_BUCKETS_S,
    )
    inference_duration_seconds = histogram(
        "Time an engine took for a batch, heads included",
        *ENGINE_LABELS,
        buckets=DURATION_BUCKETS_S,
    )
    batch_size = histogram("Entries in a batch", *ENGINE_LABELS, buckets=BATCH_SIZE_BUCKETS)
    batch_tokens = histogram("Tokens in a batch, padding not counted", *ENGINE_LABELS, buckets=BATCH_TOKENS_BUCKETS)
    batch_padding_ratio = histogram("Padding's share of a batch's tokens", *ENGINE_LABELS, buckets=PADDING_BUCKETS)
    batch_tokens_limit = gauge("Most tokens of a batch, padding counted, as measured at warm-up", *ENGINE_LABELS)
    worker_restarts_total = counter("Restarts of an engine's thread after a crash", *ENGINE_LABELS)
    engine_parity_max_abs_diff = gauge("Largest change of a probability against torch in fp32", *ENGINE_LABELS)
    engine_label_flips_ratio = gauge("Share of answers that differ from torch in fp32", *ENGINE_LABELS)
    engine_min_cosine = gauge("Smallest cosine of a vector to that of torch in fp32", *ENGINE_LABELS)
    engine_texts_per_second = gauge("Speed measured on the calibration texts", *ENGINE_LABELS)
    engine_selected = gauge("1 for the engine that serves, else 0", *ENGINE_LABELS)
    adapter_slots_bytes = gauge("Memory of the slots that adapters run from, however many are loaded", "backbone")
    engine_fallback_total = counter("Times an engine was given up for another", "backbone", "from", "to", "reason")

    # The model pool
    model_info = gauge("1 for each model in the pool", *REQUEST_LABELS, *ENGINE_LABELS)
    model_state = gauge("1 for the state a model is in, else 0", *REQUEST_LABELS, "state")
    model_memory_bytes = gauge("Memory a model holds beyond its shared backbone", *REQUEST_LABELS)
    alias_wanted_version = gauge("Version that an alias should serve, by the registry", *ALIAS_LABELS)
    alias_serving_version = gauge("Version that an alias serves in this process; 0: none", *ALIAS_LABELS)
    adapter_loads_total = counter("Versions loaded: heads, adapters, full models")
    adapter_load_duration_seconds = histogram("Time from reading a version to its being ready", buckets=LOAD_BUCKETS_S)
    adapter_evictions_total = counter("Versions unloaded to stay within the memory budget")

    # The job table, as this process last read it
    finetune_jobs = gauge("Fine-tune jobs in the database, by state", "state")
    finetune_workers = gauge("Fine-tune workers heard from within the last minute")
    finetune_worker_last_seen_timestamp_seconds = gauge("Unix time at which a worker was last heard from; 0: never")

    # All other routes: method, route
    management_requests_total = counter("Requests to other routes answered", "method", "route", "code")
    management_duration_seconds = histogram(
        "Time from such a request's arrival to the first byte of its answer",
        "method",
        "route",
        buckets=MANAGEMENT_BUCKETS_S,
    )
    event_streams = gauge("Event streams of jobs that are open")

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        # Otherwise each counter and histogram child exports one more series that nothing here asks about.
        disable_created_metrics()
        self.registry = registry if registry is not None else CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        for name, declared in vars(ServingMetrics).items():
            if isinstance(declared, Declared):
                setattr(self, name, declared.made(self.registry))

        self._request_histograms = (
            self.request_duration_seconds,
            self.tokenize_duration_seconds,
        )
        self._answer_histograms = {
            "confidence": self.prediction_confidence,
            "labels": self.prediction_labels,
            "quantile": self.prediction_quantile,
        }  # by the names that tasks use in `observes`
        self._engine_metrics = (
            self.queue_requests,
            self.queue_tokens,
            self.queue_duration_seconds,
            self.inference_duration_seconds,
            self.batch_size,
            self.batch_tokens,
            self.batch_padding_ratio,
            self.batch_tokens_limit,
            self.worker_restarts_total,
        )
        self._engine_reports = (
            self.engine_selected,
            self.engine_texts_per_second,
            self.engine_label_flips_ratio,
            self.engine_min_cosine,
            self.engine_parity_max_abs_diff,
        )
        self._answered: dict[ModelLabels, tuple[Histogram, dict[int, Counter]]] = {}
        self._started: set[ModelLabels] = set()
        self._of_model: dict[ModelLabels, ModelSeries] = {}
        # Requests that name no known model are counted as model="", so that clients cannot create series.
        self._start_requests(("", "", "", ""))
        self.start_route(["GET"], "")
        self.set_finetune_jobs({})

    def start_model(
        self, model: str, version: str, task: str, tenant: str, *, backbone: str = "", engine: str = ""
    ) -> None:
        """Create a model's series, when its load begins. Call again to record another engine: counts are kept."""
        labels = (model, version, task, tenant)
        self._start_requests(labels)
        self.model_memory_bytes.labels(*labels)
        for state in MODEL_STATES:
            self.model_state.labels(*labels, state)
        self.model_info.remove_by_labels(dict(zip(REQUEST_LABELS, labels, strict=True)))
        self.model_info.labels(*labels, backbone, engine).set(1)

    def set_model_state(self, model: str, version: str, task: str, tenant: str, *, state: str) -> None:
        if state not in MODEL_STATES:
            raise ValueError(f"unknown model state {state!r}, expected one of {', '.join(MODEL_STATES)}")
        for known in MODEL_STATES:
            self.model_state.labels(model, version, task, tenant, known).set(known == state)

    def stop_version(self, tenant: str, model: str, version: int) -> None:
        """Remove the series of a version of which nothing is loaded, such as those of a load that failed."""
        found = [key for key in self._started if (key[0], key[1], key[3]) == (model, str(version), tenant)]
        for labels in found:
            self.stop_model(*labels)

    def stop_model(self, model: str, version: str, task: str, tenant: str) -> None:
        """Remove a model's series, once it is drained: a later observation would create them anew."""
        key = (model, version, task, tenant)
        labels = dict(zip(REQUEST_LABELS, key, strict=True))
        self._answered.pop(key, None)
        self._of_model.pop(key, None)
        self._started.discard(key)
        for metric in (
            *self._request_histograms,
            *self._answers_of(task),
            self.requests_total,
            self.requests_in_progress,
            self.rejected_total,
            self.cancelled_total,
            self.model_info,
            self.model_state,
            self.model_memory_bytes,
        ):
            metric.remove_by_labels(labels)

    def set_alias(self, tenant: str, model: str, alias: str, wanted: int | None, serving: int | None) -> None:
        self.alias_wanted_version.labels(tenant, model, alias).set(wanted or 0)
        self.alias_serving_version.labels(tenant, model, alias).set(serving or 0)

    def stop_alias(self, tenant: str, model: str, alias: str) -> None:
        """Remove the series of an alias that the registry no longer has."""
        for metric in (self.alias_wanted_version, self.alias_serving_version):
            metric.remove_by_labels({"tenant": tenant, "model": model, "alias": alias})

    def of_model(self, labels: ModelLabels) -> ModelSeries:
        """A model's series by its labels, looked up once."""
        series = self._of_model.get(labels)
        if series is None:
            series = self._of_model[labels] = ModelSeries(
                in_progress=self.requests_in_progress.labels(*labels),
                preprocess_duration=self.tokenize_duration_seconds.labels(*labels),
                answers=tuple(histogram.labels(*labels) for histogram in self._answers_of(labels[2])),
                rejected={reason: self.rejected_total.labels(*labels, reason) for reason in REJECT_REASONS},
                cancelled_queued=self.cancelled_total.labels(*labels, "queued"),
                cancelled_running=self.cancelled_total.labels(*labels, "running"),
            )
        return series

    def count_request(self, labels: ModelLabels, *, status: int, seconds: float) -> None:
        """Count and time an answered request. Looking a child up by its labels costs more than what it is for."""
        series = self._answered.get(labels)
        if series is None:
            series = self._answered[labels] = (self.request_duration_seconds.labels(*labels), {})
        duration, totals = series
        total = totals.get(status)
        if total is None:
            total = totals[status] = self.requests_total.labels(*labels, str(status))
        total.inc()
        duration.observe(seconds)

    def start_route(self, methods: Iterable[str], route: str) -> None:
        """Create the series of a route, so that its first fault counts as an increase."""
        for method in methods:
            self.management_duration_seconds.labels(method, route)
            for code in MANAGEMENT_CODES:
                self.management_requests_total.labels(method, route, code)

    def count_management(self, method: str, route: str, *, status: int, seconds: float | None = None) -> None:
        """Count an answer of a route that is no inference; without `seconds` it was refused before any route saw it.
        Clients choose neither `route`, which is the path with its parameters' names, nor the methods counted."""
        method = method if method in METHODS else "other"
        self.management_requests_total.labels(method, route, str(status)).inc()
        if seconds is not None:
            self.management_duration_seconds.labels(method, route).observe(seconds)

    def start_engine(self, backbone: str, engine: str) -> EngineSeries:
        """Create an engine's series, all but its parity, which has no value until it is measured."""
        return EngineSeries(
            queue_requests=self.queue_requests.labels(backbone, engine),
            queue_tokens=self.queue_tokens.labels(backbone, engine),
            queue_duration=self.queue_duration_seconds.labels(backbone, engine),
            inference_duration=self.inference_duration_seconds.labels(backbone, engine),
            batch_size=self.batch_size.labels(backbone, engine),
            batch_tokens=self.batch_tokens.labels(backbone, engine),
            padding_ratio=self.batch_padding_ratio.labels(backbone, engine),
            tokens_limit=self.batch_tokens_limit.labels(backbone, engine),
            restarts=self.worker_restarts_total.labels(backbone, engine),
        )

    def change_engine(self, backbone: str, before: str, after: str) -> EngineSeries:
        """Another engine works off the same queue; what was measured of either stays."""
        self._remove_engine(backbone, before)
        return self.start_engine(backbone, after)

    def stop_engine(self, backbone: str, engine: str) -> None:
        """Remove an engine's series. Its fallbacks stay: they are what tells that it stopped."""
        self._remove_engine(backbone, engine)
        for report in (*self._engine_reports, self.adapter_slots_bytes):
            report.remove_by_labels({"backbone": backbone})

    def _remove_engine(self, backbone: str, engine: str) -> None:
        for metric in self._engine_metrics:
            metric.remove_by_labels({"backbone": backbone, "engine": engine})

    def set_engine_report(
        self,
        backbone: str,
        engine: str,
        *,
        is_serving: bool,
        texts_per_s: float | None,
        flips: float | None,
        min_cosine: float | None,
        max_abs_dp: float | None,
    ) -> None:
        """One candidate's measurement; what was not measured has no series."""
        self.engine_selected.labels(backbone, engine).set(is_serving)
        for gauge, value in (
            (self.engine_texts_per_second, texts_per_s),
            (self.engine_label_flips_ratio, flips),
            (self.engine_min_cosine, min_cosine),
            (self.engine_parity_max_abs_diff, max_abs_dp),
        ):
            if value is not None:
                gauge.labels(backbone, engine).set(value)

    def count_engine_fallback(self, backbone: str, from_engine: str, *, to_engine: str, reason: str) -> None:
        self.engine_fallback_total.labels(backbone, from_engine, to_engine, reason).inc()

    def set_finetune_jobs(self, counts: Mapping[str, int]) -> None:
        """Set the number of jobs in each state; a state left out has none."""
        for state in dict.fromkeys((*JOB_STATES, *counts)):
            self.finetune_jobs.labels(state).set(counts.get(state, 0))

    def set_workers(self, live: int, last_seen: float | None) -> None:
        """Set how many fine-tune workers are there, and when one was last heard from (None: never)."""
        self.finetune_workers.set(live)
        self.finetune_worker_last_seen_timestamp_seconds.set(last_seen or 0.0)

    def render(self) -> tuple[bytes, str]:
        """The body and content type of `GET /metrics`. Some 0.5 ms a model: with a hundred of them, use a thread."""
        return generate_latest(self.registry), CONTENT_TYPE_PLAIN_0_0_4

    def _start_requests(self, labels: ModelLabels) -> None:
        self._started.add(labels)
        for histogram in (*self._request_histograms, *self._answers_of(labels[2])):
            histogram.labels(*labels)
        self.requests_in_progress.labels(*labels)
        for code in REQUEST_CODES:
            self.requests_total.labels(*labels, code)
        for reason in REJECT_REASONS:
            self.rejected_total.labels(*labels, reason)
        for stage in CANCEL_STAGES:
            self.cancelled_total.labels(*labels, stage)

    def _answers_of(self, task: str) -> tuple[Histogram, ...]:
        """Those of the task; the series of no model starts one, so that a rate over models is 0 instead of missing."""
        if not task:
            return (self.prediction_confidence,)
        return tuple(self._answer_histograms[name] for name in TASKS[task].observes) if task in TASKS else ()
