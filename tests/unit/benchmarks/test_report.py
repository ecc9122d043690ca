"""Results become tables; the page in docs/ is what the results say."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import report, tables
from benchmarks.tables import TABLES, claims

MACHINE = {
    "cpu": "a processor",
    "cores": 2,
    "flags": ["avx512f"],
    "memory_gib": 24,
    "kernel": "6.1",
    "python": "3.11.7",
    "governor": None,
    "gemm_gflops": {"float32": 190, "bfloat16": 1834},
}
ABOUT: dict[str, Any] = {
    "date": "2026-11-21",
    "revision": "abc",
    "machine": MACHINE,
    "versions": {"torch": "2.13.0"},
}
SERVERS: dict[str, Any] = {"polyhead": {"settings": {}, "info": {}}, "naive": {"command": []}, "infinity": {}}
OPEN = {
    "offered": 40.0,
    "outcomes": {"200": 30, "429": 10},
    "p50_ms": 20.0,
    "p99_ms": 1500.0,
    "p999_ms": None,
    "max_ms": 1600.0,
    "refused_p99_ms": 3.0,
    "lag_ms": 0.1,
}


def closed_loop() -> dict[str, Any]:
    figures = {
        "polyhead": [(100, 9.0), (50, 18.0)],
        "naive": [(20, 20.0), (10, 40.0)],
        "infinity": [(40, 30.0), (25, 60.0)],
    }
    rows = [
        {
            "server": server,
            "mix": "long",
            "connections": connections,
            "texts": 1,
            "round": number,
            "texts_per_s": texts,
            "p50_ms": p50,
            "p99_ms": 2 * p50,
        }
        for connections in (1, 64)
        for server, rounds in figures.items()
        for number, (texts, p50) in enumerate(rounds)
    ]
    return {**ABOUT, "benchmark": "closed_loop", "servers": SERVERS, "rows": rows}


def overload() -> dict[str, Any]:
    row = {"mix": "long", "round": 0, "peak": 20.0, "goodput": 19.0, **OPEN}
    rows = [{**row, "server": "polyhead", "max_queue_delay_ms": 2000.0, "batch_ms": 150.0}, {**row, "server": "naive"}]
    return {**ABOUT, "benchmark": "overload", "servers": SERVERS, "rows": rows}


def many_models() -> dict[str, Any]:
    http = [
        {
            "where": "http",
            "kind": "head",
            "mix": "long",
            "models": models,
            "round": 0,
            "requests_per_s": value,
            "p99_ms": 5.0,
        }
        for models, value in ((1, 100.0), (100, 97.0))
    ]
    process = [
        {
            "where": "process",
            "kind": "lora",
            "mix": "long",
            "models": models,
            "round": 0,
            "texts_per_s": value,
            "engine": "openvino/bf16",
        }
        for models, value in ((0, 100.0), (32, 81.0))
    ]
    memory = {"head": 12320, "lora": 2666528}
    return {**ABOUT, "benchmark": "many_models", "model_memory_bytes": memory, "rows": http + process}


def hot_load() -> dict[str, Any]:
    row = {"kind": "head", "mix": "long", "round": 0, "failed": 0, "stale": 0, **OPEN}
    rows = [{**row, "swaps": 0, "swap_s": []}, {**row, "swaps": 2, "swap_s": [0.1, 0.3], "p99_ms": 1800.0}]
    return {**ABOUT, "benchmark": "hot_load", "servers": SERVERS, "rows": rows}


def lines_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("|")]


def test_closed_loop_is_compared_with_the_best_peer_of_each_case() -> None:
    text = TABLES["closed_loop"](closed_loop())
    # Infinity has the most texts per second, naive the shortest median; ratios hold round by round.
    assert "| polyhead | long | 64 × 1 | infinity 32.5 | 2.25 (2.00–2.50) | naive 30.0 | 2.22 |" in text


def test_overload_shows_the_bound_of_a_server_that_has_one() -> None:
    ours, naive = lines_of(TABLES["overload"](overload()))[2:]
    assert "| 0.95 | 1,500 | 2,150 | 3.0 | 200 75%, 429 25% |" in ours
    assert "| 1,500 | – |" in naive


@pytest.mark.parametrize("result", [closed_loop(), overload(), many_models(), hot_load()], ids=lambda r: r["benchmark"])
def test_every_line_of_a_table_has_as_many_cells(result: dict[str, Any]) -> None:
    text = TABLES[result["benchmark"]](result)
    for table in text.split("\n\n"):
        assert len({line.count("|") for line in lines_of(table)}) <= 1


def few_shot(*gaps: float) -> dict[str, Any]:
    rows = [
        {"method": method, "seed": 42 + number, "accuracy": 0.9 + more, "macro_f1": 0.8 + 2 * more}
        for number, gap in enumerate(gaps)
        for method, more in (("linear_probe", 0.0), ("setfit", gap))
    ]
    return {**ABOUT, "benchmark": "few_shot", "per_class": 8, "test_rows": 2189, "rows": rows}


def test_few_rows_are_compared_seed_by_seed() -> None:
    text = TABLES["few_shot"](few_shot(0.01, 0.03))
    assert "| 43 | 0.9000 | 0.9300 | +0.0300 |" in text
    # Student's t with one degree of freedom is 12.706, the standard error 0.01.
    assert "| mean | 0.9000 | 0.9200 | +0.0200 ± 0.1271 (95 %) |" in text
    assert "| 43 | 0.8000 | 0.8600 | +0.0600 |" in text
    assert "Macro F1 of setfit less that of the probe, 8 rows a class, R8 | +0.0400" in claims({"f": few_shot(0.02)})
    assert "8 rows a class, R8 | +0.0200 ± 0.1271 (95 %) | > 0 |" in claims({"few-shot-8": few_shot(0.01, 0.03)})
    alone = few_shot(0.01, 0.03)
    alone["rows"] = alone["rows"][::2]
    assert "| mean | 0.9000 |\n" in TABLES["few_shot"](alone)
    assert "rows a class" not in claims({"few-shot-8": alone})


def test_other_tables() -> None:
    row = {"server": "polyhead", "round": 0, "tokens": 8, "connections": 1, "p50_ms": 4.0, "requests_per_s": 250.0}
    lengths = {"servers": SERVERS, "rows": [row, {**row, "connections": 64}]}
    assert "1 connection, p50 in ms" in tables.length_cost(lengths)
    assert "| 8 | 250 | – | – |" in tables.length_cost(lengths)
    start = {
        "server": "polyhead",
        "caches": "without",
        "round": 0,
        "first_answer_s": 5.0,
        "first_engine": "torch/fp32",
        "engine": "openvino/bf16",
        "engine_s": 60.0,
    }
    peer = {"server": "naive", "caches": "none", "round": 0, "first_answer_s": 8.0}
    assert "| polyhead | without | 5.0 | torch/fp32, then openvino/bf16 | 60.0 |" in tables.cold_start(
        {"rows": [start]}
    )
    assert "| naive | none | 8.0 | – | – |" in tables.cold_start({"rows": [peer]})
    parity = {
        "server": "polyhead",
        "engine": "openvino/bf16",
        "rows": 2189,
        "flips": 1,
        "min_cosine": 0.99987,
        "accuracy": 0.967,
        "reference_accuracy": 0.9675,
    }
    assert "| 2,189 | 1 (0.05%) | 0.99987 |" in tables.parity({"rows": [parity]})
    replayed = {
        "mix": "long",
        "round": 0,
        "http_texts_per_s": 90.0,
        "replay_texts_per_s": 100.0,
        "ratio": 0.9,
        "mean_rows": 31.5,
        "padding": 0.021,
        "engine_busy": 0.97,
    }
    assert "| long | 90.0 | 100.0 | 0.90 | 31.5 | 2.1% | 97% |" in tables.replay({"rows": [replayed]})
    offered = {"server": "polyhead", "mix": "long", "share": 0.5, "round": 0, "goodput": 39.0, **OPEN}
    assert "| long | 40.0 (50%) | polyhead | 39.0 | 20.0 | 1,500.0 | – | 25.0% |" in tables.open_loop(
        {"rows": [offered]}
    )
    one = {"method": "auto", "seed": 42, "chosen": "full", "report": 0.98, "seconds": 1444.0}
    assert "| `auto` | 42 | 0.9800 | full 0.9800 | 1,444 |" in tables.quality({"rows": [one]})
    method = {
        "name": "lora, dora",
        "seed": 1,
        "served": 0.97,
        "served_s": 100.0,
        "train_s": 90.0,
        "peak_mb": 900,
        "version_mb": 90.1,
    }
    text = tables.methods({"rows": [method, {**method, "seed": 2, "served": 0.98}]})
    assert "| lora, dora | 2 | 0.9750 ± 0.0635 | 100.0 |" in text  # 12.706 x 0.00707 / sqrt(2)
    peaks = [
        {
            "training_rows": count,
            "round": 0,
            "peak_mb": peak,
            "steps": 40,
            "phases_mb": {"preparing_data": data, "training": 900 + data // 10},
        }
        for count, peak, data in ((5_000, 1000, 600), (50_000, 1112, 700))
    ]
    assert "| 50,000 | 40 | 700 | 970 | 1,112 | +10 |" in tables.memory({"rows": peaks})
    assert "| +112 | ≤ +150 |" in tables.claims({"memory": {"rows": peaks}})
    jobs = [
        {"job": job, "round": 0, "engine": "openvino/bf16", "seconds": seconds, "accuracy": 0.967}
        for job, seconds in (("first", 50.0), ("second, at once", 7.0), ("bare pass", 40.0))
    ]
    probe = {"train_rows": 5485, "test_rows": 2189, "rows": jobs}
    assert "| first | openvino/bf16 | 50.0 | 1.25 | 0.9670 |" in tables.probe_job(probe)
    assert "| 50.0 | ≤ 1.3 × 40.0 + 8 = 60.0 |" in tables.claims({"probe-job": probe})
    cases = {"app": {"base_us": 399.0, "us": 28.0, "ratio": 14.25}}
    assert "| app | 399.0 | 28.0 | 14.2 |" in tables.http_overhead({"cases": cases})


def test_claims_say_what_was_measured_and_leave_out_what_was_not() -> None:
    results = {
        "closed-loop": closed_loop(),
        "overload": overload(),
        "many-models": many_models(),
        "hot-load": hot_load(),
    }
    text = claims(results)
    assert "| Texts/s, 64 connections, long texts: times as good as the best peer | 2.25 (2.00–2.50) |" in text
    assert "| 100 heads in uniform mix against one, over HTTP, long texts | 0.97 | ≥ 0.95 |" in text
    assert "| 32 LoRA adapters against none, in process, long texts | 0.81 | ≥ 0.80 |" in text
    assert "| Memory of a further head; of a LoRA version | 12.0 KiB; 2.5 MiB |" in text
    assert "kind head are loaded and swapped, long texts | 1.20, 0 failed | ≤ 1.5, 0 failed |" in text
    assert "| p99 of what was admitted then, ms, long texts | 1,500 | < 2,150 |" in text
    assert "short" not in text and "Flips" not in text


def test_a_block_is_made_anew_where_its_result_is_there() -> None:
    page = (
        "# Title\n<!-- figures: overload -->\nold\n<!-- /figures -->\nbetween\n"
        "<!-- figures: parity -->\nkept\n<!-- /figures -->\n"
    )
    rendered = report.render(page, {"overload": overload()}, {"overload"})
    assert rendered.startswith("# Title\n<!-- figures: overload -->\n| Texts |")
    assert "old" not in rendered and "\nbetween\n<!-- figures: parity -->\nkept\n" in rendered
    assert "![overload](images/overload.svg)" in rendered
    assert "1,834 in bf16" in rendered and "2026-11-21, commit abc. a processor, 2 cores (avx512f)" in rendered
    assert report.render(rendered, {"overload": overload()}, {"overload"}) == rendered


def test_the_page_is_what_the_results_say() -> None:
    page = report.PAGE.read_text()
    assert report.render(page, report.load(), report.plots()) == page, "run python -m benchmarks report"


def test_every_result_has_a_table() -> None:
    on_their_own_page = {"families"}
    assert {result["benchmark"] for result in report.load().values()} <= set(TABLES) | on_their_own_page
