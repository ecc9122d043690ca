"""What every reader yields and reports: batches of rows in bounded memory, limits, and a log of findings.

Knows no file format. The readers fill it, `check` drains it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from finetune.data.records import ROWS_SHOWN, Finding, Severity

ROW_COLUMN = "__row__"
_NAME_CHARACTERS = 256


@dataclass(frozen=True, slots=True)
class Limits:
    """How much of a file is accepted. `row_bytes` bounds one line; `batch_*` bound what is in memory.

    An archive may have this many `entries` (a zip `zip_entries`: its table of contents is held in memory), bytes of
    names, and bytes in a file that a cell names, and unpack to `unpacked_ratio` times its size plus
    `unpacked_slack_bytes`, at most to `unpacked_bytes`.
    """

    rows: int = 10_000_000
    columns: int = 2000
    cell_bytes: int = 1_000_000
    row_bytes: int = 32 * 1024 * 1024
    batch_rows: int = 65_536
    batch_cells: int = 1_000_000
    batch_characters: int = 16 * 1024 * 1024
    entries: int = 500_000
    zip_entries: int = 150_000
    directory_bytes: int = 64 * 1024 * 1024
    unpacked_bytes: int = 16 * 1024**3
    unpacked_ratio: int = 100
    unpacked_slack_bytes: int = 16 * 1024 * 1024
    file_bytes: int = 32 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class RowBatch:
    """Some rows, column by column in the order of `RowSource.columns`. Values are exactly as given."""

    row_numbers: list[int]
    columns: list[list[str | None]]


@dataclass(frozen=True, slots=True)
class RowSource:
    """An open file: its column names and its rows, to be read once. The cells of the columns in `files` name files."""

    columns: tuple[str, ...]
    batches: Iterator[RowBatch]
    files: frozenset[str] = frozenset()


NOTHING = RowSource(columns=(), batches=iter(()))


@dataclass(slots=True)
class _Occurrences:
    code: str
    severity: Severity
    message: str
    fix: str
    column: str | None
    rows: list[int] = field(default_factory=list)
    count: int = 0


class FindingLog:
    """Gathers problems of one kind into one finding: the first message, the first rows, the count."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[str, str | None], _Occurrences] = {}

    def note(
        self,
        kind: str,
        message: str,
        *,
        fix: str,
        code: str = "parse_error",
        severity: Severity = "error",
        row: int = 0,
        column: str | None = None,
    ) -> None:
        """Files one occurrence. `row` 0 is the header or the file as a whole."""
        key = (kind, column)
        if key not in self._kinds:
            self._kinds[key] = _Occurrences(code, severity, message, fix, column)
        seen = self._kinds[key]
        seen.count += 1
        if row > 0 and len(seen.rows) < ROWS_SHOWN and row not in seen.rows:
            seen.rows.append(row)

    def findings(self) -> list[Finding]:
        return [
            Finding(
                code=seen.code,
                severity=seen.severity,
                message=seen.message,
                column=seen.column,
                rows=seen.rows,
                count=seen.count,
                fix=seen.fix,
            )
            for seen in self._kinds.values()
        ]


def table(
    columns: Sequence[str], rows: Iterable[tuple[int, Sequence[str | None]]], log: FindingLog, limits: Limits
) -> RowSource:
    """A table of these columns, with those of the numbered rows whose cells are sound, up to the limit; nothing if the
    names are not sound."""
    if not are_names_sound(columns, log, limits):
        return NOTHING
    return RowSource(tuple(columns), batched(_sound(columns, rows, log, limits), len(columns), limits))


def _sound(
    columns: Sequence[str], rows: Iterable[tuple[int, Sequence[str | None]]], log: FindingLog, limits: Limits
) -> Iterator[tuple[int, Sequence[str | None]]]:
    for count, (number, cells) in enumerate(rows, 1):
        if count > limits.rows:
            return note_too_many_rows(log, limits, row=number)
        if are_cells_sound(number, zip(columns, cells, strict=True), log, limits):
            yield number, cells


def unnamed_column(place: int, log: FindingLog) -> str:
    """The name of a column, counted from 1, whose header is empty."""
    name = f"column_{place}"
    message = f"column {place} has no name in the header; it is called {name!r}"
    log.note("unnamed", message, severity="warning", column=name, fix="name the column in the header")
    return name


def batched(rows: Iterable[tuple[int, Sequence[str | None]]], width: int, limits: Limits) -> Iterator[RowBatch]:
    """Gather rows of `width` cells, each with its number, into batches within the limits."""
    most, characters = rows_per_batch(width, limits), 0
    held: list[tuple[int, Sequence[str | None]]] = []
    for number, cells in rows:
        held.append((number, cells))
        characters += sum(len(cell) for cell in cells if cell is not None)
        if len(held) >= most or characters >= limits.batch_characters:
            yield _batch(held)
            held, characters = [], 0
    if held:
        yield _batch(held)


def _batch(rows: Sequence[tuple[int, Sequence[str | None]]]) -> RowBatch:
    return RowBatch(
        [number for number, _ in rows], [list(column) for column in zip(*(row for _, row in rows), strict=True)]
    )


def rows_per_batch(width: int, limits: Limits) -> int:
    return max(1, min(limits.batch_rows, limits.batch_cells // max(1, width)))


def cell_problem(cell: str, limits: Limits) -> str | None:
    """What is wrong with one value, or None: too large, a NUL, or a lone surrogate."""
    if len(cell) * 4 > limits.cell_bytes and len(cell.encode("utf-8", "replace")) > limits.cell_bytes:
        return f"a cell larger than {limits.cell_bytes:,} bytes"
    if "\0" in cell:
        return "a NUL character"
    if not cell.isascii() and _has_lone_surrogate(cell):
        return "a lone surrogate (half of a character)"
    return None


def note_cell_problem(log: FindingLog, problem: str, *, row: int, column: str) -> None:
    fix = "shorten the text or move it to another file" if "larger" in problem else "remove the character from the cell"
    log.note(f"cell: {problem}", f"row {row}, column {column!r}: {problem}", row=row, column=column, fix=fix)


def are_cells_sound(row: int, cells: Iterable[tuple[str, str | None]], log: FindingLog, limits: Limits) -> bool:
    """Check a row's cells by column; files what is wrong with them."""
    is_sound = True
    for name, cell in cells:
        if cell is not None and (problem := cell_problem(cell, limits)) is not None:
            note_cell_problem(log, problem, row=row, column=name.encode("utf-8", "replace").decode()[:80])
            is_sound = False
    return is_sound


def note_too_many_rows(log: FindingLog, limits: Limits, *, row: int) -> None:
    message = f"the file has more than {limits.rows:,} rows; reading stopped at row {row:,}"
    log.note("too many rows", message, row=row, fix="upload fewer rows, or several datasets")


def are_names_sound(names: Sequence[str], log: FindingLog, limits: Limits) -> bool:
    """Checks column names; files what is wrong with them."""
    if len(names) > limits.columns:
        message = f"the file has more than {limits.columns:,} columns"
        log.note("too many columns", message, fix="keep only the columns to train on")
        return False
    problems = [(name, problem) for name, problem in _name_problems(names) if problem is not None]
    for name, problem in problems:
        log.note(f"name: {problem}", f"the column name {name[:80]!r} {problem}", fix="rename the column in the file")
    return not problems


def _name_problems(names: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    seen: set[str] = set()
    for name in names:
        yield name, "is in the header twice" if name in seen else _name_problem(name)
        seen.add(name)


def _name_problem(name: str) -> str | None:
    if name == ROW_COLUMN:
        return "is reserved"
    if len(name) > _NAME_CHARACTERS:
        return f"is longer than {_NAME_CHARACTERS} characters"
    if "\0" in name or _has_lone_surrogate(name):
        return "holds a NUL character or half of a character"
    return None


def _has_lone_surrogate(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False
