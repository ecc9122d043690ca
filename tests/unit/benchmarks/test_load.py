"""What the load generators make of what they saw: wrk's line, samples of an open loop, batches of a log."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import hot_load, rate, replay, wrk
from benchmarks.rate import Sample


def figures_of(times: Sequence[float], *, duration_s: float) -> dict[str, float]:
    """What wrk.lua prints for answers at `times`."""
    return {
        "requests": len(times),
        "duration_us": duration_s * 1e6,
        "p50_us": 880_000,
        "p95_us": 950_000,
        "p99_us": 990_000,
        "max_us": 1_000_000,
        "refused": 0,
        "broken": 0,
        "n": len(times),
        "t_first": min(times, default=0),
        "t_last": max(times, default=0),
        "sum_t": sum(times),
        "sum_tt": sum(t * t for t in times),
        "sum_ti": sum(t * i for i, t in enumerate(times, 1)),
    }


def bursts(count: int, *, rows: int, every_s: float) -> list[float]:
    return [every_s * (1 + number // rows) for number in range(count * rows)]


def test_wrk_line_among_its_other_output() -> None:
    figures = figures_of([1.0, 9.5], duration_s=10)
    assert wrk.read(f"Running 10s test\n  2 requests in 10s\n{json.dumps(figures)}\n") == figures
    seen = wrk.as_closed_loop(figures)
    assert seen.requests == 2 and seen.counted_per_s == pytest.approx(0.2)
    assert (seen.p50_ms, seen.p99_ms, seen.max_ms) == (880.0, 990.0, 1000.0)


def test_the_rate_of_bursts_is_exact_where_a_count_is_coarse() -> None:
    seen = wrk.as_closed_loop(figures_of(bursts(9, rows=64, every_s=1.1), duration_s=10))
    assert seen.requests_per_s == pytest.approx(64 / 1.1)
    assert seen.counted_per_s == pytest.approx(57.6)


@given(st.integers(2, 500), st.floats(0.01, 5))
def test_the_rate_of_an_even_stream_is_its_rate(count: int, every_s: float) -> None:
    figures = figures_of(bursts(count, rows=1, every_s=every_s), duration_s=count * every_s)
    assert wrk.slope(figures) == pytest.approx(1 / every_s)


def test_too_few_batches_are_counted_and_ask_for_a_longer_run() -> None:
    figures = figures_of([0.1] * 4, duration_s=4)  # a quick first batch, and one that outlasts the run
    assert not wrk.spans(figures)
    assert wrk.as_closed_loop(figures).requests_per_s == 1.0
    assert wrk.spans(figures_of([0.1, 3.9], duration_s=4))
    with pytest.raises(SystemExit, match="not one answer"):
        wrk.as_closed_loop(figures_of([], duration_s=4))


@pytest.mark.parametrize("fault", [{"refused": 1}, {"broken": 2}])
def test_a_run_in_which_a_request_failed_is_no_measurement(fault: dict[str, int]) -> None:
    with pytest.raises(SystemExit, match="not answered with 2xx"):
        wrk.read(json.dumps(figures_of([1.0], duration_s=1) | fault))


def test_wrk_that_printed_nothing() -> None:
    with pytest.raises(SystemExit, match="connection refused"):
        wrk.read("connection refused")


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
        Sample(2.0, 2.0, 2.1, "200"),
        Sample(2.2, 2.2, 2.21, "429"),
        Sample(2.4, 2.4, 3.4, "timeout"),
        Sample(2.9, 2.9, 3.1, "200"),  # due within, answered after: latency, but no goodput
        Sample(3.0, 3.0, 3.1, "200"),
    ]
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
    assert [item.cost for item in mixed.inputs] == [8, 6]
    assert (mixed.adapters, bare.adapters) == ((None, "a"), None)

    seen = wrk.as_closed_loop(figures_of(bursts(40, rows=1, every_s=0.25), duration_s=10))
    figures = replay.figures(batches, seen, replay_s=0.8)
    assert (figures["http_texts_per_s"], figures["replay_texts_per_s"]) == pytest.approx((4.0, 5.0))
    assert figures["ratio"] == pytest.approx(0.8)
    assert figures["padding"] == pytest.approx(1 - 28 / 32)
    assert figures["engine_busy"] == pytest.approx(1.0)
