"""From figures to sentences: what a practitioner would say after reading the report. Pure.

Each judgement has a code for programs, a severity, one sentence with its figures, and the figures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from finetune.data.records import Finding
from finetune.data.targets import metric_of
from finetune.data.targets.base import all_named

Severity = Literal["good", "info", "warning"]

_FEW_ROWS = 30
_LEAST_JUDGED = 20  # validation rows
_LEAST_CALIBRATED = 100  # rows
_WELL_CALIBRATED = 0.03
_POORLY_CALIBRATED = 0.08
_WORTH_HALF_A_POINT = 0.005
_KNOWN_WELL = 0.06
_LEAST_LOSS_RISE = 0.05  # of the validation loss, relative to its lowest
_SIGNIFICANT = 0.05


@dataclass(frozen=True, slots=True)
class Judgement:
    code: str
    severity: Severity
    message: str
    evidence: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Figures:
    """What is judged. `side` is the report of the test rows, or of validation without any.

    `history` is the chosen method's evaluations; `against_baseline` compares both on validation and is
    None where the baseline was not trained or won; `data_curve` is of `judgement.data_curve`. `train_score` and
    `validation_score` are of `fit_metric` (the metric where that is empty), which should reach `least_fit`. `cut_short`
    and `left_out` are of the evaluation, `foreign_texts` of the data; `validation_rows` None: they are enough.
    """

    method: str
    metric: str
    side_name: str
    side: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]] = ()
    stopped: str | None = None
    train_score: float | None = None
    validation_score: float | None = None
    against_baseline: Mapping[str, Any] | None = None
    is_baseline_best: bool = False
    data_curve: Mapping[str, Any] | None = None
    fit_metric: str = ""
    least_fit: float = 0.8
    is_on_training_rows: bool = False
    validation_rows: int | None = None
    cut_short: Mapping[str, Any] | None = None
    left_out: Sequence[Mapping[str, str]] = ()
    foreign_texts: Sequence[Finding] = ()


def verdict(figures: Figures) -> list[Judgement]:
    """Every judgement that the figures support, warnings first. Few rows support few of them."""
    found = [
        *_cut_short(figures),
        *_left_out(figures),
        *_foreign_texts(figures),
        *_underfitting(figures),
        *_overfitting(figures),
        *_baseline(figures),
        *_more_data(figures),
        *_unjudged_classes(figures),
        *_small_classes(figures),
        *_calibration(figures),
        *_held_out(figures),
    ]
    order = {"warning": 0, "info": 1, "good": 2}
    return sorted(found, key=lambda judgement: order[judgement.severity])


def _cut_short(figures: Figures) -> list[Judgement]:
    cut = figures.cut_short
    if cut is None:
        return []
    why = "The job was cancelled" if cut["by"] == "cancel" else "max_seconds was used up"
    steps, total = cut.get("steps"), cut.get("total_steps")
    parts = [f"{cut['method']} was trained for {steps} of {total} steps"] if total and (steps or 0) < total else []
    if cut["not_trained"]:
        parts.append(f"{', '.join(cut['not_trained'])} {'was' if len(cut['not_trained']) == 1 else 'were'} not trained")
    told = f"{why} before the end" + (f": {'; '.join(parts)}" if parts else "")
    return [Judgement("cut_short", "warning", f"{told}. The figures are of what there was by then.", cut)]


def _left_out(figures: Figures) -> list[Judgement]:
    """Methods that `auto` did not train, but for those that a cancel cut off."""
    found = [one for one in figures.left_out if one["reason"] != "cancelled"]
    if not found:
        return []
    message = " ".join(_sentence(one["message"]) for one in found)
    return [Judgement("methods_left_out", "info", message, {"left_out": found})]


def _foreign_texts(figures: Figures) -> list[Judgement]:
    return [
        Judgement(found.code, "warning", f"{_sentence(found.message)} {_sentence(found.fix)}", found.model_dump())
        for found in figures.foreign_texts
    ]


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def of_rerun(found: Mapping[str, Any]) -> Judgement:
    """What a comparison of weights comes to."""
    if found["is_equal"]:
        return Judgement("rerun_is_equal", "good", found["message"], found)
    if found["is_equal"] is None:
        return Judgement("rerun_not_compared", "info", found["message"], found)
    return Judgement("rerun_differs", "warning", found["message"], found)


def _has_few_rows(figures: Figures) -> bool:
    """Whether the validation rows are too few to see more than chance in them."""
    return figures.validation_rows is not None and figures.validation_rows < _LEAST_JUDGED


def onset(history: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Where overfitting sets in: the evaluation with the lowest validation loss, if it rises clearly afterwards
    (by a twentieth, and to the end) while the training loss goes on falling. None where it does not."""
    if len(history) < 3:
        return None
    losses = [float(entry["loss"]) for entry in history]
    lowest = min(range(len(losses)), key=lambda index: losses[index])
    last = len(losses) - 1
    if lowest == last or losses[last] < losses[lowest] * (1 + _LEAST_LOSS_RISE):
        return None
    train = [float(entry["train_loss"]) for entry in history]
    if not train[last] < train[lowest]:
        return None
    return {
        "step": history[lowest]["step"],
        "epoch": history[lowest].get("epoch"),
        "loss": losses[lowest],
        "last_loss": losses[last],
        "train_loss": train[lowest],
        "last_train_loss": train[last],
        "gap": losses[last] - train[last],
    }


def _overfitting(figures: Figures) -> list[Judgement]:
    found = None if _has_few_rows(figures) else onset(figures.history)
    if found is None:
        return _memorised(figures)
    message = (
        f"Overfitting sets in after step {found['step']} (epoch {found['epoch']}): the validation loss rises from "
        f"{found['loss']:.4f} to {found['last_loss']:.4f} while the training loss falls from "
        f"{found['train_loss']:.4f} to {found['last_train_loss']:.4f}, a gap of {found['gap']:.4f} at the end. "
        "Fewer epochs, a lower learning rate or more rows would help."
    )
    return [Judgement("overfitting", "warning", message, found)]


def _memorised(figures: Figures) -> list[Judgement]:
    """Without a history: the training rows are answered far better than those held out."""
    train, validation = figures.train_score, figures.validation_score
    if figures.history or train is None or validation is None or train - validation < 0.1:
        return []
    if _has_few_rows(figures) or train - validation < _chance_of(validation, figures.validation_rows):
        return []
    message = (
        f"{figures.fit_metric or figures.metric} is {train:.3f} on the training rows and {validation:.3f} on "
        f"validation, a gap of {train - validation:.3f}: the method fits its rows better than the task. More rows or "
        "stronger regularisation would help."
    )
    evidence = {"train": train, "validation": validation, "gap": train - validation}
    return [Judgement("overfitting", "warning", message, evidence)]


def _chance_of(share: float, rows: int | None) -> float:
    """Two standard errors of a share of this number of rows."""
    return 0.0 if not rows else 2 * math.sqrt(max(0.0, share * (1 - share)) / rows)


def _underfitting(figures: Figures) -> list[Judgement]:
    history = figures.history
    if _has_few_rows(figures):
        return []
    if len(history) >= 2 and figures.stopped in {"all epochs are done", "max_seconds is used up"}:
        return _still_improving(figures)
    train, validation = figures.train_score, figures.validation_score
    if train is None or validation is None or train >= figures.least_fit or train - validation >= 0.05:
        return []
    message = (
        f"Underfitting: {figures.fit_metric or figures.metric} is only {train:.3f} on the training rows themselves "
        f"({validation:.3f} on validation). A method that changes the backbone (lora, full) or cleaner labels would "
        "help."
    )
    return [Judgement("underfitting", "warning", message, {"train": train, "validation": validation})]


def _still_improving(figures: Figures) -> list[Judgement]:
    """Both losses still fall at the end, by more than a twentieth over the last evaluation."""
    before, last = figures.history[-2], figures.history[-1]
    falls = [1 - float(last[name]) / max(1e-9, float(before[name])) for name in ("loss", "train_loss")]
    gain = metric_of(figures.metric).gain
    if min(falls) < 0.05 or gain(float(last[figures.metric])) < gain(float(before[figures.metric])):
        return []
    message = (
        f"Underfitting: at the last step ({last['step']}) the validation loss was still falling, from "
        f"{before['loss']:.4f} to {last['loss']:.4f} over the last evaluation, and {figures.metric} stood at "
        f"{last[figures.metric]:.4f}. More epochs, a longer max_seconds or a higher learning rate would help."
    )
    evidence = {
        "step": last["step"],
        "loss_before": before["loss"],
        "loss": last["loss"],
        figures.metric: last[figures.metric],
        "stopped": figures.stopped,
    }
    return [Judgement("underfitting", "warning", message, evidence)]


def _baseline(figures: Figures) -> list[Judgement]:
    if figures.is_baseline_best:
        of = "" if figures.validation_rows is None else f"{figures.validation_rows} "
        message = f"The baseline (tf-idf and a linear model) was the best on the {of}validation rows: no method that "
        message += "needs a backbone did better there."
        return [Judgement("baseline_is_best", "info", message, {"method": figures.method})]
    against = figures.against_baseline
    if against is None:
        return []
    low, high = against["interval_95"]
    interval = f"95 % interval {low:+.4f} to {high:+.4f}"
    name, test = against.get("metric", "accuracy"), against.get("test", "McNemar")
    shown = f"{against['difference']:+.4f} ({interval}, {test} p {against['p_value']:.3f})"
    rows = f"{against['rows']} validation rows"
    if against["p_value"] >= _SIGNIFICANT or against.get("gain", against["difference"]) <= 0:
        message = (
            f"The baseline is as good as far as {rows} can tell: the {name} of {figures.method} differs by {shown}. "
            "The baseline is far cheaper to serve."
        )
        return [Judgement("baseline_as_good", "warning", message, against)]
    message = f"{figures.method} beats the baseline on {rows}: its {name} differs by {shown}."
    return [Judgement("beats_baseline", "good", message, against)]


def _more_data(figures: Figures) -> list[Judgement]:
    curve = figures.data_curve
    if curve is None:
        return []
    last, following = curve["last_doubling"], curve["next_doubling"]
    now = curve["points"][-1]["accuracy"]
    low, high = following["range"]
    past = (
        f"going from {last['from_rows']} to {last['to_rows']} training rows changed the accuracy of {curve['method']} "
        f"by {last['gain']:+.4f} (95 % interval {last['interval_95'][0]:+.4f} to {last['interval_95'][1]:+.4f})"
    )
    expected = following["accuracy"] - now
    if not _has_few_rows(figures) and last["interval_95"][0] > 0 and expected >= _WORTH_HALF_A_POINT:
        message = (
            f"More data would help: {past}; with {following['rows']} rows some {following['accuracy']:.3f} "
            f"({low:.3f} to {high:.3f}) can be expected after {now:.3f} now."
        )
        return [Judgement("more_data_would_help", "info", message, curve)]
    # That it would hardly help can be said only of a change that is known well.
    if last["interval_95"][1] < _WORTH_HALF_A_POINT or (
        expected < _WORTH_HALF_A_POINT and last["interval_95"][1] - last["interval_95"][0] < _KNOWN_WELL
    ):
        message = f"More data of this kind would hardly help: {past}."
        return [Judgement("more_data_would_hardly_help", "info", message, curve)]
    message = f"Whether more data would help cannot be told from these rows: {past}."
    return [Judgement("more_data_unclear", "info", message, curve)]


def _unjudged_classes(figures: Figures) -> list[Judgement]:
    names = [row["label"] for row in figures.side.get("per_class", []) if not row["rows"]]
    if not names:
        return []
    verb = "has" if len(names) == 1 else "have"
    message = (
        f"{len(names)} of {len(figures.side['per_class'])} classes {verb} no {figures.side_name} row, so nothing is "
        f"known of how they are answered: {all_named(names)}."
    )
    return [Judgement("classes_not_judged", "warning", message, {"classes": names})]


def _small_classes(figures: Figures) -> list[Judgement]:
    small = {row["label"]: row["rows"] for row in figures.side.get("per_class", []) if row["rows"] < _FEW_ROWS}
    if not small:
        return []
    rarest = sorted(small.items(), key=lambda item: item[1])
    shown = ", ".join(f"{label} ({rows})" for label, rows in rarest[:10]) + (", …" if len(rarest) > 10 else "")
    verb = "has" if len(small) == 1 else "have"
    message = (
        f"{len(small)} of {len(figures.side['per_class'])} classes {verb} fewer than {_FEW_ROWS} {figures.side_name} "
        f"rows and cannot be judged one by one: {shown}."
    )
    return [Judgement("classes_too_small", "warning", message, {"rows": small, "least": _FEW_ROWS})]


def _calibration(figures: Figures) -> list[Judgement]:
    if "ece_after" not in figures.side:
        return []
    before, after, rows = figures.side["ece_before"], figures.side["ece_after"], figures.side["rows"]
    chance = figures.side.get("ece_by_chance", 0.0)
    evidence = {"ece_before": before, "ece_after": after, "rows": rows, "ece_by_chance": chance}
    shown = f"calibration error {after:.3f} on {rows:.0f} {figures.side_name} rows ({before:.3f} before)"
    is_chance = after <= chance
    if rows < _LEAST_CALIBRATED or (is_chance and chance >= _POORLY_CALIBRATED):
        message = f"These rows are too few to tell how far probabilities can be trusted: {shown}; perfect ones would "
        return [Judgement("calibration_unknown", "info", f"{message}show up to {chance:.3f} by chance.", evidence)]
    if after <= _WELL_CALIBRATED:
        return [Judgement("calibrated", "good", f"Probabilities can be taken at their word: {shown}.", evidence)]
    if after >= _POORLY_CALIBRATED and not is_chance:
        message = f"Probabilities cannot be taken at their word: {shown}."
        return [Judgement("poorly_calibrated", "warning", message, evidence)]
    return [Judgement("roughly_calibrated", "info", f"Probabilities are roughly right: {shown}.", evidence)]


def _held_out(figures: Figures) -> list[Judgement]:
    if figures.side_name == "test":
        return []
    if figures.is_on_training_rows:
        message = (
            "No row is held out: the figures are those of the rows that were trained on, and say nothing of others."
        )
        return [Judgement("nothing_held_out", "warning", message, {"rows": figures.side["rows"]})]
    message = "There are no test rows: the figures are those of the rows that the choice was made on, and flatter it."
    return [Judgement("no_test_rows", "warning", message, {"rows": figures.side["rows"]})]
