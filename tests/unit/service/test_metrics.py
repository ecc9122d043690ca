import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from service.metrics import (
    ALIAS_LABELS,
    CANCEL_STAGES,
    ENGINE_LABELS,
    JOB_STATES,
    MODEL_STATES,
    REJECT_REASONS,
    REQUEST_CODES,
    REQUEST_LABELS,
    ServingMetrics,
)

MODEL = {"model": "intent", "version": "3", "task": "text-classification", "tenant": "default"}
ENGINE = {"backbone": "minilm", "engine": "onnx"}

# As the contract lists them, with their labels.
CONTRACT = {
    "requests_total": (*REQUEST_LABELS, "code"),
    "request_duration_seconds": REQUEST_LABELS,
    "queue_duration_seconds": ENGINE_LABELS,
    "tokenize_duration_seconds": REQUEST_LABELS,
    "inference_duration_seconds": ENGINE_LABELS,
    "requests_in_progress": REQUEST_LABELS,
    "queue_requests": ENGINE_LABELS,
    "queue_tokens": ENGINE_LABELS,
    "rejected_total": (*REQUEST_LABELS, "reason"),
    "cancelled_total": (*REQUEST_LABELS, "stage"),
    "batch_size": ENGINE_LABELS,
    "batch_tokens": ENGINE_LABELS,
    "batch_padding_ratio": ENGINE_LABELS,
    "batch_tokens_limit": ENGINE_LABELS,
    "adapter_loads_total": (),
    "adapter_load_duration_seconds": (),
    "adapter_evictions_total": (),
    "model_info": (*REQUEST_LABELS, *ENGINE_LABELS),
    "model_state": (*REQUEST_LABELS, "state"),
    "model_memory_bytes": REQUEST_LABELS,
    "alias_wanted_version": ALIAS_LABELS,
    "alias_serving_version": ALIAS_LABELS,
    "engine_fallback_total": ("backbone", "from", "to", "reason"),
    "engine_parity_max_abs_diff": ENGINE_LABELS,
    "engine_label_flips_ratio": ENGINE_LABELS,
    "engine_min_cosine": ENGINE_LABELS,
    "engine_texts_per_second": ENGINE_LABELS,
    "engine_selected": ENGINE_LABELS,
    "adapter_slots_bytes": ("backbone",),
    "worker_restarts_total": ENGINE_LABELS,
    "finetune_jobs": ("state",),
    "finetune_workers": (),
    "finetune_worker_last_seen_timestamp_seconds": (),
    "management_requests_total": ("method", "route", "code"),
    "management_duration_seconds": ("method", "route"),
    "event_streams": (),
    "prediction_confidence": REQUEST_LABELS,
    "prediction_labels": REQUEST_LABELS,
    "prediction_quantile": REQUEST_LABELS,
}


def samples(metrics: ServingMetrics) -> list[Sample]:
    body, _ = metrics.render()
    return [sample for family in text_string_to_metric_families(body.decode()) for sample in family.samples]


def of(metrics: ServingMetrics, labels: dict[str, str]) -> set[str]:
    """Names of the samples that carry all of `labels`."""
    return {sample.name for sample in samples(metrics) if labels.items() <= sample.labels.items()}


def value(metrics: ServingMetrics, name: str, labels: dict[str, str]) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


@pytest.mark.parametrize("name", CONTRACT)
def test_each_metric_of_the_contract_is_an_attribute_with_its_labels(name: str) -> None:
    metric = getattr(ServingMetrics(), name)
    family = metric.describe()[0]
    assert f"{family.name}_total" == f"polyhead_{name}" or family.name == f"polyhead_{name}"
    assert tuple(metric._labelnames) == CONTRACT[name]


def test_nothing_else_is_exported_under_the_prefix() -> None:
    families = {family.name for family in ServingMetrics().registry.collect()}
    ours = {name.removeprefix("polyhead_") for name in families if name.startswith("polyhead_")}
    assert ours == {name.removesuffix("_total") for name in CONTRACT}


def test_names_have_no_colon_and_no_created_series() -> None:
    metrics = ServingMetrics()
    metrics.start_model(**MODEL)
    names = {sample.name for sample in samples(metrics)}
    assert not [name for name in names if ":" in name or name.endswith("_created")]


def test_process_metrics_are_exported() -> None:
    names = {sample.name for sample in samples(ServingMetrics())}
    assert {"process_cpu_seconds_total", "process_resident_memory_bytes", "process_open_fds"} <= names


def test_unknown_models_are_counted_before_any_model_is_loaded() -> None:
    unknown = {"model": "", "version": "", "task": "", "tenant": ""}
    assert value(ServingMetrics(), "polyhead_requests_total", {**unknown, "code": "503"}) == 0


def test_a_models_series_exist_from_start_to_stop() -> None:
    metrics = ServingMetrics()
    before = samples(metrics)
    assert of(metrics, MODEL) == set()

    metrics.start_model(**MODEL, **ENGINE)
    for code in REQUEST_CODES:
        assert value(metrics, "polyhead_requests_total", {**MODEL, "code": code}) == 0
    for reason in REJECT_REASONS:
        assert value(metrics, "polyhead_rejected_total", {**MODEL, "reason": reason}) == 0
    for stage in CANCEL_STAGES:
        assert value(metrics, "polyhead_cancelled_total", {**MODEL, "stage": stage}) == 0
    for histogram in ("request_duration_seconds", "tokenize_duration_seconds", "prediction_confidence"):
        assert value(metrics, f"polyhead_{histogram}_count", MODEL) == 0
    assert value(metrics, "polyhead_requests_in_progress", MODEL) == 0
    assert value(metrics, "polyhead_model_memory_bytes", MODEL) == 0
    assert value(metrics, "polyhead_model_info", {**MODEL, **ENGINE}) == 1

    metrics.requests_total.labels(**MODEL, code="418").inc()
    metrics.set_model_state(**MODEL, state="ready")
    metrics.stop_model(**MODEL)
    assert of(metrics, MODEL) == set()
    assert {(s.name, tuple(s.labels.items())) for s in samples(metrics)} == {
        (s.name, tuple(s.labels.items())) for s in before
    }


def test_stopping_one_version_leaves_the_other() -> None:
    metrics = ServingMetrics()
    other = {**MODEL, "version": "4"}
    metrics.start_model(**MODEL)
    metrics.start_model(**other)
    names = of(metrics, other)
    metrics.stop_model(**MODEL)
    assert of(metrics, other) == names


def test_stopping_one_tenants_model_leaves_the_others_of_the_same_name() -> None:
    metrics = ServingMetrics()
    other = {**MODEL, "tenant": "acme"}
    for labels in (MODEL, other):
        metrics.start_model(**labels)
        metrics.set_model_state(**labels, state="ready")
    metrics.set_model_state(**MODEL, state="failed")
    assert value(metrics, "polyhead_model_state", {**other, "state": "ready"}) == 1
    names = of(metrics, other)
    metrics.stop_version("default", "intent", 3)
    assert of(metrics, other) == names and of(metrics, MODEL) == set()


def test_starting_again_records_the_engine_and_keeps_the_counts() -> None:
    metrics = ServingMetrics()
    metrics.start_model(**MODEL, **ENGINE)
    metrics.requests_total.labels(**MODEL, code="200").inc()
    metrics.start_model(**MODEL, backbone="minilm", engine="torch")
    assert value(metrics, "polyhead_requests_total", {**MODEL, "code": "200"}) == 1
    engines = [sample.labels["engine"] for sample in samples(metrics) if sample.name == "polyhead_model_info"]
    assert engines == ["torch"]


def test_a_model_is_in_one_state() -> None:
    metrics = ServingMetrics()
    metrics.start_model(**MODEL)
    for current in MODEL_STATES:
        metrics.set_model_state(**MODEL, state=current)
        states = {s: value(metrics, "polyhead_model_state", {**MODEL, "state": s}) for s in MODEL_STATES}
        assert states == {state: float(state == current) for state in MODEL_STATES}
    with pytest.raises(ValueError, match="unknown model state 'broken'"):
        metrics.set_model_state(**MODEL, state="broken")


def test_an_engines_series_exist_from_start_to_stop() -> None:
    metrics = ServingMetrics()
    metrics.start_engine(**ENGINE)
    for name in ("queue_requests", "queue_tokens", "worker_restarts_total", "batch_size_count", "batch_tokens_count"):
        assert value(metrics, f"polyhead_{name}", ENGINE) == 0
    for name in ("queue_duration_seconds", "inference_duration_seconds", "batch_padding_ratio"):
        assert value(metrics, f"polyhead_{name}_count", ENGINE) == 0
    # no value before it is measured: 0 would claim perfect parity
    assert value(metrics, "polyhead_engine_parity_max_abs_diff", ENGINE) is None

    metrics.set_engine_report(**ENGINE, is_serving=True, texts_per_s=90.0, flips=None, min_cosine=1.0, max_abs_dp=1e-6)
    assert value(metrics, "polyhead_engine_parity_max_abs_diff", ENGINE) == 1e-6
    assert value(metrics, "polyhead_engine_label_flips_ratio", ENGINE) is None
    metrics.stop_engine(**ENGINE)
    assert of(metrics, ENGINE) == set()


def test_when_another_engine_takes_over_its_series_replace_those_of_the_first() -> None:
    metrics = ServingMetrics()
    after = {**ENGINE, "engine": "openvino/bf16"}
    metrics.start_engine(**ENGINE).batch_size.observe(3)
    metrics.engine_parity_max_abs_diff.labels(**ENGINE).set(1e-6)
    series = metrics.change_engine(ENGINE["backbone"], ENGINE["engine"], after["engine"])
    series.restarts.inc()
    assert value(metrics, "polyhead_batch_size_count", ENGINE) is None
    assert value(metrics, "polyhead_worker_restarts_total", after) == 1
    assert value(metrics, "polyhead_engine_parity_max_abs_diff", ENGINE) == 1e-6


def test_a_models_series_are_looked_up_once_and_anew_after_it_was_unloaded() -> None:
    metrics = ServingMetrics()
    labels = (MODEL["model"], MODEL["version"], MODEL["task"], MODEL["tenant"])
    metrics.start_model(**MODEL)
    first = metrics.of_model(labels)
    assert metrics.of_model(labels) is first
    metrics.stop_model(**MODEL)
    metrics.start_model(**MODEL)
    metrics.of_model(labels).rejected["deadline"].inc()
    assert value(metrics, "polyhead_rejected_total", {**MODEL, "reason": "deadline"}) == 1


def test_the_queue_is_read_when_it_is_asked_for() -> None:
    metrics = ServingMetrics()
    waiting = [7, 8]
    metrics.start_engine(**ENGINE).follow_queue(lambda: len(waiting), lambda: sum(waiting))
    assert value(metrics, "polyhead_queue_requests", ENGINE) == 2
    waiting.clear()
    assert value(metrics, "polyhead_queue_tokens", ENGINE) == 0


def test_a_fallback_outlives_the_engine_it_left() -> None:
    metrics = ServingMetrics()
    metrics.start_engine(**ENGINE)
    metrics.count_engine_fallback("minilm", "onnx", to_engine="torch", reason="parity")
    metrics.stop_engine(**ENGINE)
    labels = {"backbone": "minilm", "from": "onnx", "to": "torch", "reason": "parity"}
    assert value(metrics, "polyhead_engine_fallback_total", labels) == 1


def test_job_states_left_out_have_no_jobs() -> None:
    metrics = ServingMetrics()
    metrics.set_finetune_jobs({"queued": 2, "running": 1})
    metrics.set_finetune_jobs({"running": 3})
    counts = {state: value(metrics, "polyhead_finetune_jobs", {"state": state}) for state in JOB_STATES}
    assert counts == {**dict.fromkeys(JOB_STATES, 0), "running": 3}


def test_buckets_cover_the_limits_of_the_service() -> None:
    metrics = ServingMetrics()
    metrics.start_model(**MODEL)
    metrics.start_engine(**ENGINE)

    def edges(name: str) -> list[float]:
        found = {s.labels["le"] for s in samples(metrics) if s.name == f"polyhead_{name}_bucket"}
        return sorted(float(edge) for edge in found - {"+Inf"})

    assert (edges("request_duration_seconds")[0], edges("request_duration_seconds")[-1]) == (0.0005, 30)
    assert edges("batch_size")[0] == 1 and edges("batch_size")[-1] >= 256  # max_client_batch_size
    assert edges("batch_tokens")[-1] >= 16384  # max_batch_tokens
    assert edges("prediction_confidence") == pytest.approx([tenth / 10 for tenth in range(1, 11)])
    assert edges("batch_padding_ratio")[-1] == 1


def test_render_gives_the_text_format() -> None:
    body, content_type = ServingMetrics().render()
    assert content_type.startswith("text/plain; version=0.0.4")
    assert b"# TYPE polyhead_requests_total counter\n" in body


def test_two_instances_do_not_share_series() -> None:
    first, second = ServingMetrics(), ServingMetrics(CollectorRegistry())
    first.adapter_loads_total.inc()
    assert value(second, "polyhead_adapter_loads_total", {}) == 0


def test_requests_are_counted_until_their_model_goes_and_anew_when_it_is_back() -> None:
    metrics, labels = ServingMetrics(), ("intent", "3", "text-classification", "default")

    def count(code: str) -> float | None:
        return metrics.registry.get_sample_value("polyhead_requests_total", {**MODEL, "code": code})

    for _ in range(2):
        metrics.start_model(*labels)
        metrics.count_request(labels, status=200, seconds=0.01)
        metrics.count_request(labels, status=200, seconds=0.02)
        metrics.count_request(labels, status=499, seconds=0.5)
        assert (count("200"), count("499"), count("500")) == (2, 1, 0)
        assert metrics.registry.get_sample_value("polyhead_request_duration_seconds_sum", MODEL) == pytest.approx(0.53)
        metrics.stop_model(*labels)
        assert count("200") is None
