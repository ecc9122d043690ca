"""Results as Markdown. Pure: a result goes in, text comes out.

A cell with brackets is the median of the rounds with the smallest and the largest. A ratio is taken round by round,
of two measurements that followed each other.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from scipy.special import stdtrit

from benchmarks.figures import Spread, ratios, shown, spread

Result = Mapping[str, Any]
Row = Mapping[str, Any]


def closed_loop(result: Result) -> str:
    rows, servers = result["rows"], list(result["servers"])
    loads = _distinct(rows, "connections", "texts")
    parts = []
    for (mix,) in _distinct(rows, "mix"):
        heads = [f"{connections} × {texts}: texts/s, p50 ms, p99 ms" for connections, texts in loads]
        lines = [
            [server, *(_load_cell(rows, server=server, mix=mix, connections=c, texts=t) for c, t in loads)]
            for server in servers
        ]
        parts.append(f"{mix.capitalize()} texts; connections × texts a request:\n\n{_table(['Server', *heads], lines)}")
    lines = [
        [ours, mix, f"{connections} × {texts}", *_against_best(result, ours, mix, connections, texts)]
        for ours in _ours(result)
        for (mix,) in _distinct(rows, "mix")
        for connections, texts in loads
        if _peers(result)
    ]
    if lines:
        heads = [
            "Server",
            "Texts",
            "Load",
            "Best peer, texts/s",
            "Texts/s, times its",
            "Best peer, p50",
            "Times as fast",
        ]
        parts.append("Against the best peer of each case:\n\n" + _table(heads, lines))
    return "\n".join(parts)


def open_loop(result: Result) -> str:
    rows = result["rows"]
    heads = ["Texts", "Offered/s", "Server", "Answered/s", "p50 ms", "p99 ms", "p99.9 ms", "Not answered"]
    lines = []
    for mix, share in _distinct(rows, "mix", "share"):
        for (server,) in _distinct(rows, "server"):
            these = _where(rows, mix=mix, share=share, server=server)
            lines.append(
                [
                    mix,
                    f"{shown(_median(these, 'offered'))} ({share:.0%})",
                    server,
                    _cell(these, "goodput"),
                    *(_cell(these, key) for key in ("p50_ms", "p99_ms", "p999_ms")),
                    _lost(these),
                ]
            )
    return _table(heads, lines)


def overload(result: Result) -> str:
    heads = [
        "Texts",
        "Server",
        "Peak/s",
        "Offered/s",
        "Answered in time/s",
        "Of the peak",
        "p99 of the admitted, ms",
        "Bound, ms",
        "Refusals, p99 ms",
        "Outcomes",
    ]
    lines = []
    for mix, server in _distinct(result["rows"], "mix", "server"):
        these = _where(result["rows"], mix=mix, server=server)
        lines.append(
            [
                mix,
                server,
                _cell(these, "peak"),
                shown(_median(these, "offered")),
                _cell(these, "goodput"),
                _ratio_cell(_ratios_of(these, "goodput", these, "peak")),
                _cell(these, "p99_ms", 0),
                shown(_bound(these), 0),
                _cell(these, "refused_p99_ms"),
                _outcomes(these),
            ]
        )
    return _table(heads, lines)


def replay(result: Result) -> str:
    heads = ["Texts", "Over HTTP, texts/s", "Replayed, texts/s", "Ratio", "Rows a batch", "Padding", "Engine busy"]
    lines = [
        [
            mix,
            _cell(these, "http_texts_per_s"),
            _cell(these, "replay_texts_per_s"),
            _cell(these, "ratio", 2),
            shown(_median(these, "mean_rows")),
            f"{_median(these, 'padding'):.1%}",
            f"{_median(these, 'engine_busy'):.0%}",
        ]
        for (mix,) in _distinct(result["rows"], "mix")
        for these in [_where(result["rows"], mix=mix)]
    ]
    return _table(heads, lines)


def many_models(result: Result) -> str:
    http, process = _where(result["rows"], where="http"), _where(result["rows"], where="process")
    lines = []
    for mix, kind, models in _distinct(http, "mix", "kind", "models"):
        least = min(row["models"] for row in _where(http, kind=kind))
        these, one = (_where(http, mix=mix, kind=kind, models=count) for count in (models, least))
        ratio = _ratios_of(these, "requests_per_s", one, "requests_per_s")
        lines.append(
            [mix, kind, str(models), _cell(these, "requests_per_s"), _cell(these, "p99_ms"), _ratio_cell(ratio)]
        )
    over_http = _table(["Texts", "Kind", "Models", "Requests/s", "p99 ms", "Against the fewest"], lines)
    lines = []
    for mix, models in _distinct(process, "mix", "models"):
        these, none = (_where(process, mix=mix, models=count) for count in (models, 0))
        ratio = _ratios_of(these, "texts_per_s", none, "texts_per_s")
        lines.append([mix, these[0]["engine"], str(models), _cell(these, "texts_per_s"), _ratio_cell(ratio)])
    in_process = _table(["Texts", "Engine", "Adapters", "Texts/s", "Against none"], lines)
    memory = result["model_memory_bytes"]
    return (
        f"`POST /predict`, 64 connections, models in uniform mix:\n\n{over_http}\n"
        f"LoRA of rank 16 on all linear layers, the same batches through the same engine in process:\n\n{in_process}\n"
        f"A further head takes {_bytes(memory['head'])}, a further LoRA version {_bytes(memory['lora'])} "
        "(`polyhead_model_memory_bytes`).\n"
    )


def hot_load(result: Result) -> str:
    heads = [
        "Kind",
        "Texts",
        "Requests/s",
        "Swaps a round",
        "Seconds a swap",
        "p99 ms alone",
        "p99 ms with swaps",
        "Ratio",
        "Failed",
        "Stale",
    ]
    lines = []
    for kind, mix in _distinct(result["rows"], "kind", "mix"):
        these = _where(result["rows"], kind=kind, mix=mix)
        alone, swapped = ([row for row in these if bool(row["swaps"]) is wanted] for wanted in (False, True))
        seconds = [value for row in swapped for value in row["swap_s"]]
        lines.append(
            [
                kind,
                mix,
                shown(_median(these, "offered")),
                str(swapped[0]["swaps"]),
                _spread_cell(spread(seconds), 2),
                _cell(alone, "p99_ms"),
                _cell(swapped, _near(swapped, "p99_ms")),
                _ratio_cell(_ratios_of(swapped, _near(swapped, "p99_ms"), alone, "p99_ms")),
                *(str(sum(row[key] for row in swapped)) for key in ("failed", "stale")),
            ]
        )
    return _table(heads, lines)


def _near(swapped: Sequence[Mapping[str, Any]], key: str) -> str:
    """Of the requests near a swap alone, where a result tells them apart."""
    return f"near_{key}" if swapped[0].get(f"near_{key}") is not None else key


def cold_start(result: Result) -> str:
    lines = []
    for server, caches in _distinct(result["rows"], "server", "caches"):
        these = _where(result["rows"], server=server, caches=caches)
        first, last = these[0].get("first_engine"), these[0].get("engine")
        engine = "–" if first is None else first if first == last else f"{first}, then {last}"
        lines.append([server, caches, _cell(these, "first_answer_s"), engine, _cell(these, "engine_s")])
    return _table(["Server", "Caches", "First answer, s", "Engine", "Serving on the last engine since, s"], lines)


def event_streams(result: Result) -> str:
    heads = ["Streams", "p50, ms", "p99, ms", "Times the p50 without", "Cores without a request", "Resident MB"]
    lines = []
    alone = _where(result["rows"], streams=0)
    for (count,) in _distinct(result["rows"], "streams"):
        these = _where(result["rows"], streams=count)
        ratios = [{"ratio": row["p50_ms"] / base["p50_ms"]} for row, base in zip(these, alone, strict=True)]
        cells = [_cell(these, "p50_ms", 2), _cell(these, "p99_ms", 1), _cell(ratios, "ratio", 2)]
        lines.append([f"{count:,}", *cells, _cell(these, "idle_cores", 2), _cell(these, "memory_mb", 0)])
    return f"{_table(heads, lines)}\nFile descriptors that a process may open: {result['descriptors']:,}.\n"


def length_cost(result: Result) -> str:
    rows, servers = result["rows"], list(result["servers"])
    parts = []
    for (connections,) in _distinct(rows, "connections"):
        value, digits, title = ("p50_ms", 1, "p50 in ms") if connections == 1 else ("requests_per_s", 0, "requests/s")
        lines = [
            [
                str(tokens),
                *(
                    _cell(_where(rows, server=server, tokens=tokens, connections=connections), value, digits)
                    for server in servers
                ),
            ]
            for (tokens,) in _distinct(rows, "tokens")
        ]
        plural = "" if connections == 1 else "s"
        parts.append(f"{connections} connection{plural}, {title}:\n\n{_table(['Tokens', *servers], lines)}")
    return "\n".join(parts)


def parity(result: Result) -> str:
    heads = ["Asked for", "Engine", "Rows", "Flips", "Smallest cosine", "Accuracy", "Accuracy of torch in fp32"]
    lines = [
        [
            row["server"],
            row["engine"],
            f"{row['rows']:,}",
            f"{row['flips']} ({row['flips'] / row['rows']:.2%})",
            f"{row['min_cosine']:.5f}",
            f"{row['accuracy']:.4f}",
            f"{row['reference_accuracy']:.4f}",
        ]
        for row in result["rows"]
    ]
    return _table(heads, lines)


def quality(result: Result) -> str:
    lines = []
    for (method,) in _distinct(result["rows"], "method"):
        these = _where(result["rows"], method=method)
        chosen = ", ".join(f"{row['chosen']} {row['report']:.4f}" for row in these)
        lines.append(
            [
                f"`{method}`",
                ", ".join(str(row["seed"]) for row in these),
                f"{statistics.mean(row['report'] for row in these):.4f}",
                chosen,
                _cell(these, "seconds", 0),
            ]
        )
    return _table(["Method", "Seeds", "Accuracy, mean", "Each", "Seconds"], lines)


def methods(result: Result) -> str:
    heads = ["Method", "Seeds", "Served accuracy, mean", "Request to served, s", "Training, s", "Peak MB", "Version MB"]
    lines = []
    for (name,) in _distinct(result["rows"], "name"):
        these = _where(result["rows"], name=name)
        accuracy = [row["served"] for row in these]
        spread = f" ± {_half_width(accuracy):.4f}" if len(accuracy) > 1 else ""
        lines.append(
            [
                name,
                str(len(these)),
                f"{statistics.mean(accuracy):.4f}{spread}",
                _cell(these, "served_s"),
                _cell(these, "train_s"),
                _cell(these, "peak_mb", 0),
                _cell(these, "version_mb"),
            ]
        )
    return _table(heads, lines)


def few_shot(result: Result) -> str:
    tables = [_few_shot_table(result, *named) for named in (("Accuracy", "accuracy"), ("Macro F1", "macro_f1"))]
    return f"{result['per_class']} rows a class, {result['test_rows']:,} test rows:\n\n" + "\n\n".join(tables)


def _few_shot_table(result: Result, title: str, metric: str) -> str:
    names = [name for (name,) in _distinct(result["rows"], "method")]
    gaps = _gaps(result, metric)
    lines = [
        [
            str(seed),
            *(f"{_figure(result, name, seed, metric):.4f}" for name in names),
            *([f"{gaps[seed]:+.4f}" if seed in gaps else "–"] if gaps else []),
        ]
        for (seed,) in _distinct(result["rows"], "seed")
    ]
    means = [statistics.mean(row[metric] for row in _where(result["rows"], method=name)) for name in names]
    total = ["mean", *(f"{mean:.4f}" for mean in means), *([_mean_gap(gaps)] if gaps else [])]
    head = [f"{title}, seed", *(f"`{name}`" for name in names), *(["`setfit` − `linear_probe`"] if gaps else [])]
    return _table(head, [*lines, total])


def _figure(result: Result, method: str, seed: int, metric: str) -> float:
    (row,) = _where(result["rows"], method=method, seed=seed)
    return float(row[metric])


def _gaps(result: Result, metric: str) -> dict[int, float]:
    """By seed, how much better `setfit` is than the probe on the same rows; none where one is missing."""
    seeds = {row["seed"] for row in _where(result["rows"], method="setfit")}
    return {
        row["seed"]: _figure(result, "setfit", row["seed"], metric) - row[metric]
        for row in _where(result["rows"], method="linear_probe")
        if row["seed"] in seeds
    }


def _mean_gap(gaps: Mapping[int, float]) -> str:
    values = list(gaps.values())
    spread = f" ± {_half_width(values):.4f} (95 %)" if len(values) > 1 else ""
    return f"{statistics.mean(values):+.4f}{spread}"


def _half_width(values: Sequence[float]) -> float:
    """Of the 95 % interval of the mean, by Student's t."""
    t = float(stdtrit(len(values) - 1, 0.975))
    return t * statistics.stdev(values) / math.sqrt(len(values))


def training(result: Result) -> str:
    ours = _where(result["rows"], run="polyhead")
    lines = []
    for (name,) in _distinct(result["rows"], "run"):
        these = _where(result["rows"], run=name)
        ratio = "–" if name == "polyhead" else _ratio_cell(_ratios_of(ours, "rows_per_s", these, "rows_per_s"))
        lines.append(
            [f"`{name}`", _cell(these, "rows_per_s"), ratio, _cell(these, "accuracy", 4), _cell(these, "peak_mib", 0)]
        )
    heads = ["Run", "Rows/s", "Ours, times as fast", "Test accuracy", "Peak memory, MiB"]
    return f"`{result['method']}`, one epoch of {result['training_rows']:,} rows:\n\n{_table(heads, lines)}"


def memory(result: Result) -> str:
    ends = {"training": "while it trained", "preparing_data": "when the data was ready"}
    rows = [row | {phase: row["phases_mb"].get(phase) for phase in ends} for row in result["rows"]]
    base = _where(rows, training_rows=rows[0]["training_rows"])
    lines = []
    for (count,) in _distinct(rows, "training_rows"):
        these = _where(rows, training_rows=count)
        more = "–" if these == base else f"{_more_mb(these, base, 'training'):+,.0f}"
        peaks = [_cell(these, name, 0) for name in ("preparing_data", "training", "peak_mb")]
        lines.append([f"{count:,}", _cell(these, "steps", 0), *peaks, more])
    heads = ["Training rows", "Steps", f"Peak MB {ends['preparing_data']}", ends["training"], "of the run"]
    return _table([*heads, "More than the first while it trained"], lines)


def _more_mb(rows: Sequence[Row], base: Sequence[Row], name: str = "peak_mb") -> float:
    return (_median(rows, name) or 0.0) - (_median(base, name) or 0.0)


def probe_job(result: Result) -> str:
    bare = _where(result["rows"], job="bare pass")
    lines = []
    for (job,) in _distinct(result["rows"], "job"):
        these = _where(result["rows"], job=job)
        ratio = "–" if these == bare else _ratio_cell(_ratios_of(these, "seconds", bare, "seconds"))
        lines.append([job, these[0]["engine"], _cell(these, "seconds", 1), ratio, _cell(these, "accuracy", 4)])
    rows = f"{result['train_rows']:,} rows to train and validate on, {result['test_rows']:,} to test:"
    return f"{rows}\n\n{_table(['Job', 'Engine', 'Seconds', 'Times the bare pass', 'Test accuracy'], lines)}"


def http_overhead(result: Result) -> str:
    """With one checkout microseconds alone, with two also those of the other and the ratio."""
    titles = {"base_us": "Before", "us": "Now", "ratio": "Ratio"}
    columns = [key for key in titles if key in next(iter(result["cases"].values()))]
    lines = [[case, *(shown(row[key]) for key in columns)] for case, row in result["cases"].items()]
    return _table(["Case", *(titles[key] for key in columns)], lines)


TABLES: dict[str, Callable[[Result], str]] = {
    function.__name__: function
    for function in (
        closed_loop,
        open_loop,
        overload,
        replay,
        many_models,
        hot_load,
        cold_start,
        event_streams,
        length_cost,
        parity,
        quality,
        methods,
        few_shot,
        training,
        memory,
        probe_job,
        http_overhead,
    )
}


def claims(results: Mapping[str, Result]) -> str:
    """What the project sets out to reach, as far as it was measured. Ratios are medians of the rounds."""
    lines = [line for part in _CLAIMS for line in part(results)]
    return _table(["What", "Measured", "Target"], lines)


def _claims_peers(results: Mapping[str, Result]) -> Iterable[list[str]]:
    result = results.get("closed-loop")
    if result is None or not _peers(result):
        return
    ours = _ours(result)[0]
    for mix in ("long", "short"):
        for connections, what in ((64, "Texts/s, 64 connections"), (1, "p50, 1 connection")):
            _, throughput, _, latency = _against_best(result, ours, mix, connections, 1)
            measured = latency if connections == 1 else throughput
            if measured != "–":
                yield [f"{what}, {mix} texts: times as good as the best peer", measured, ""]


def _claims_replay(results: Mapping[str, Result]) -> Iterable[list[str]]:
    if "replay" in results:
        these = _where(results["replay"]["rows"], mix="long")
        yield [
            "Texts/s over HTTP against the same batches through the engine, long texts",
            _cell(these, "ratio", 2),
            "≥ 0.85",
        ]


def _claims_models(results: Mapping[str, Result]) -> Iterable[list[str]]:
    if "many-models" not in results:
        return
    rows = results["many-models"]["rows"]
    cases = (("http", "head", 1, "requests_per_s", "≥ 0.95"), ("process", "lora", 0, "texts_per_s", "≥ 0.80"))
    for where, kind, fewest, value, target in cases:
        these = _where(rows, where=where, kind=kind, mix="long")
        if not these:
            continue
        most = max(row["models"] for row in these)
        ratio = _ratios_of(_where(these, models=most), value, _where(these, models=fewest), value)
        name = f"{most} heads in uniform mix against one" if kind == "head" else f"{most} LoRA adapters against none"
        yield [f"{name}, {'over HTTP' if where == 'http' else 'in process'}, long texts", _ratio_cell(ratio), target]
    memory = results["many-models"]["model_memory_bytes"]
    yield ["Memory of a further head; of a LoRA version", f"{_bytes(memory['head'])}; {_bytes(memory['lora'])}", ""]


def _claims_hot_load(results: Mapping[str, Result]) -> Iterable[list[str]]:
    rows = results["hot-load"]["rows"] if "hot-load" in results else []
    if "hot-load-full" in results:  # of a later state
        rows = [row for row in rows if row["kind"] != "full"] + results["hot-load-full"]["rows"]
    for kind, mix in _distinct(rows, "kind", "mix"):
        these = _where(rows, kind=kind, mix=mix)
        alone, swapped = ([row for row in these if bool(row["swaps"]) is wanted] for wanted in (False, True))
        failed = sum(row["failed"] for row in swapped)
        targets = {"p50_ms": 1.3, "p99_ms": 3} if kind == "full" else {"p99_ms": 1.5}
        for key, most in targets.items():
            ratio = _ratio_cell(_ratios_of(swapped, _near(swapped, key), alone, key))
            yield [
                f"{key[:3]} while versions of kind {kind} are loaded and swapped, {mix} texts",
                f"{ratio}, {failed} failed",
                f"≤ {most}, 0 failed",
            ]


def _claims_overload(results: Mapping[str, Result]) -> Iterable[list[str]]:
    if "overload" not in results:
        return
    ours = _ours(results["overload"])[0]
    for (mix,) in _distinct(results["overload"]["rows"], "mix"):
        these = _where(results["overload"]["rows"], mix=mix, server=ours)
        ratio = _ratio_cell(_ratios_of(these, "goodput", these, "peak"))
        yield [f"Goodput at twice the capacity against the peak, {mix} texts", ratio, "≥ 0.9"]
        yield [
            f"p99 of what was admitted then, ms, {mix} texts",
            _cell(these, "p99_ms", 0),
            f"< {shown(_bound(these), 0)}",
        ]


def _claims_training(results: Mapping[str, Result]) -> Iterable[list[str]]:
    rows = results["training"]["rows"] if "training" in results else []
    targets = {"trainer": "≥ 15", "trainer-bf16": "≥ 4"}
    ours = _where(rows, run="polyhead")
    for name in (name for (name,) in _distinct(rows, "run") if name in targets):
        ratio = _ratio_cell(_ratios_of(ours, "rows_per_s", _where(rows, run=name), "rows_per_s"))
        yield [f"LoRA, rows/s: times as fast as transformers' Trainer (`{name}`)", ratio, targets[name]]


def _claims_parity(results: Mapping[str, Result]) -> Iterable[list[str]]:
    for row in results["parity"]["rows"] if "parity" in results else []:
        measured = f"{row['flips'] / row['rows']:.2%}; {row['min_cosine']:.5f}"
        yield [f"Flips; smallest cosine: {row['engine']} against torch in fp32", measured, "≤ 0.10%; ≥ 0.999"]


def _claims_few_shot(results: Mapping[str, Result]) -> Iterable[list[str]]:
    for result in (one for one in results.values() if one.get("benchmark") == "few_shot"):
        for title, metric in (("Accuracy", "accuracy"), ("Macro F1", "macro_f1")):
            if gaps := _gaps(result, metric):
                what = f"{title} of setfit less that of the probe, {result['per_class']} rows a class, R8"
                yield [what, _mean_gap(gaps), "> 0"]


def _claims_memory(results: Mapping[str, Result]) -> Iterable[list[str]]:
    rows = results["memory"]["rows"] if "memory" in results else []
    few, many = _where(rows, training_rows=5_000), _where(rows, training_rows=50_000)
    if few and many:
        yield ["Peak memory of a LoRA run, MB: 50,000 rows against 5,000", f"{_more_mb(many, few):+,.0f}", "≤ +150"]


def _claims_probe_job(results: Mapping[str, Result]) -> Iterable[list[str]]:
    rows = results["probe-job"]["rows"] if "probe-job" in results else []
    bare, first, second = (
        _median(_where(rows, job=job), "seconds") for job in ("bare pass", "first", "second, at once")
    )
    if bare is not None and first is not None and second is not None:
        yield [
            "linear_probe on R8, request to served, s",
            f"{first:.1f}",
            f"≤ 1.3 × {bare:.1f} + 8 = {1.3 * bare + 8:.1f}",
        ]
        yield ["The second job on the same rows, s", f"{second:.1f}", "≤ 10"]


_CLAIMS = (
    _claims_peers,
    _claims_replay,
    _claims_models,
    _claims_hot_load,
    _claims_overload,
    _claims_parity,
    _claims_training,
    _claims_few_shot,
    _claims_memory,
    _claims_probe_job,
)


# Rows


def _where(rows: Sequence[Row], **values: Any) -> list[Row]:
    return [row for row in rows if all(row[key] == value for key, value in values.items())]


def _distinct(rows: Sequence[Row], *keys: str) -> list[tuple[Any, ...]]:
    """Each combination of values once, in the order in which they came."""
    return list(dict.fromkeys(tuple(row[key] for key in keys) for row in rows))


def _values(rows: Sequence[Row], key: str) -> list[float]:
    return [row[key] for row in sorted(rows, key=lambda row: row.get("round", 0)) if row.get(key) is not None]


def _median(rows: Sequence[Row], key: str) -> float | None:
    values = _values(rows, key)
    return statistics.median(values) if values else None


def _ratios_of(rows: Sequence[Row], key: str, others: Sequence[Row], other: str) -> Spread | None:
    """None where a round lacks one of the two."""
    mine, theirs = _values(rows, key), _values(others, other)
    return ratios(mine, theirs) if mine and len(mine) == len(theirs) else None


def _ours(result: Result) -> list[str]:
    return [name for name, about in result["servers"].items() if "info" in about]


def _peers(result: Result) -> list[str]:
    return [name for name, about in result["servers"].items() if "info" not in about]


def _against_best(result: Result, ours: str, mix: str, connections: int, texts: int) -> list[str]:
    """The peer with the most texts/s and how many times as many ours has; the one with the least p50, and the same."""

    def of(server: str) -> list[Row]:
        return _where(result["rows"], server=server, mix=mix, connections=connections, texts=texts)

    peers = [peer for peer in _peers(result) if of(peer)]
    if not peers or not of(ours):
        return ["–"] * 4
    most = max(peers, key=lambda peer: _median(of(peer), "texts_per_s") or 0.0)
    quickest = min(peers, key=lambda peer: _median(of(peer), "p50_ms") or float("inf"))
    return [
        f"{most} {shown(_median(of(most), 'texts_per_s'))}",
        _ratio_cell(_ratios_of(of(ours), "texts_per_s", of(most), "texts_per_s")),
        f"{quickest} {shown(_median(of(quickest), 'p50_ms'))}",
        _ratio_cell(_ratios_of(of(quickest), "p50_ms", of(ours), "p50_ms")),
    ]


def _bound(rows: Sequence[Row]) -> float | None:
    """The delay after which work is refused, and one batch."""
    bounds = [row["max_queue_delay_ms"] + row["batch_ms"] for row in rows if "batch_ms" in row]
    return statistics.median(bounds) if bounds else None


# Cells


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---"] * len(heads)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (heads, rule, *lines))


def _spread_cell(value: Spread, digits: int) -> str:
    if value.low == value.high:
        return shown(value.median, digits)
    return f"{shown(value.median, digits)} ({shown(value.low, digits)}–{shown(value.high, digits)})"


def _cell(rows: Sequence[Row], key: str, digits: int = 1) -> str:
    values = _values(rows, key)
    return _spread_cell(spread(values), digits) if values else "–"


def _ratio_cell(value: Spread | None) -> str:
    return "–" if value is None else _spread_cell(value, 2)


def _load_cell(rows: Sequence[Row], **where: Any) -> str:
    these = _where(rows, **where)
    return f"{_cell(these, 'texts_per_s')}; {shown(_median(these, 'p50_ms'))}; {shown(_median(these, 'p99_ms'))}"


def _lost(rows: Sequence[Row]) -> str:
    total = sum(sum(row["outcomes"].values()) for row in rows)
    return f"{1 - sum(row['outcomes'].get('200', 0) for row in rows) / total:.1%}"


def _outcomes(rows: Sequence[Row]) -> str:
    total = sum(sum(row["outcomes"].values()) for row in rows)
    names = sorted({name for row in rows for name in row["outcomes"]})
    return ", ".join(f"{name} {sum(row['outcomes'].get(name, 0) for row in rows) / total:.0%}" for name in names)


def _bytes(count: float) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"
