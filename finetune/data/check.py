"""Checks one upload in a child process: `python -m finetune.data.check RAW FORMAT OUT_DIR`.

The child writes `rows.parquet` (see `canonical`) and then `report.json`, prints nothing and exits with 0,
also when the data is invalid. A file that crashes or exhausts a parser takes only the child with it:
`check_upload`, the parent's side, turns that into a report too. Knows no database and no object store.
"""

from __future__ import annotations

import argparse
import logging
import math
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast, get_args

import pyarrow as pa

from finetune.data.archive_rows import UNPACKED_PREFIX
from finetune.data.canonical import canonical_writer, sync, sync_folder
from finetune.data.errors import CheckGaveUp, DatasetCheckFailed
from finetune.data.profile import ColumnProfile
from finetune.data.readers import open_rows
from finetune.data.record_batches import FindingLog, Limits
from finetune.data.records import DatasetReport, FileFormat, Finding, has_errors

ROWS_FILE = "rows.parquet"
REPORT_FILE = "report.json"

_MOST_LABEL_COLUMNS = 100  # of wider files a job looks at the column that it names
_EXIT_OUT_OF_MEMORY = 3
_EXIT_MACHINE_FAILED = 4
_PACKAGE_ROOT = Path(__file__).resolve().parents[2]
_log = logging.getLogger(__name__)


def check_upload(
    raw: Path, file_format: FileFormat, out_dir: Path, *, timeout_s: float, memory_bytes: int, is_last: bool = True
) -> DatasetReport:
    """Runs the check in a child process and returns its report. If these limits are not the last, what would be for
    want of time or memory raises `CheckGaveUp` instead.

    `memory_bytes` bounds the child's address space, of which interpreter and Arrow alone take some 400 MB.
    A crash, a timeout or lack of memory becomes a report with one `parse_error`. Raises
    `DatasetCheckFailed` where the machine failed and not the file (no space, no permission).
    """
    command = [sys.executable, "-m", "finetune.data.check", str(raw.resolve()), file_format, str(out_dir.resolve())]
    command += ["--memory-bytes", str(memory_bytes), "--cpu-seconds", str(math.ceil(timeout_s) + 1)]
    try:
        return _checked(command, out_dir, timeout_s=timeout_s, memory_bytes=memory_bytes, is_last=is_last)
    finally:
        for leftover in raw.parent.glob(f"{UNPACKED_PREFIX}*"):  # of a child that was killed
            leftover.unlink(missing_ok=True)


def _checked(command: list[str], out_dir: Path, *, timeout_s: float, memory_bytes: int, is_last: bool) -> DatasetReport:
    try:
        # `-m` looks in the working directory first, which makes a checkout work without installing it.
        child = subprocess.run(
            command, timeout=timeout_s, cwd=_PACKAGE_ROOT, stdin=subprocess.DEVNULL, capture_output=True, check=False
        )
    except subprocess.TimeoutExpired as error:
        if not is_last:
            raise CheckGaveUp(f"no end within {timeout_s:g} s") from error
        message = f"reading the file took longer than {timeout_s:g} s"
        return _failed(message, fix="upload fewer rows, or raise the time limit of the check")
    if child.returncode == 0:
        return DatasetReport.model_validate_json((out_dir / REPORT_FILE).read_bytes())
    if not is_last and child.returncode != _EXIT_MACHINE_FAILED:
        raise CheckGaveUp(f"exit code {child.returncode} within {memory_bytes:,} bytes")
    _log.warning("dataset check exited with %d: %s", child.returncode, child.stderr[-2000:].decode(errors="replace"))
    return _outcome(child.returncode, memory_bytes)


def _outcome(exit_code: int, memory_bytes: int) -> DatasetReport:
    if exit_code == _EXIT_MACHINE_FAILED:
        raise DatasetCheckFailed("the dataset could not be checked: reading or writing a local file failed")
    if exit_code == _EXIT_OUT_OF_MEMORY:
        message = f"reading the file needs more than {memory_bytes:,} bytes of memory"
        return _failed(message, fix="write smaller row groups or shorter cells, or upload csv or jsonl")
    message = f"the file made its parser end without a report (exit code {exit_code})"
    return _failed(message, fix="write the file again with another program, or upload csv or jsonl")


def _failed(message: str, *, fix: str) -> DatasetReport:
    finding = Finding(code="parse_error", severity="error", message=message, fix=fix)
    return DatasetReport(rows=0, columns=[], findings=[finding])


def write_checked(raw: Path, file_format: FileFormat, out_dir: Path, limits: Limits | None = None) -> DatasetReport:
    """Reads `raw`, writes both files into `out_dir` (rows first) and returns the report. In this process."""
    log = FindingLog()
    rows = 0
    with open_rows(raw, file_format, log, limits, folder=out_dir) as source:
        may_be_label = len(source.columns) <= _MOST_LABEL_COLUMNS
        profiles = [ColumnProfile(name, may_be_label=may_be_label) for name in source.columns]
        with canonical_writer(out_dir / ROWS_FILE, source.columns, source.files) as writer:
            for batch in source.batches:
                writer.write(batch)
                rows += len(batch.row_numbers)
                for profile, values in zip(profiles, batch.columns, strict=True):
                    profile.add(values)
    findings = [*log.findings(), *(finding for profile in profiles for finding in profile.spellings())]
    if rows == 0 and not has_errors(findings):
        findings.append(_no_rows())
    report = DatasetReport(rows=rows, columns=[profile.report() for profile in profiles], findings=findings)
    _write_report(report, out_dir)
    return report


def _no_rows() -> Finding:
    return Finding(
        code="parse_error",
        severity="error",
        message="the file holds no row of data",
        count=0,
        fix="add rows below the header",
    )


def _write_report(report: DatasetReport, out_dir: Path) -> None:
    partial = out_dir / f"{REPORT_FILE}.partial"
    with partial.open("wb") as stream:
        stream.write(report.model_dump_json().encode())
        sync(stream)
    partial.replace(out_dir / REPORT_FILE)
    sync_folder(out_dir)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    # Arrow's default allocator reserves address space by the gigabyte, which a limit on it would forbid.
    pa.set_memory_pool(pa.system_memory_pool())
    pa.set_cpu_count(1)
    _limit(resource.RLIMIT_AS, options.memory_bytes)
    _limit(resource.RLIMIT_CPU, options.cpu_seconds)  # ends the child even when its parent was killed
    _limit(resource.RLIMIT_CORE, 0)
    try:
        options.out_dir.mkdir(exist_ok=True)
        write_checked(options.raw, cast(FileFormat, options.format), options.out_dir)
    except MemoryError:
        return _EXIT_OUT_OF_MEMORY
    except OSError as error:
        print(error, file=sys.stderr)
        return _EXIT_MACHINE_FAILED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m finetune.data.check")
    parser.add_argument("raw", type=Path)
    parser.add_argument("format", choices=get_args(FileFormat))
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--memory-bytes", type=int)
    parser.add_argument("--cpu-seconds", type=int)
    return parser


def _limit(kind: int, value: int | None) -> None:
    if value is None:
        return
    _, most = resource.getrlimit(kind)
    value = value if most == resource.RLIM_INFINITY else min(value, most)
    resource.setrlimit(kind, (value, value))


if __name__ == "__main__":
    sys.exit(main())
