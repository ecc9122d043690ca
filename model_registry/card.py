"""The model card: what a version is, on what data, how good, what to make of it, and where its limits are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from model_registry.manifest import ModelManifest

_MOST_SLICES = 5
_MOST_NAMED = 200
_PICTURES = {
    "eval/learning_curves.svg": "Learning curves",
    "eval/confusion_matrix.svg": "Confusion matrix",
    "eval/precision_recall.svg": "Precision and recall per class",
    "eval/calibration.svg": "Calibration",
    "eval/risk_coverage.svg": "Accuracy against the share of rows answered",
    "eval/predicted.svg": "Predicted against true values",
}


@dataclass(frozen=True, slots=True)
class TaskTerms:
    """What a card says by the kind of task: metrics to compare methods by, with their titles; figures of the manifest
    that are shown beside those with an interval; and what the figures do not hold for."""

    compared: Mapping[str, str]
    limit: str
    figures: Sequence[str] = ()


def render_card(
    manifest: ModelManifest,
    evaluation: Mapping[str, Any],
    terms: TaskTerms,
    *,
    metadata: Mapping[str, str],
    fingerprint: Mapping[str, Any],
    environment: Mapping[str, Any],
    files: Sequence[str],
) -> str:
    """Markdown. `evaluation` is the report stored beside it; what it does not hold for a task has no section.

    `metadata` is the request's, `fingerprint` and `environment` are the version's documents, `files` its paths.
    """
    side = "test" if evaluation["test"] else "validation"
    parts = [
        _head(manifest, evaluation, metadata),
        _verdict(evaluation.get("verdict") or []),
        _quality(manifest, evaluation, side, terms),
        _slices(evaluation[side].get("slices") or []),
        _abstention(evaluation.get("abstention") or {}),
        _pictures(files),
        _methods(evaluation, terms),
        _promotion(evaluation.get("promotion")),
        _data(manifest, evaluation, fingerprint),
        _environment(environment),
        _limits(evaluation, side, terms),
    ]
    return "\n".join(line for part in parts for line in part)


def _head(manifest: ModelManifest, evaluation: Mapping[str, Any], metadata: Mapping[str, str]) -> list[str]:
    base = manifest.base
    shown = f"{base.name} ({base.source}, sha256 {base.digest[:16]}…)" if base else "none"
    labels = f", {len(manifest.labels)} labels: {', '.join(manifest.labels[:50])}" if manifest.labels else ""
    return [
        f"# {manifest.name}, version {manifest.version}",
        "",
        f"- Task: {manifest.task}{labels}",
        f"- Method: {manifest.method}; backbone: {shown}",
        f"- Job: {manifest.job_id or 'none'}; chosen by {evaluation.get('metric', 'macro_f1')} on validation",
        *(f"- {key}: {value}" for key, value in metadata.items()),
        "",
    ]


def _verdict(judgements: Sequence[Mapping[str, Any]]) -> list[str]:
    if not judgements:
        return []
    marks = {"warning": "**Warning.** ", "good": "", "info": ""}
    return ["## Verdict", "", *(f"- {marks[one['severity']]}{one['message']}" for one in judgements), ""]


def _quality(manifest: ModelManifest, evaluation: Mapping[str, Any], side: str, terms: TaskTerms) -> list[str]:
    numbers = evaluation[side]
    return [
        f"## Quality on the {side} rows",
        "",
        "| metric | value | 95 % interval |",
        "|---|---|---|",
        *_figures(manifest, numbers, terms),
        "",
        *_calibration(numbers, evaluation),
        *_per_class(numbers.get("per_class") or []),
        *_residuals(numbers.get("residuals")),
    ]


def _figures(manifest: ModelManifest, numbers: Mapping[str, Any], terms: TaskTerms) -> list[str]:
    """Those with an interval first, then the manifest's own that the task's terms name."""
    intervals = numbers.get("intervals_95") or {}
    more = {name: value for name, value in manifest.metrics.items() if name in terms.figures}
    values = {name: numbers.get(name, more.get(name)) for name in [*intervals, *more] if name != "rows"}
    ranges = {name: f"{low:.4f} to {high:.4f}" for name, (low, high) in intervals.items()}
    return [
        f"| {name} | {value:.4f} | {ranges.get(name, '–')} |" for name, value in values.items() if value is not None
    ]


def _calibration(numbers: Mapping[str, Any], evaluation: Mapping[str, Any]) -> list[str]:
    if "ece_after" not in numbers:
        return []
    return [
        f"Calibration error {numbers['ece_after']:.4f} after temperature {evaluation['temperature']:.3f}, "
        f"{numbers['ece_before']:.4f} before." + _by_chance(numbers),
        "",
    ]


def _by_chance(numbers: Mapping[str, Any]) -> str:
    chance = numbers.get("ece_by_chance")
    return "" if chance is None else f" Faultless probabilities would show up to {chance:.4f} on this number of rows."


def _per_class(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """With the threshold of each label where it has one of its own."""
    if not rows:
        return []
    has_thresholds = "threshold" in rows[0]
    lines = ["| label | precision | recall | F1 | rows |", "|---|---|---|---|---|"]
    if has_thresholds:
        lines = [f"{lines[0]} threshold |", f"{lines[1]}---|"]
    for row in rows:
        shown = (_figure(row[name], ".3f") for name in ("precision", "recall", "f1"))
        line = f"| {_cell(row['label'])} | {' | '.join(shown)} "
        lines.append(line + f"| {row['rows']} |" + (f" {row['threshold']:.3f} |" if has_thresholds else ""))
    return [*lines, ""]


def _residuals(found: Mapping[str, Any] | None) -> list[str]:
    if found is None:
        return []
    shown = ", ".join(f"{float(share):.0%}: {value:+.4g}" for share, value in found["quantiles"].items())
    return [f"Residuals (predicted minus true): mean {found['mean']:+.4g}; quantiles {shown}.", ""]


def _slices(columns: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for column in columns:
        metric = column["metric"]
        lines += [f"## The lowest slices by {column['column']}", "", f"| value | rows | {metric} | 95 % interval |"]
        lines += ["|---|---|---|---|"]
        for row in column["values"][:_MOST_SLICES]:
            low, high = row["interval_95"]
            lines.append(f"| {_cell(row['value'])} | {row['rows']} | {row[metric]:.3f} | {low:.3f} to {high:.3f} |")
        few = column["left_out"]["too_few_rows"]
        lines += ["", f"{few['values']} values with {few['rows']} rows are too small to show.", ""]
    return lines


def _abstention(found: Mapping[str, Any]) -> list[str]:
    if found.get("target_accuracy") is None:
        return []
    if found["threshold"] is None:
        told = f"No threshold reaches the accuracy {found['target_accuracy']:g} on the validation rows."
        return ["## Abstention", "", told, ""]
    lines = [
        "## Abstention",
        "",
        f"`threshold` {found['threshold']:.4f} for the accuracy {found['target_accuracy']:g}:",
    ]
    for side in ("validation", "test"):
        if found.get(side) and found[side]["accuracy"] is not None:
            answered, accuracy = found[side]["coverage"], found[side]["accuracy"]
            lines.append(f"- {side}: {answered:.1%} of the rows are answered, {accuracy:.4f} of them right")
    return [*lines, ""]


def _pictures(files: Sequence[str]) -> list[str]:
    """Those with a title of their own in its order, then the others under their names."""
    others = sorted(path for path in files if path.startswith("eval/") and path.endswith(".svg"))
    titles = {path: path.removeprefix("eval/").removesuffix(".svg").replace("_", " ").capitalize() for path in others}
    found = [f"![{title}]({path})" for path, title in (_PICTURES | titles | _PICTURES).items() if path in files]
    return ["## Pictures", "", *found, ""] if found else []


def _methods(evaluation: Mapping[str, Any], terms: TaskTerms) -> list[str]:
    columns = terms.compared
    return [
        "## Methods compared on validation",
        "",
        f"| method | {' | '.join(columns.values())} | seconds |",
        "|---|" + "---|" * (len(columns) + 1),
        *(
            f"| {item['method']} | {' | '.join(_figure(item['validation'].get(name)) for name in columns)} "
            f"| {item['seconds']} |"
            for item in evaluation["methods"]
        ),
        "",
        *(f"{item['method']} failed: {_cell(item['reason'])}\n" for item in evaluation.get("failed_methods") or []),
    ]


def _figure(value: float | None, form: str = ".4f") -> str:
    return "–" if value is None else format(value, form)


def _promotion(judged: Mapping[str, Any] | None) -> list[str]:
    if judged is None:
        return []
    against = f"version {judged['champion']}" if judged["champion"] else "no champion"
    outcome = "all passed" if judged["is_passed"] else "not passed"
    gates = [f"- {gate['gate']} {gate['status']}: {gate['message']}" for gate in judged["gates"]]
    return [f"## Gates, against {against}: {outcome}", "", *gates, ""] if gates else []


def _data(manifest: ModelManifest, evaluation: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> list[str]:
    rows = evaluation["rows"]
    given = fingerprint.get("datasets") or {"train": manifest.dataset}
    lines = [
        "## Data",
        "",
        f"{rows['train']} rows for training, {rows['validation']} for validation, {rows['test']} for test.",
        "",
        *(f"- {side}: {one.get('id')}, sha256 {one.get('sha256')}" for side, one in given.items()),
    ]
    return [*lines, "- a hash of every row on each side: `data/fingerprint.json`", ""]


def _environment(environment: Mapping[str, Any]) -> list[str]:
    if not environment:
        return []
    libraries = ", ".join(f"{name} {version}" for name, version in environment["libraries"].items())
    return [
        "## Environment",
        "",
        f"Python {environment['python']} on {environment['machine']}, {environment['device']}, "
        f"{environment['cpu_threads']} threads, seed {environment['seed']}; {libraries}. "
        "The resolved plan is `train/params.json`, the events are `train/events.jsonl`.",
        "",
    ]


def _cell(text: str) -> str:
    """User text inside a table: nothing of it ends the cell or the row."""
    return " ".join(text.split()).replace("|", "\\|")


def _limits(evaluation: Mapping[str, Any], side: str, terms: TaskTerms) -> list[str]:
    lines = [
        "## Limits",
        "",
        f"The figures hold for inputs like those it was tested on. {terms.limit} "
        "The backbone's licence and its training data apply to this version too.",
    ]
    absent = [one["label"] for one in evaluation.get("not_judged") or []]
    if absent:
        named = ", ".join(_cell(label) for label in absent[:_MOST_NAMED]) + (", …" if len(absent) > _MOST_NAMED else "")
        lines.append(f"Nothing is known of how these classes are answered, for no {side} row has them: {named}.")
    if side == "validation":
        lines.append("The method and its settings were chosen on these same rows, so the figures flatter it.")
    if (evaluation.get("abstention") or {}).get("threshold") is not None:
        lines.append("The abstention threshold was set on the validation rows and drifts with the data.")
    return [*lines, ""]
