"""The evaluation report: every method on validation, the winner in full, and what to make of it."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from finetune.evaluation.curves import abstention, at_threshold
from finetune.evaluation.tasks.rules import Side
from finetune.evaluation.verdict import Figures, onset, verdict
from finetune.training.learning_curve import measure_growth
from finetune.training.methods.candidate import Candidate
from finetune.training.run_context import Rows, Run
from modeling.tasks import Calibration
from modeling.weights import FloatArray


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the run came to: the methods tried, the chosen one, and how it answers the test rows as served."""

    candidates: Sequence[Candidate]
    best: Candidate
    test_logits: FloatArray | None
    answering: Calibration
    cut_short: dict[str, Any] | None = None


def assess(run: Run, outcome: Outcome) -> tuple[dict[str, Any], dict[str, Any]]:
    """The evaluation, for the job and the version, and the curves: points to draw, in the version alone."""
    best, rules = outcome.best, run.rules
    sides = {"validation": _side(run, best.validation_logits, run.validation, outcome.answering)}
    if outcome.test_logits is not None:
        sides["test"] = _side(run, outcome.test_logits, run.test, outcome.answering)
    evaluation: dict[str, Any] = {
        "task": run.plan.task,
        "metric": run.plan.metric,
        "chosen": best.method,
        "temperature": outcome.answering.temperature,
        "methods": [_method(run, candidate) for candidate in outcome.candidates],
        "failed_methods": run.failed_methods,
        "validation": None,
        "test": None,
        "rows": {"train": len(run.train), "validation": len(run.validation), "test": len(run.test)},
        "not_judged": _not_judged(run),
    } | {name: rules.report(side) for name, side in sides.items()}
    evaluation["cut_short"], evaluation["left_out"] = outcome.cut_short, list(run.left_out)
    curves = {name: rules.curves(side) for name, side in sides.items()}
    evaluation["abstention"] = _abstention(run, outcome, curves["validation"])
    evaluation["data_curve"] = measure_growth(run) if rules.grows else None
    evaluation["verdict"] = [asdict(judgement) for judgement in verdict(_figures(run, outcome, evaluation))]
    curves["history"] = {"method": best.method, "metric": run.plan.metric, **_history(best)}
    return evaluation, curves


def _not_judged(run: Run) -> list[dict[str, Any]]:
    """The classes or labels without a row on the side that the figures are of, with their rows on every side."""
    if not run.rules.has_labels:
        return []
    sides = {"train": run.train, "validation": run.validation, "test": run.test}
    counts = {name: run.rules.counts(rows.labels, run.labels) for name, rows in sides.items()}
    deciding = counts["test" if len(run.test) else "validation"]
    absent = [name for name in run.labels if not deciding[name]]
    return [{"label": name, **{side: counts[side][name] for side in sides}} for name in absent]


def _method(run: Run, candidate: Candidate) -> dict[str, Any]:
    return {
        "method": candidate.method,
        "seconds": round(candidate.seconds, 2),
        "validation": run.rules.summary(candidate.validation_logits, run.validation.labels),
        "details": candidate.details,
    }


def _side(run: Run, outputs: FloatArray, rows: Rows, answering: Calibration) -> Side:
    return Side(
        outputs,
        rows.labels,
        run.labels,
        rows.extras,
        answering=answering,
        metric=run.plan.deciding,
        seed=run.plan.seed,
        numbers=rows.numbers,
    )


def _abstention(run: Run, outcome: Outcome, curves: dict[str, Any]) -> dict[str, Any] | None:
    """The threshold chosen on validation, and what it gives on test; without a target only the area. None where answers
    have no confidence to go by."""
    if "risk_coverage" not in curves:
        return None
    target, temperature = run.plan.abstain.target_accuracy, outcome.answering.temperature
    found: dict[str, Any] = {"aurc": curves["risk_coverage"]["aurc"], "target_accuracy": target, "threshold": None}
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
    fit_metric = run.rules.fit_metric or run.plan.metric
    return Figures(
        method=best.method,
        metric=run.plan.metric,
        side_name=side,
        side=evaluation[side],
        history=best.details.get("history", []),
        stopped=best.details.get("stopped"),
        train_score=_train_score(run, best, fit_metric),
        validation_score=evaluation["validation"][fit_metric],
        against_baseline=_against_baseline(run, outcome),
        is_baseline_best=best.method == "baseline" and len(outcome.candidates) > 1,
        data_curve=evaluation["data_curve"],
        fit_metric=fit_metric,
        validation_rows=len(run.validation),
        cut_short=outcome.cut_short,
        left_out=run.left_out,
        foreign_texts=run.foreign_texts,
        least_fit=run.rules.least_fit,
        is_on_training_rows=len(run.train) == len(run.validation)
        and all(map(operator.is_, run.train.examples, run.validation.examples)),
    )


def _train_score(run: Run, best: Candidate, metric: str) -> float | None:
    """Of the probe, whose vectors are at hand; what is trained step by step has its history instead."""
    if best.method != "linear_probe" or best.head is None or not run.has_features("train"):
        return None
    return run.rules.score(metric, best.head.logits(run.features("train")), run.train.labels)


def _against_baseline(run: Run, outcome: Outcome) -> dict[str, Any] | None:
    found = [candidate for candidate in outcome.candidates if candidate.method == "baseline"]
    if not found or outcome.best is found[0]:
        return None
    side = _side(run, outcome.best.validation_logits, run.validation, outcome.answering)
    return run.rules.compare(side, found[0].validation_logits)


def _history(best: Candidate) -> dict[str, Any]:
    entries = best.details.get("history", [])
    found = onset(entries)
    return {
        "entries": entries,
        "best_step": best.details.get("best_step"),
        "overfits_after_step": None if found is None else found["step"],
    }
