"""The report's pictures as SVG: the same bytes for the same figures. Needs matplotlib, imported when called.

Each function draws one picture into a fresh figure and knows nothing of files.
"""

from __future__ import annotations

import importlib.util
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_STYLE: Any = {
    "svg.hashsalt": "polyhead",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e5e5e5",
    "legend.frameon": False,
    "text.parse_math": False,  # a label may hold dollar signs
}
_TRAIN, _HELD_OUT, _MARK, _FAINT = "#b45309", "#1d4ed8", "#b91c1c", "#9ca3af"
_FEW_ROWS = 10
_MOST_CLASSES, _MOST_NUMBERED, _MOST_NAMED_CURVES = 40, 20, 8


def draw(evaluation: Mapping[str, Any], curves: Mapping[str, Any], labels: Sequence[str]) -> dict[str, bytes]:
    """SVG files by name, of the test rows where there are some; none where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return {}
    side = "test" if evaluation["test"] else "validation"
    numbers, points = evaluation[side], curves[side]
    drawable: dict[str, tuple[bool, Callable[[], Any]]] = {
        "confusion_matrix": (
            "confusion_matrix" in numbers,
            lambda: confusion(numbers["confusion_matrix"], labels, side),
        ),
        "precision_recall": ("precision_recall" in points, lambda: precision_recall(points["precision_recall"], side)),
        "calibration": ("reliability" in points, lambda: calibration(points["reliability"], numbers, side)),
        "risk_coverage": (
            "risk_coverage" in points,
            lambda: risk_coverage(points["risk_coverage"], evaluation["abstention"], side),
        ),
        "predicted": ("predicted" in points, lambda: predicted(points["predicted"], numbers, side)),
    }
    wanted = {name: make for name, (is_there, make) in drawable.items() if is_there}
    if len(curves["history"]["entries"]) >= 2:
        wanted["learning_curves"] = lambda: learning(curves["history"])
    import matplotlib

    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # glyphs that the font lacks: the viewer's fonts draw the text
        return {f"{name}.svg": _svg(make()) for name, make in wanted.items()}


def _svg(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="tight")


def learning(history: Mapping[str, Any]) -> Any:
    """Loss on both sides and the metric on validation, by step; the best step and the onset of overfitting marked."""
    entries, metric = history["entries"], history["metric"]
    steps = [entry["step"] for entry in entries]
    figure = _figure(8.0, 3.4)
    loss, score = figure.subplots(1, 2)
    loss.plot(steps, [entry["train_loss"] for entry in entries], color=_TRAIN, marker=".", label="training")
    loss.plot(steps, [entry["loss"] for entry in entries], color=_HELD_OUT, marker=".", label="validation")
    loss.set(title=f"Loss of {history['method']}", xlabel="step")
    score.plot(steps, [entry[metric] for entry in entries], color=_HELD_OUT, marker=".", label="validation")
    score.set(title=f"{metric} on validation", xlabel="step")
    for axis in (loss, score):
        if history["best_step"]:
            axis.axvline(history["best_step"], color="black", linestyle="--", linewidth=1, label="best, kept")
        if history["overfits_after_step"] is not None:
            axis.axvspan(history["overfits_after_step"], steps[-1], color=_MARK, alpha=0.1, lw=0, label="overfitting")
        low, high = axis.get_ylim()
        axis.set_ylim(low, high + 0.15 * (high - low))  # space at the top for the legend
    loss.legend(loc="upper right", fontsize=8)
    return figure


def confusion(matrix: Sequence[Sequence[int]], labels: Sequence[str], side: str) -> Any:
    """Rows are the true classes, shaded by their share; the 40 most frequent classes at most."""
    import numpy as np

    counts = np.asarray(matrix, dtype=np.int64)
    has_rows: list[bool] = (counts.sum(1) > 0).tolist()
    kept = np.sort(np.argsort(-(counts.sum(1) + counts.sum(0)), kind="stable")[:_MOST_CLASSES])
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    counts, shares = counts[np.ix_(kept, kept)], shares[np.ix_(kept, kept)]
    size = min(9.0, 3.0 + 0.38 * len(kept))
    figure = _figure(size + 0.8, size)
    axis = figure.subplots()
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    names = [_short(labels[index]) for index in kept]
    marked = [name if has_rows[index] else f"{name} (no row)" for index, name in zip(kept, names, strict=True)]
    axis.set_xticks(range(len(kept)), names, rotation=90)
    axis.set_yticks(range(len(kept)), marked)
    if len(kept) <= _MOST_NUMBERED:
        for row, column in np.argwhere(counts > 0):
            color = "white" if shares[row, column] > 0.5 else "black"
            axis.text(column, row, str(counts[row, column]), ha="center", va="center", color=color, fontsize=8)
    of = f", {len(kept)} most frequent of {len(labels)} classes" if len(kept) < len(labels) else ""
    axis.set(title=f"Answers on the {side} rows{of}", xlabel="answer", ylabel="true class")
    axis.grid(False)
    figure.colorbar(image, ax=axis, fraction=0.04, label="share of the true class")
    return figure


def precision_recall(curves: Sequence[Mapping[str, Any]], side: str) -> Any:
    """One curve a class; the eight with the least average precision are named."""
    figure = _figure(6.6, 4.2)
    axis = figure.subplots()
    ordered = sorted(curves, key=lambda curve: curve["average_precision"])
    for curve in reversed(ordered[_MOST_NAMED_CURVES:]):
        axis.step(*_steps(curve), where="pre", color=_FAINT, linewidth=0.8)
    for curve in ordered[:_MOST_NAMED_CURVES]:
        label = f"{_short(curve['label'])} ({curve['average_precision']:.3f})"
        axis.step(*_steps(curve), where="pre", linewidth=1.5, label=label)
    title = f"Precision and recall on the {side} rows"
    axis.set(title=title, xlabel="recall", ylabel="precision", xlim=(0, 1.01), ylim=(0, 1.03))
    heading = "average precision" + (", the lowest" if len(ordered) > _MOST_NAMED_CURVES else "")
    axis.legend(title=heading, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _steps(curve: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """From recall 0, where the first answers are."""
    return [0.0, *curve["recall"]], [curve["precision"][0], *curve["precision"]]


def calibration(reliability: Mapping[str, Any], numbers: Mapping[str, Any], side: str) -> Any:
    """Accuracy by confidence before and after the temperature, above the rows in each bin."""
    figure = _figure(5.2, 4.8)
    above, below = figure.subplots(2, 1, height_ratios=[3, 1], sharex=True)
    above.plot([0, 1], [0, 1], color=_FAINT, linewidth=1, linestyle=":", label="perfect")
    for name, color, error in (("before", _FAINT, "ece_before"), ("after", _HELD_OUT, "ece_after")):
        bins = reliability[name]["bins"]
        confidence = [one["confidence"] for one in bins]
        label = f"{name} temperature {reliability['after']['temperature']:.2f} (error {numbers[error]:.3f})"
        above.plot(confidence, [one["accuracy"] for one in bins], color=color, marker="o", markersize=4, label=label)
        few = [one for one in bins if one["rows"] < _FEW_ROWS]
        above.plot(
            [one["confidence"] for one in few],
            [one["accuracy"] for one in few],
            linestyle="",
            marker="o",
            markersize=4,
            markerfacecolor="white",
            markeredgecolor=color,
            zorder=3,
        )
    above.plot([], [], " ", label=f"hollow: fewer than {_FEW_ROWS} rows")
    bins = reliability["after"]["bins"]
    below.bar(
        [one["low"] for one in bins],
        [one["rows"] for one in bins],
        width=[one["high"] - one["low"] for one in bins],
        align="edge",
        color=_HELD_OUT,
        edgecolor="white",
    )
    above.set(title=f"Confidence against accuracy on the {side} rows", ylabel="accuracy", ylim=(0, 1.03))
    above.legend(fontsize=8, loc="lower right", frameon=True, framealpha=0.9, edgecolor="none")
    below.set(xlabel="confidence", ylabel="rows", xlim=(0, 1.01), yscale="log")
    below.yaxis.set_major_formatter("{x:.0f}")
    return figure


def risk_coverage(curve: Mapping[str, Any], abstention: Mapping[str, Any], side: str) -> Any:
    """Accuracy of the most confident answers by their share, with the abstention threshold where one was chosen."""
    figure = _figure(5.2, 3.6)
    axis = figure.subplots()
    axis.plot(curve["coverage"], curve["accuracy"], color=_HELD_OUT, label=f"area of the error {curve['aurc']:.4f}")
    chosen = abstention.get(side)
    if abstention["threshold"] is not None and chosen and chosen["accuracy"] is not None:
        label = f"threshold {abstention['threshold']:.3f}"
        axis.plot([chosen["coverage"]], [chosen["accuracy"]], "o", color=_MARK, label=label)
        axis.axhline(abstention["target_accuracy"], color=_FAINT, linestyle="--", linewidth=1, label="target accuracy")
    axis.set(
        title=f"Accuracy when only the confident {side} rows are answered",
        xlabel="share of the rows answered",
        ylabel="accuracy",
        xlim=(0, 1.01),
        ylim=(max(0.0, min(curve["accuracy"], default=0.0) - 0.02), 1.003),
    )
    axis.legend(fontsize=8, loc="lower left")
    return figure


def predicted(points: Mapping[str, Sequence[float]], numbers: Mapping[str, Any], side: str) -> Any:
    """Predicted values against true ones, with the line on which the two agree."""
    figure = _figure(5.2, 4.8)
    axis = figure.subplots()
    true, values = points["true"], points["predicted"]
    ends = [min([*true, *values]), max([*true, *values])]
    axis.plot(ends, ends, color=_FAINT, linewidth=1, linestyle=":", label="perfect")
    label = f"rmse {numbers['rmse']:.4g}, r2 {numbers['r2']:.3f}"
    axis.plot(true, values, linestyle="", marker="o", markersize=3, alpha=0.5, color=_HELD_OUT, label=label)
    axis.set(title=f"Predicted and true values of the {side} rows", xlabel="true value", ylabel="predicted value")
    axis.legend(fontsize=8, loc="upper left")
    return figure


def _short(label: str) -> str:
    printable = "".join(character if character.isprintable() else "?" for character in label)
    return printable if len(printable) <= 22 else printable[:21] + "…"
