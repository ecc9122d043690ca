"""Which engine serves, by what was measured: the fastest whose answers stay those of the reference. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# An engine has to be this much faster than the reference to be worth a second copy of the weights.
MIN_GAIN = 1.05


@dataclass(frozen=True, slots=True)
class ParityBound:
    """How far an engine's answers may differ from torch in fp32. The largest change of a probability is not bounded:

    bf16 moves one by 0.02 without a single other answer.
    """

    max_flips: float = 0.001
    min_cosine: float = 0.999


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """`engine` is written `runtime/precision`; `refused` says of each other one why it does not serve."""

    engine: str
    refused: dict[str, str]


def choose(
    reports: Sequence[Mapping[str, Any]],
    *,
    reference: str,
    bound: ParityBound = ParityBound(),
    least_gain: float = MIN_GAIN,
) -> EngineChoice:
    """Choose the fastest of `reports`, fields of `EngineReport`, inside the bound and with at least `least_gain` times
    the reference's speed; else the reference."""
    refused = {}
    eligible = {}
    for report in reports:
        if report["engine"] == reference:
            continue
        reason = _refusal(report, bound)
        if reason is None:
            eligible[report["engine"]] = float(report["texts_per_s"])
        else:
            refused[report["engine"]] = reason
    baseline = next((r["texts_per_s"] for r in reports if r["engine"] == reference and r["texts_per_s"]), 0.0)
    fastest = max(eligible, key=lambda engine: (eligible[engine], engine), default=None)
    if fastest is None or eligible[fastest] < least_gain * baseline:
        slower = {name: f"{speed:.0f} inputs/s, the reference {baseline:.0f}" for name, speed in eligible.items()}
        return EngineChoice(reference, refused | slower)
    best = eligible[fastest]
    slower = {name: f"{v:.0f} inputs/s, the fastest {best:.0f}" for name, v in eligible.items() if name != fastest}
    return EngineChoice(fastest, refused | slower)


def _refusal(report: Mapping[str, Any], bound: ParityBound) -> str | None:
    if report["error"] is not None:
        return str(report["error"])
    if not report["texts_per_s"] or report["flips"] is None or report["min_cosine"] is None:
        return "not measured"
    if not report["min_cosine"] >= bound.min_cosine:
        return f"cosine {report['min_cosine']:.5f} to the reference, at least {bound.min_cosine} is asked for"
    if not report["flips"] <= bound.max_flips:
        return f"{report['flips']:.2%} of the answers differ, at most {bound.max_flips:.2%} may"
    return None
