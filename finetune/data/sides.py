"""From the datasets of a job to its three sides: cut, checked for leaks, with all that was found.

Pure. Decides the order of `splits`, `given_sides`, `duplicates` and `findings`; the recipe calls it.

A leak is a training (or validation) row whose input, or a near duplicate of it, is on a later side too.
Where inputs decide the side (`hash`, `stratified`, `random`) there is none. Where a column decides (`group`,
`time`), the earlier row is left out. Sides that the request gave are only reported on, for their figures are to
compare with those of others. `split.leaks` may say otherwise.

A class with too few inputs to be on every side trains, where inputs decide, and none of its rows is held out. If all
classes are so rare, those with two inputs are divided after all; if none has two, the training rows serve as
validation rows, which is told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from finetune.data.duplicates import Duplicates, find_duplicates
from finetune.data.findings import inspect_rows
from finetune.data.given_sides import predefined_sides, time_sides
from finetune.data.labelled import LabelledRows
from finetune.data.options import TEST, TRAIN, VALIDATION, RareClasses, SplitOptions
from finetune.data.rare import inputs_by_name, rare_names, settle
from finetune.data.records import Finding, has_errors, row_finding
from finetune.data.splits import Split, split_rows

Indices = npt.NDArray[np.int64]
_SIDES = ("training", "validation", "test")


@dataclass(frozen=True, slots=True)
class Sides:
    """The rows of each side and what was found; with an error among the findings the rows mean nothing."""

    train: LabelledRows
    validation: LabelledRows
    test: LabelledRows
    findings: list[Finding]


def divide(
    train: LabelledRows,
    validation: LabelledRows | None,
    test: LabelledRows | None,
    *,
    options: SplitOptions,
    seed: int,
    rare: RareClasses = RareClasses(),
) -> Sides:
    """The three sides of a job; what the request did not bring is cut off the training rows."""
    options = options.resolved()
    parts = [train, validation, test]
    given = [part if part is not None else train.take(_NONE) for part in parts]
    duplicates = find_duplicates([example for part in given for example in part.examples], train.modality)
    given, duplicates, findings = settle(given, duplicates, rare)
    pool = _Pool(given, duplicates, [part is not None for part in parts])
    pool.findings += findings
    if options.strategy in {"group", "time", "predefined"} and len(train) > 0:
        return _by_column(pool, options, seed)
    return _by_input(pool, options, seed, rare.least)


_NONE = np.zeros(0, np.int64)


class _Pool:
    """All rows of a job: whose they are now, and which were given as a side of their own."""

    def __init__(self, given: Sequence[LabelledRows], duplicates: Duplicates, is_given: Sequence[bool]) -> None:
        self.given, self.duplicates, self.is_given = given, duplicates, list(is_given)
        self.offsets = np.cumsum([0, *(len(rows) for rows in given)])
        self.rows = [np.arange(self.offsets[side], self.offsets[side + 1]) for side in range(3)]
        self.findings: list[Finding] = []

    def side(self, side: int) -> LabelledRows:
        """The rows of a side as they are now; validation and test may hold rows of the training dataset."""
        source = TRAIN if not self.is_given[side] else side
        return self.given[source].take(self.rows[side] - self.offsets[source])

    def assign(self, split: Split) -> None:
        """Gives rows of the training side (positions within it) to the sides that were not given."""
        rows = self.rows[TRAIN]
        for side, part in ((VALIDATION, split.validation), (TEST, split.test)):
            if not self.is_given[side]:
                self.rows[side] = np.concatenate([self.rows[side], rows[part]])
        self.rows[TRAIN] = rows[split.train]

    def leaked(self, side: int, later: Sequence[int], *, exactly: bool) -> npt.NDArray[np.bool_]:
        """Which rows of `side` share an input (or a near duplicate) with a later side."""
        numbers = self.duplicates.input_of if exactly else self.duplicates.group_of
        others = np.concatenate([_NONE, *(numbers[self.rows[other]] for other in later)])
        return np.isin(numbers[self.rows[side]], others)

    def inspect(self, *, min_rows_per_class: int) -> None:
        order = np.concatenate(self.rows)
        sides = [self.side(side) for side in range(3)]
        self.findings += inspect_rows(
            *sides,
            min_rows_per_class=min_rows_per_class,
            duplicates=self.duplicates.take(order),
            cut=[_SIDES[side] for side in (VALIDATION, TEST) if not self.is_given[side]],
        )

    def train_groups(self) -> list[int]:
        """The group of near duplicates of each training row."""
        groups: list[int] = self.duplicates.group_of[self.rows[TRAIN]].tolist()
        return groups

    def hold_out_something(self) -> None:
        """Gives validation the rows of test, or else those of training, if it has none."""
        if len(self.rows[VALIDATION]) or self.is_given[VALIDATION] or not len(self.rows[TRAIN]):
            return
        if len(self.rows[TEST]) and not self.is_given[TEST]:
            self.rows[VALIDATION], self.rows[TEST] = self.rows[TEST], _NONE
            return
        self.rows[VALIDATION] = self.rows[TRAIN].copy()
        self.findings.append(_nothing_held_out(self.side(TRAIN)))

    def result(self) -> Sides:
        order = ("error", "warning", "info")
        findings = sorted(self.findings, key=lambda finding: order.index(finding.severity))
        return Sides(self.side(TRAIN), self.side(VALIDATION), self.side(TEST), findings)


def _by_input(pool: _Pool, options: SplitOptions, seed: int, least: int) -> Sides:
    if options.leaks == "drop":
        _drop(pool, [side for side in (VALIDATION, TEST) if pool.is_given[side]])
    shares = _shares(pool, options)
    needed = _needed(pool, 1 + sum(share > 0 for share in shares), least)
    pool.inspect(min_rows_per_class=needed)
    if has_errors(pool.findings):
        return pool.result()
    assert options.strategy in {"hash", "stratified", "random"}
    pool.assign(
        split_rows(
            pool.side(TRAIN),
            strategy=options.strategy,
            validation=shares[0],
            test=shares[1],
            seed=seed,
            duplicates=pool.duplicates.take(pool.rows[TRAIN]),
            rare=rare_names(pool.side(TRAIN), pool.train_groups(), needed),
        )
    )
    pool.hold_out_something()
    return pool.result()


def _needed(pool: _Pool, sides: int, least: int) -> int:
    """How many inputs a class must have for its rows to be held out: `least`, but 2 or 1 if no class has more. For
    numbers, and if nothing is cut off, the sides."""
    sizes = [len(own) for own in inputs_by_name(pool.side(TRAIN), pool.train_groups()).values()]
    if sides == 1 or not sizes:
        return sides
    return next(needed for needed in (least, 2, 1) if needed == 1 or max(sizes) >= needed)


def _nothing_held_out(rows: LabelledRows) -> Finding:
    return row_finding(
        code="nothing_held_out",
        severity="warning",
        rows=[],
        count=len(rows),
        message=f"no class has two different {rows.modality.plural}, so none can be held out: the training rows "
        "serve as validation rows, and the figures are those of rows that were trained on",
        fix="add rows of the same classes, or bring a validation_dataset",
    )


def _shares(pool: _Pool, options: SplitOptions) -> tuple[float, float]:
    """What is still to be cut off for validation and test."""
    validation = 0.0 if pool.is_given[VALIDATION] else options.validation
    return validation, 0.0 if pool.is_given[TEST] else options.test


def _by_column(pool: _Pool, options: SplitOptions, seed: int) -> Sides:
    match options.strategy:
        case "predefined":
            _assign_predefined(pool, options, seed)
        case "time":
            _assign_by_time(pool, options)
        case _:
            _assign_by_group(pool, options, seed)
    if has_errors(pool.findings):
        return pool.result()
    if options.leaks == "drop":
        _drop(pool, [VALIDATION, TEST])
    pool.inspect(min_rows_per_class=1)
    pool.findings += _absent_classes(pool)
    pool.hold_out_something()
    return pool.result()


def _assign_predefined(pool: _Pool, options: SplitOptions, seed: int) -> None:
    assert options.column is not None
    rows = pool.side(TRAIN)
    sides, findings = predefined_sides(rows, options.column)
    pool.findings += findings or _misnamed(pool, rows, sides, options.column)
    if has_errors(pool.findings):
        return
    pool.assign(Split.of(sides))
    missing = [side for side in (VALIDATION, TEST) if not pool.is_given[side] and len(pool.rows[side]) == 0]
    shares = [
        share if side in missing else 0.0
        for side, share in zip((VALIDATION, TEST), _shares(pool, options), strict=True)
    ]
    if any(shares):
        pool.findings.append(
            _made_from_training(
                options.column, [_SIDES[side] for side, share in zip((VALIDATION, TEST), shares, strict=True) if share]
            )
        )
        pool.assign(
            split_rows(
                pool.side(TRAIN),
                strategy="hash",
                validation=shares[0],
                test=shares[1],
                seed=seed,
                duplicates=pool.duplicates.take(pool.rows[TRAIN]),
            )
        )


def _misnamed(pool: _Pool, rows: LabelledRows, sides: npt.NDArray[np.int8], column: str) -> list[Finding]:
    """Rows for a side that the request gave as a dataset, or no row to train on."""
    doubled = np.flatnonzero([pool.is_given[side] and side != TRAIN for side in sides.tolist()])
    if len(doubled):
        name = _SIDES[int(sides[doubled[0]])]
        return [
            row_finding(
                code="unknown_split",
                severity="error",
                column=column,
                rows=rows.row_numbers[doubled].tolist(),
                message=f"column {column!r} names {name} rows, and a {name}_dataset was given too",
                fix=f"leave out {name}_dataset, or those rows",
            )
        ]
    if not (sides == TRAIN).any():
        return [
            row_finding(
                code="unknown_split",
                severity="error",
                column=column,
                rows=rows.row_numbers.tolist(),
                message=f"column {column!r} names no row for training",
                fix="write train in the rows to train on",
            )
        ]
    return []


def _made_from_training(column: str, sides: list[str]) -> Finding:
    return row_finding(
        code="unknown_split",
        severity="info",
        column=column,
        rows=[],
        count=len(sides),
        message=f"column {column!r} names no row for {' and '.join(sides)}: cut off the training rows by strategy hash",
        fix="nothing to do, or name such rows; split.test 0 goes without test rows",
    )


def _assign_by_time(pool: _Pool, options: SplitOptions) -> None:
    assert options.time_column is not None
    shares = _shares(pool, options)
    sides, findings = time_sides(pool.side(TRAIN), options.time_column, validation=shares[0], test=shares[1])
    pool.findings += findings
    pool.assign(Split.of(sides))


def _assign_by_group(pool: _Pool, options: SplitOptions, seed: int) -> None:
    assert options.group_column is not None
    rows, shares = pool.side(TRAIN), _shares(pool, options)
    values = rows.extras[options.group_column]
    pool.findings += _group_findings(pool, rows, options.group_column, 1 + sum(share > 0 for share in shares))
    if not has_errors(pool.findings):
        pool.assign(split_rows(rows, strategy="group", validation=shares[0], test=shares[1], seed=seed, groups=values))


def _group_findings(pool: _Pool, rows: LabelledRows, column: str, wanted: int) -> list[Finding]:
    values = rows.extras[column]
    empty = [row for row, value in enumerate(values) if value is None]
    findings = []
    if empty:
        findings.append(
            row_finding(
                code="empty_value",
                severity="warning",
                column=column,
                rows=rows.row_numbers[empty].tolist(),
                message=f"{len(empty):,} rows have no value in the group column {column!r}; each is a group by itself",
                fix=f"fill in {column!r} where rows belong together",
            )
        )
    groups = len({value.strip() for value in values if value is not None}) + len(empty)
    if groups < wanted:
        findings.append(
            row_finding(
                code="class_too_small",
                severity="error",
                column=column,
                rows=rows.row_numbers.tolist(),
                count=groups,
                message=f"column {column!r} has {groups} groups, too few for {wanted} sides: a group never parts",
                fix="add rows of other groups, or choose another split.strategy",
            )
        )
    return findings + _groups_across(pool, rows, column)


def _groups_across(pool: _Pool, rows: LabelledRows, column: str) -> list[Finding]:
    """Groups of the training data that a dataset given apart has too."""
    known = {value.strip() for value in rows.extras[column] if value is not None}
    found = []
    for side in (VALIDATION, TEST):
        own = pool.given[side]
        shared = [row for row, value in enumerate(own.extras.get(column, [])) if value and value.strip() in known]
        if shared:
            found.append(
                row_finding(
                    code="split_overlap",
                    severity="warning",
                    column=column,
                    rows=own.row_numbers[shared].tolist(),
                    message=f"{len(shared):,} rows of the {_SIDES[side]} data are of groups that the training data has "
                    "too",
                    fix="move each group to one of the two; scores come out too high otherwise",
                )
            )
    return found


def _drop(pool: _Pool, later: Sequence[int]) -> None:
    """Leaves out training rows that leak into the sides in `later`, and validation rows that leak into test.

    A class keeps its rows where all of them would go, and is reported by the inspection as a leak instead.
    """
    for side in (TRAIN, VALIDATION):
        others = [other for other in later if other > side]
        if not others or (side == VALIDATION and pool.is_given[VALIDATION]):
            continue
        rows = pool.side(side)
        leaked = pool.leaked(side, others, exactly=False)
        leaked &= ~_would_vanish(rows, leaked)
        if leaked.any() and not leaked.all():
            exact = int((leaked & pool.leaked(side, others, exactly=True)).sum())
            pool.findings.append(_dropped(_SIDES[side], rows.row_numbers[leaked].tolist(), exact, rows.modality.name))
            pool.rows[side] = pool.rows[side][~leaked]


def _would_vanish(rows: LabelledRows, leaked: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    left = rows.take(np.flatnonzero(~leaked)).names()
    return np.array([not left.issuperset(rows.target.names_of(label)) for label in rows.labels], bool)


def _dropped(side: str, rows: list[int], exact: int, what: str) -> Finding:
    return row_finding(
        code="near_duplicate_across_splits",
        severity="warning",
        rows=rows,
        message=f"{len(rows):,} {side} rows are left out, since a later side has their {what} ({exact:,}) or a near "
        "duplicate of it",
        fix="nothing to do; split.leaks keep trains on them all the same, and scores come out too high",
    )


def _absent_classes(pool: _Pool) -> list[Finding]:
    """Classes of the training side that a side cut by a column lacks: nothing is measured for them."""
    train = pool.side(TRAIN)
    found = []
    for side in (VALIDATION, TEST):
        own = pool.side(side)
        absent = train.names() - own.names()
        if absent and len(own) and not pool.is_given[side]:
            rows = train.numbers_with(absent)
            named = ", ".join(map(repr, sorted(absent)[:5])) + (" …" if len(absent) > 5 else "")
            found.append(
                row_finding(
                    code="class_too_small",
                    severity="warning",
                    rows=rows,
                    count=len(absent),
                    message=f"the {_SIDES[side]} side has no row of {named}; nothing is measured for them there",
                    fix="add rows, move the borders of the split, or choose another split.strategy",
                )
            )
    return found


def with_extras(rows: LabelledRows, names: Sequence[str]) -> LabelledRows:
    """The rows with each of the columns, None in every row where the data lacks one."""
    return replace(rows, extras={name: rows.extras.get(name, [None] * len(rows)) for name in names})
