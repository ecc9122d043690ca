"""What the load generators make of what they saw: wrk's line, samples of an open loop, batches of a log."""

from __future__ import annotations

import json

import pytest

from benchmarks import hot_load, rate, replay, wrk
from benchmarks.rate import Sample

LINE = {
    "requests": 640, "duration_us": 10_000_000, "mean_us": 900_000.0, "p50_us": 880_000, "p95_us": 950_000,
    "p99_us": 990_000, "max_us": 1_000_000, "refused": 0, "broken": 0,
}  # fmt: skip


def test_wrk_line_among_its_other_output() -> None:
    seen = wrk.parse(f"Running 10s test\n  640 requests in 10s\n{json.dumps(LINE)}\n", connections=64)
    assert (seen.requests, seen.counted_per_s) == (640, 64.0)
    assert seen.requests_per_s == pytest.approx(64 / 0.9)  # what was under way at the end does not count
    assert (seen.p50_ms, seen.p99_ms, seen.max_ms) == (880.0, 990.0, 1000.0)


@pytest.mark.parametrize("fault", [{"refused": 1}, {"broken": 2}, {"requests": 0}])
def test_a_run_in_which_a_request_failed_is_no_measurement(fault: dict[str, int]) -> None:
    with pytest.raises(SystemExit, match="not answered with 2xx"):
        wrk.parse(json.dumps(LINE | fault), connections=64)


def test_wrk_that_printed_nothing() -> None:
    with pytest.raises(SystemExit, match="connection refused"):
        wrk.parse("connection refused", connections=1)


def test_requests_are_due_at_even_distances() -> None:
    assert rate.schedule(4.0, 1.5) == [0.0, 0.25, 0.5, 0.75, 1.0, 1.25]


def test_latency_counts_from_when_a_request_was_due() -> None:
    # The server stalled for a second: the one request sent meanwhile left late and still counts in full.
    samples = [Sample(0.0, 0.0, 1.0, "200"), Sample(0.5, 1.0, 1.1, "200")]
    seen = rate.summarise(samples, 0.0, 1.0)
    assert seen.p50_ms == pytest.approx(600)
    assert seen.max_ms == pytest.approx(1000)
    assert seen.lag_ms == pytest.approx(500)


def test_only_the_window_counts() -> None:
    samples = [
        Sample(0.0, 0.0, 2.5, "200"),  # due before, answered within: goodput, but no latency
        Sample(2.0, 2.0, 2.1, "200"), Sample(2.2, 2.2, 2.21, "429"), Sample(2.4, 2.4, 3.4, "timeout"),
        Sample(2.9, 2.9, 3.1, "200"),  # due within, answered after: latency, but no goodput
        Sample(3.0, 3.0, 3.1, "200"),
    ]  # fmt: skip
    seen = rate.summarise(samples, 2.0, 3.0)
    assert seen.outcomes == {"200": 2, "429": 1, "timeout": 1}
    assert (seen.offered, seen.goodput) == (4.0, 2.0)
    assert seen.p99_ms == pytest.approx(200)
    assert seen.refused_p99_ms == pytest.approx(10)


def test_nothing_answered_has_no_latency() -> None:
    seen = rate.summarise([Sample(0.0, 0.0, 5.0, "timeout")], 0.0, 1.0)
    assert (seen.goodput, seen.p99_ms, seen.refused_p99_ms) == (0.0, None, None)


def test_an_answers_head() -> None:
    answer = b"HTTP/1.1 200 OK\r\nx-model-version: 12\r\nContent-Length: 34\r\ncontent-type: application/json"
    assert rate.content_length(answer) == 34
    assert rate.model_version(answer) == 12
    assert rate.model_version(answer.replace(b"12", b"")) is None  # a backbone has no version
    with pytest.raises(SystemExit, match="without Content-Length"):
        rate.content_length(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked")


def test_stale_is_what_was_sent_after_a_promotion_and_answered_by_an_older_version() -> None:
    promotions = [(1.0, 2), (2.0, 3)]
    sent_and_version = [(0.5, 1), (0.9, 2), (1.5, 2), (1.5, 1), (2.5, 2), (2.5, 3), (2.5, None)]
    samples = [Sample(sent, sent, sent + 0.1, "200", version) for sent, version in sent_and_version]
    assert hot_load.stale(samples, promotions) == 2
    assert hot_load.stale(samples, []) == 0


def test_replayed_batches_have_the_logged_shapes() -> None:
    line = {"lengths": [8, 6], "width": 8, "adapters": [None, "a"], "seconds": 0.5}
    batches = replay.read_log([json.dumps(line), "", json.dumps(line | {"adapters": [None, None]})])
    mixed, bare = replay.as_engine_batches(batches)
    assert [item.length for item in mixed.inputs] == [8, 6]
    assert (mixed.adapters, bare.adapters) == ((None, "a"), None)

    seen = wrk.parse(json.dumps(LINE | {"mean_us": 16_000_000.0}), connections=64)  # 4 a second
    figures = replay.figures(batches, seen, replay_s=0.8)
    assert (figures["http_texts_per_s"], figures["replay_texts_per_s"]) == (4.0, 5.0)
    assert figures["ratio"] == pytest.approx(0.8)
    assert figures["padding"] == pytest.approx(1 - 28 / 32)
    assert figures["engine_busy"] == pytest.approx(1.0)
