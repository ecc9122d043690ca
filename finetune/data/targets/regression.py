"""One finite number per row."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from finetune.data.records import Finding, row_finding
from finetune.data.spellings import NUMBER, NumberSpelling, number_spelling, plain_number
from finetune.data.targets.base import Keys, Target
from finetune.data.targets.metric import Metric
from modeling.inputs import BadCell

if TYPE_CHECKING:
    from finetune.data.labelled import LabelledRows

_MOST_BINS, _ROWS_PER_BIN = 10, 10


@dataclass(frozen=True, slots=True)
class NumberTarget(Target):
    """A number has a decimal point or, where the column shows it, a decimal comma, and thousands may be apart."""

    spelling: NumberSpelling | None = None
    example: str = ""
    kind: ClassVar[str] = "regression"
    empty_code: ClassVar[str] = "non_numeric_target"
    losses: ClassVar[tuple[str, ...]] = ("mse", "huber")
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("rmse", "RMSE", is_error=True, is_share=False),
        Metric("mae", "MAE", is_error=True, is_share=False),
        Metric("r2", "R²", is_share=False),
    )
    refuses: ClassVar[dict[str, str]] = {
        name: f"{name} needs classes, and the target is a number; leave it out"
        for name in (
            *("class_weights", "oversample", "label_smoothing", "abstain"),
            *("rare_classes", "min_rows_per_class"),
        )
    }

    @classmethod
    def of(cls, task: str, cells: Iterable[str | None]) -> Self:
        return cls(task, *number_spelling(cells))

    def told(self, column: str) -> list[Finding]:
        if self.spelling not in {"point", "comma"}:
            return []
        mark = "comma" if self.spelling == "comma" else "point"
        message = f"numbers in column {column!r} have a decimal {mark} or thousands apart: {self.example!r} is read as "
        message += f"{float(self.read(self.example)):g}"
        fix = "nothing to do, or write numbers with a point and without separators of thousands"
        return [Finding(code="number_format", severity="info", message=message, column=column, fix=fix)]

    def read(self, cell: str) -> str:
        text = plain_number(cell.strip(), self.spelling)
        if self.spelling == "unclear" and "," in text:
            what = f"holds {text[:60]!r}, which could be read with a decimal comma or a comma of thousands: the column "
            what += "mixes both, or shows neither"
            how = "write 1234.5 in every row, with a point and without separators of thousands"
            raise BadCell(what, code="non_numeric_target", fix=how)
        fix = "write a finite number, such as 3.5 or -1e3, in every row; for words choose a classification task"
        if not NUMBER.fullmatch(text) or not math.isfinite(float(text)):
            raise BadCell(f"holds {text[:60]!r}, which is no finite number", code="non_numeric_target", fix=fix)
        return repr(float(text) + 0.0)  # without the sign of zero

    def names_of(self, label: str) -> tuple[str, ...]:
        return ()

    def strata(self, labels: Sequence[str]) -> list[str]:
        """Bins of equally many rows by value, ten at most."""
        values = np.array([float(label) for label in labels])
        bins = min(_MOST_BINS, len(values) // _ROWS_PER_BIN)
        if bins < 2:
            return ["0"] * len(values)
        edges = np.quantile(values, np.arange(1, bins) / bins)
        return [str(place) for place in np.searchsorted(edges, values, side="right").tolist()]

    def findings(self, rows: LabelledRows, groups: Keys, needed: int) -> list[Finding]:
        """One value everywhere, and fewer different inputs than sides, are errors."""
        if len(set(rows.labels)) == 1:
            return [
                row_finding(
                    code="constant_target",
                    severity="error",
                    rows=rows.row_numbers.tolist(),
                    message=f"{'the only row has' if len(rows) == 1 else f'all {len(rows):,} rows have'} the target "
                    f"{float(rows.labels[0]):g}; there is nothing to learn",
                    fix="add rows with other values, or choose another label column",
                )
            ]
        inputs = len(set(groups))
        if inputs < needed:
            return [
                row_finding(
                    code="class_too_small",
                    severity="error",
                    rows=rows.row_numbers.tolist(),
                    count=inputs,
                    message=f"there are only {inputs} different {rows.modality.plural} (near duplicates count once) "
                    f"for {needed} sides",
                    fix="add rows, or bring validation and test data",
                )
            ]
        return []

    def conflicts(self, rows: LabelledRows, keys: Keys) -> list[Finding]:
        """Equal inputs whose targets are further apart than one standard deviation of all."""
        values = np.array([float(label) for label in rows.labels])
        _, one = np.unique(np.asarray(keys), return_inverse=True)
        low, high = np.full(one.max() + 1, np.inf), np.full(one.max() + 1, -np.inf)
        np.minimum.at(low, one, values)
        np.maximum.at(high, one, values)
        is_apart = high - low > values.std()
        if not is_apart.any():
            return []
        affected = np.flatnonzero(is_apart[one])
        first = int(affected[0])
        return [
            row_finding(
                code="conflicting_labels",
                severity="warning",
                rows=rows.row_numbers[affected].tolist(),
                message=f"{int(is_apart.sum()):,} {rows.modality.plural} have targets more than a standard deviation "
                f"({values.std():.3g}) apart, the first (row {rows.row_numbers[first]}) "
                f"with {low[one[first]]:g} and {high[one[first]]:g}",
                fix=f"keep one target per {rows.modality.name}, for example the mean",
            )
        ]
