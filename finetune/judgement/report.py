"""The evaluation report: every method on validation, the winner in full, and what to make of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finetune.evaluation import report, score, summary
from finetune.judgement.curves import abstention, at_threshold, precision_recall, reliability, risk_coverage
from finetune.judgement.growth import measure_growth
from finetune.judgement.intervals import paired_difference
from finetune.judgement.mcnemar import compare
from finetune.judgement.slices import slices
from finetune.judgement.verdict import Figures, onset, verdict
from finetune.methods.candidate import Candidate
from finetune.run import Rows, Run
from modeling.weights import FloatArray

_MOST_CURVES = 50


@dataclass(frozen=True, slots=True)
class Assessment:
    """`evaluation` goes into the job and the version; `curves` are points to draw, in the version alone."""

    evaluation: dict[str, Any]
    curves: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the run came to: the methods tried, the chosen one, and how it answers the test rows as served."""

    candidates: Sequence[Candidate]
    best: Candidate
    test_logits: FloatArray | None
    temperature: float


def assess(run: Run, outcome: Outcome) -> Assessment:
    best, temperature = outcome.best, outcome.temperature
    evaluation: dict[str, Any] = {
        "metric": run.plan.metric,
        "chosen": best.method,
        "temperature": temperature,
        "methods": [_method(run, candidate) for candidate in outcome.candidates],
        "validation": _split(run, best.validation_logits, run.validation, temperature),
        "test": None,
        "rows": {"train": len(run.train.texts), "validation": len(run.validation.texts), "test": len(run.test.texts)},
    }
    curves = {"validation": _curves(run, best.validation_logits, run.validation, temperature)}
    if outcome.test_logits is not None:
        evaluation["test"] = _split(run, outcome.test_logits, run.test, temperature)
        curves["test"] = _curves(run, outcome.test_logits, run.test, temperature)
    evaluation["abstention"] = _abstention(run, outcome, curves["validation"]["risk_coverage"]["aurc"])
    evaluation["data_curve"] = measure_growth(run)
    evaluation["verdict"] = [judgement.as_dict() for judgement in verdict(_figures(run, outcome, evaluation))]
    curves["history"] = {"method": best.method, "metric": run.plan.metric, **_history(best)}
    return Assessment(evaluation, curves)


def _method(run: Run, candidate: Candidate) -> dict[str, Any]:
    return {
        "method": candidate.method,
        "seconds": round(candidate.seconds, 2),
        "validation": summary(candidate.validation_logits, run.validation.labels),
        "details": candidate.details,
    }


def _split(run: Run, logits: FloatArray, rows: Rows, temperature: float) -> dict[str, Any]:
    document = report(logits, rows.labels, run.labels, temperature=temperature, seed=run.plan.seed)
    document["slices"] = slices(
        rows.extras, rows.labels, logits.argmax(1), metric=run.plan.metric, seed=run.plan.seed
    )  # fmt: skip
    return document


def _curves(run: Run, logits: FloatArray, rows: Rows, temperature: float) -> dict[str, Any]:
    """Points of one side; the precision-recall curves of the 50 most frequent classes."""
    drawn = precision_recall(logits, rows.labels, run.labels)
    frequent = sorted(drawn, key=lambda one: -int((rows.labels == run.labels.index(one["label"])).sum()))
    return {
        "precision_recall": frequent[:_MOST_CURVES],
        "reliability": {
            "before": reliability(logits, rows.labels, temperature=1.0),
            "after": reliability(logits, rows.labels, temperature=temperature),
        },
        "risk_coverage": risk_coverage(logits, rows.labels, temperature=temperature),
    }


def _abstention(run: Run, outcome: Outcome, aurc: float | None) -> dict[str, Any]:
    """The threshold chosen on validation, and what it gives on test; without a target only the area."""
    target, temperature = run.plan.abstain.target_accuracy, outcome.temperature
    found: dict[str, Any] = {"aurc": aurc, "target_accuracy": target, "threshold": None}
    if target is None:
        return found
    chosen = abstention(
        outcome.best.validation_logits, run.validation.labels, temperature=temperature, target_accuracy=target
    )
    found |= {"threshold": chosen["threshold"], "validation": {key: chosen[key] for key in ("coverage", "accuracy")}}
    if chosen["threshold"] is not None and outcome.test_logits is not None:
        found["test"] = at_threshold(
            outcome.test_logits, run.test.labels, temperature=temperature, threshold=chosen["threshold"]
        )
    return found


def _figures(run: Run, outcome: Outcome, evaluation: dict[str, Any]) -> Figures:
    best, side = outcome.best, "test" if evaluation["test"] else "validation"
    return Figures(
        method=best.method, metric=run.plan.metric, side_name=side, side=evaluation[side],
        history=best.details.get("history", []), stopped=best.details.get("stopped"),
        train_score=_train_score(run, best), validation_score=evaluation["validation"][run.plan.metric],
        against_baseline=_against_baseline(run, outcome),
        is_baseline_best=best.method == "baseline" and len(outcome.candidates) > 1,
        data_curve=evaluation["data_curve"],
    )  # fmt: skip


def _train_score(run: Run, best: Candidate) -> float | None:
    """Of the probe, whose vectors are at hand; what is trained step by step has its history instead."""
    if best.method != "linear_probe" or best.head is None or not run.has_features("train"):
        return None
    return score(run.plan.metric, best.head.logits(run.features("train")), run.train.labels)


def _against_baseline(run: Run, outcome: Outcome) -> dict[str, Any] | None:
    found = [candidate for candidate in outcome.candidates if candidate.method == "baseline"]
    if not found or outcome.best is found[0]:
        return None
    labels = run.validation.labels
    own, other = (one.validation_logits.argmax(1) == labels for one in (outcome.best, found[0]))
    difference, interval = paired_difference(own, other, seed=run.plan.seed)
    return {"difference": difference, "interval_95": interval, **compare(own, other)}


def _history(best: Candidate) -> dict[str, Any]:
    entries = best.details.get("history", [])
    found = onset(entries)
    return {
        "entries": entries,
        "best_step": best.details.get("best_step"),
        "overfits_after_step": None if found is None else found["step"],
    }
