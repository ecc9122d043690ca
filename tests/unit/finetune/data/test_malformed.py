"""Malformed datasets, each a real file: every one yields its finding with its row, and none is trained on."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune.data.check import ROWS_FILE, write_checked
from finetune.data.options import Columns
from finetune.data.readers import detect_format, unrecognised
from finetune.data.record_batches import Limits
from finetune.data.records import DatasetReport, Finding
from finetune.jobs.failures import DatasetInvalid
from finetune.jobs.hyperparameters import parse_hyperparameters
from finetune.jobs.link import ChildJob, DatasetInput
from finetune.jobs.plan import WorkerProfile
from finetune.jobs.records import JobSpec
from finetune.training.recipe import load_sides
from tests.support.links import RecordingLink

LIMITS = Limits(
    cell_bytes=2000, row_bytes=20_000, rows=1000, columns=50, batch_rows=100, entries=40, unpacked_slack_bytes=1 << 20
)


def csv(*lines: bytes, header: bytes = b"text,label") -> bytes:
    return b"\n".join([header, *lines]) + b"\n"


def jsonl(*lines: bytes) -> bytes:
    return b'{"text": "a fine film", "label": "good"}\n' + b"\n".join(lines) + b"\n"


def table(columns: dict[str, Any], **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, **options)
    return sink.getvalue()


def zipped(*entries: tuple[str | zipfile.ZipInfo, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", method) as archive:
        for name, content in entries:
            archive.writestr(name, content, compress_type=method)
    return sink.getvalue()


def tarred(*entries: tuple[str | tarfile.TarInfo, bytes], mode: str = "w") -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in entries:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            if info.isreg():
                info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return sink.getvalue()


def encrypted_zip() -> bytes:
    """A zip whose one entry carries the mark of encryption in both of its headers."""
    raw = bytearray(zipped(("pos/1.txt", b"secret"), ("neg/1.txt", b"words"), method=zipfile.ZIP_STORED))
    raw[6] |= 1
    raw[raw.index(b"PK\x01\x02") + 8] |= 1
    return bytes(raw)


def link_in_zip() -> bytes:
    info = zipfile.ZipInfo("pos/1.txt")
    info.external_attr = (0o120777) << 16
    return zipped((info, b"/etc/passwd"))


def twice_in_zip() -> bytes:
    with pytest.warns(UserWarning, match="Duplicate name"):
        return zipped(("pos/1.txt", b"one"), ("pos/1.txt", b"two"))


def link_in_tar(kind: bytes) -> bytes:
    info = tarfile.TarInfo("pos/1.txt")
    info.type, info.linkname = kind, "/etc/passwd"
    return tarred(("neg/1.txt", b"fine"), (info, b""))


def sparse_tar() -> bytes:
    """A gigabyte of zeros that are not in the archive."""
    info = tarfile.TarInfo("pos/1.txt")
    info.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:398] = b"%011o\0" % 0
    header[398:410] = b"%011o\0" % 0
    header[483:495] = b"%011o\0" % (1 << 30)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header[:512])
    return bytes(header) + b"\0" * 1024


def lying_zip() -> bytes:
    """A bomb whose headers both declare ten bytes."""
    raw = bytearray(zipped(("pos/1.txt", b"words"), ("rows.csv", b"a" * (64 << 20))))
    for mark, at in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        place = raw.rindex(mark)
        raw[place + at : place + at + 4] = (10).to_bytes(4, "little")
    return bytes(raw)


def bomb_gz() -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    info = tarfile.TarInfo("rows.csv")
    info.size = 256 << 20
    parts = [packer.compress(info.tobuf())]
    parts += [packer.compress(b"\0" * (1 << 20)) for _ in range(256)]
    return b"".join([*parts, packer.compress(b"\0" * 1024), packer.flush()])


def damaged_row_group() -> bytes:
    content = bytearray(
        table(
            {"text": [f"text number {n}" for n in range(300)], "label": ["a"] * 300},
            row_group_size=100,
            compression="zstd",
            use_dictionary=False,
        )
    )
    second = pq.ParquetFile(io.BytesIO(bytes(content))).metadata.row_group(1).column(0)
    start = second.data_page_offset
    content[start : start + second.total_compressed_size] = b"\xff" * second.total_compressed_size
    return bytes(content)


PARQUET = table({"text": ["a", "b"], "label": ["x", "y"]})
TEXTS = (("pos/1.txt", b"fine words"), ("neg/1.txt", b"dull words"))
META = b"file_name,label\nnotes/a.txt,x\nnotes/b.txt,y\n"

# Name, file name, content, code, first row (None: the file as a whole).
FILES: list[tuple[str, str, bytes | Callable[[], bytes], str, int | None]] = [
    ("nothing at all", "a.csv", b"", "parse_error", None),
    ("a header alone", "a.csv", csv(), "parse_error", None),
    ("blank lines alone", "a.jsonl", b"\n\n \n", "parse_error", None),
    ("UTF-8 and Latin-1", "a.csv", csv("grün,a".encode(), b"caf\xe9,b"), "encoding", 2),
    ("UTF-16 cut off", "a.csv", "text,label\nfine,a\n".encode("utf-16")[:-1], "encoding", None),
    ("half a character", "a.csv", csv(b"fine,a", b"fine,a", b"cut \xe2\x82,b"), "encoding", 3),
    ("too few fields", "a.csv", csv(b"a,b", b"c"), "parse_error", 2),
    ("too many fields", "a.csv", csv(b"a,b", b"c,d,e"), "parse_error", 2),
    ("mixed delimiters", "a.csv", csv(b"a,b", b"c;d"), "parse_error", 2),
    ("a quote never closed", "a.csv", csv(b"a,b", b'"c,d', b"e,f"), "parse_error", 2),
    ("words after a quote", "a.csv", csv(b'"he said "no"",b'), "parse_error", 1),
    ("a NUL byte", "a.csv", csv(b"a,b", b"c\0,d"), "parse_error", 2),
    ("a huge cell", "a.csv", csv(b"a,b", b"x" * 3000 + b",b"), "parse_error", 2),
    ("an endless line", "a.csv", csv(b"a,b", b"x" * 30_000), "parse_error", 2),
    ("a name twice", "a.csv", csv(b"a,b", header=b"text,text"), "parse_error", None),
    ("too many columns", "a.csv", csv(b"a", header=b",".join(b"c%d" % n for n in range(60))), "parse_error", None),
    ("too many rows", "a.csv", csv(*[b"a,b"] * 1001), "parse_error", 1001),
    ("a line cut off", "a.jsonl", jsonl(b'{"text": "a", "lab'), "parse_error", 2),
    ("a list", "a.jsonl", jsonl(b'["a", "b"]'), "parse_error", 2),
    ("nested values", "a.jsonl", jsonl(b'{"text": {"body": "a"}, "label": "b"}'), "parse_error", 2),
    ("deeply nested", "a.jsonl", jsonl(b'{"text": ' + b"[" * 9000), "parse_error", 2),
    ("a key twice", "a.jsonl", jsonl(b'{"text": "a", "text": "b"}'), "parse_error", 2),
    ("not a number", "a.jsonl", jsonl(b'{"text": "a", "label": NaN}'), "parse_error", 2),
    ("half a surrogate pair", "a.jsonl", jsonl(b'{"text": "\\ud83d", "label": "b"}'), "parse_error", 2),
    ("two objects on a line", "a.jsonl", jsonl(b'{"text": "a"} {"text": "b"}'), "parse_error", 2),
    ("a JSON array of lists", "a.json", b'[["a", "b"]]', "parse_error", None),
    ("a JSON array cut off", "a.json", b'[{"text": "a", "label": "b"}, {"text"', "parse_error", 2),
    ("a JSON array with a number", "a.json", b'[{"text": "a", "label": "b"}, 3]', "parse_error", 2),
    ("parquet cut off", "a.parquet", PARQUET[: len(PARQUET) // 2], "parse_error", None),
    ("parquet with a damaged group", "a.parquet", damaged_row_group, "parse_error", 101),
    (
        "parquet of bad text",
        "a.parquet",
        lambda: table({"text": pa.array([b"fine", b"caf\xe9"], pa.binary()).view(pa.string()), "label": ["a", "b"]}),
        "encoding",
        2,
    ),
    ("parquet of nested lists", "a.parquet", table({"text": [[[1]], [[2]]]}), "parse_error", None),
    ("gzip of a table", "a.csv.gz", gzip.compress(csv(b"a,b")), "parse_error", None),
    ("a program", "a.bin", b"\x7fELF\0\0\0\0", "parse_error", None),
    ("zip cut off", "a.zip", zipped(*TEXTS)[:-30], "parse_error", None),
    (
        "zip with a wrong checksum",
        "a.zip",
        lambda: zipped(*TEXTS, method=zipfile.ZIP_STORED).replace(b"fine words", b"fine wordz"),
        "parse_error",
        None,
    ),
    ("zip of nothing", "a.zip", zipped(), "parse_error", None),
    ("zip of two tables", "a.zip", zipped(("a.csv", csv(b"a,b")), ("b.csv", csv(b"a,b"))), "parse_error", None),
    ("a workbook", "a.xlsx", zipped(("[Content_Types].xml", b"<x/>"), ("xl/book.xml", b"<x/>")), "parse_error", None),
    ("a ragged table in a zip", "a.zip", zipped(("rows.csv", csv(b"a,b", b"c"))), "parse_error", 2),
    ("pictures", "a.zip", zipped(("cat/1.jpg", b"\xff\xd8"), ("dog/1.jpg", b"\xff\xd8")), "parse_error", 1),
    ("zip with a password", "a.zip", encrypted_zip, "archive_unsafe", 1),
    ("zip that climbs out", "a.zip", zipped(*TEXTS, ("../../etc/cron.d/x", b"x")), "archive_unsafe", 3),
    ("zip with an absolute name", "a.zip", zipped(*TEXTS, ("/etc/passwd", b"x")), "archive_unsafe", 3),
    ("zip with a drive", "a.zip", zipped(*TEXTS, ("C:/boot.ini", b"x")), "archive_unsafe", 3),
    ("zip with backslashes", "a.zip", zipped(*TEXTS, ("..\\x.txt", b"x")), "archive_unsafe", 3),
    ("zip with a link", "a.zip", link_in_zip, "archive_unsafe", 1),
    ("zip with a name twice", "a.zip", twice_in_zip, "archive_unsafe", 2),
    ("zip in a zip", "a.zip", zipped(("inner.zip", zipped(*TEXTS))), "archive_unsafe", 1),
    ("zip in a zip, called a text", "a.zip", zipped(*TEXTS, ("pos/2.txt", zipped(*TEXTS))), "archive_unsafe", None),
    ("zip bomb", "a.zip", zipped(("rows.csv", b"a" * (64 << 20))), "archive_unsafe", None),
    ("zip bomb that lies about its size", "a.zip", lying_zip, "parse_error", None),
    ("zip of very many files", "a.zip", zipped(*((f"a/{n}.txt", b"x") for n in range(41))), "archive_unsafe", 41),
    ("tar that climbs out", "a.tar", tarred(*TEXTS, ("../x.txt", b"x")), "archive_unsafe", 3),
    ("tar with a symbolic link", "a.tar", link_in_tar(tarfile.SYMTYPE), "archive_unsafe", 2),
    ("tar with a hard link", "a.tar", link_in_tar(tarfile.LNKTYPE), "archive_unsafe", 2),
    ("tar with a device", "a.tar", link_in_tar(tarfile.CHRTYPE), "archive_unsafe", 2),
    ("tar with a sparse file", "a.tar", sparse_tar, "archive_unsafe", 1),
    ("tar.gz bomb", "a.tar.gz", bomb_gz, "archive_unsafe", None),
    (
        "tar.gz cut off",
        "a.tar.gz",
        tarred(*TEXTS, ("pos/2.txt", bytes(range(32, 127)) * 9), mode="w:gz")[:200],
        "parse_error",
        None,
    ),
    ("a file in no class folder", "a.zip", zipped(*TEXTS, ("stray.txt", b"x")), "file_without_label", 3),
    ("a file too deep", "a.tar.gz", tarred(*TEXTS, ("pos/more/2.txt", b"x"), mode="w:gz"), "file_without_label", 3),
    (
        "a file that the metadata lacks",
        "a.zip",
        zipped(("metadata.csv", META), ("notes/a.txt", b"x"), ("notes/b.txt", b"y"), ("notes/c.txt", b"z")),
        "file_without_label",
        4,
    ),
    ("metadata naming no such file", "a.zip", zipped(("metadata.csv", META), ("notes/a.txt", b"x")), "missing_file", 2),
    (
        "metadata naming a file twice",
        "a.zip",
        zipped(("metadata.csv", META + b"notes/a.txt,y\n"), ("notes/a.txt", b"x"), ("notes/b.txt", b"y")),
        "parse_error",
        3,
    ),
    (
        "metadata without names",
        "a.zip",
        zipped(("metadata.csv", b"path,label\na.txt,x\n"), ("a.txt", b"x")),
        "missing_column",
        None,
    ),
    ("a damaged file in a folder", "a.zip", zipped(*TEXTS, ("pos/2.txt", b"caf\xc3\xa9 \xe9")), "encoding", 3),
    ("a UTF-16 file cut off", "a.zip", zipped(*TEXTS, ("pos/2.txt", "words".encode("utf-16")[:-1])), "encoding", 3),
    ("a huge file in a folder", "a.zip", zipped(*TEXTS, ("pos/2.txt", b"word " * 900)), "parse_error", 3),
]


def uploaded(filename: str, content: bytes, folder: Path) -> DatasetReport:
    """What the service makes of the bytes, in this process."""
    (folder / "raw").write_bytes(content)
    file_format = detect_format(filename, content[:4096])
    if file_format is None:
        return DatasetReport(rows=0, columns=[], findings=[unrecognised(filename, content[:4096])])
    return write_checked(folder / "raw", file_format, folder, LIMITS)


@pytest.mark.parametrize(
    ("filename", "content", "code", "row"), [case[1:] for case in FILES], ids=[case[0] for case in FILES]
)
def test_a_malformed_file_is_invalid(
    tmp_path: Path, filename: str, content: bytes | Callable[[], bytes], code: str, row: int | None
) -> None:
    report = uploaded(filename, content() if callable(content) else content, tmp_path)
    errors = [finding for finding in report.findings if finding.severity == "error"]
    assert not report.is_valid, "an invalid dataset is refused by the service and by the worker"
    assert code in [finding.code for finding in errors], errors
    finding = next(finding for finding in errors if finding.code == code)
    assert finding.fix and (row is None or finding.rows[:1] == [row]), finding
    assert {path.name for path in tmp_path.iterdir()} <= {"raw", "rows.parquet", "report.json"}, (
        "nothing unpacked stays"
    )


# Files that can be read, and cannot be trained on.


def many(label: str, count: int, *more: str) -> list[bytes]:
    return [",".join([f"{label} text number {n}", label, *more]).encode() for n in range(count)]


@dataclass(frozen=True)
class Job:
    name: str
    content: bytes
    code: str
    row: int | None
    columns: Columns = field(default_factory=Columns)
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    test: bytes | None = None


def split(strategy: str, **options: Any) -> dict[str, Any]:
    return {"split": {"strategy": strategy, **options}}


TIMED = b"text,label,at"
JOBS = [
    Job(
        "a label column that is not there",
        csv(*many("a", 12), *many("b", 12)),
        "missing_column",
        None,
        Columns(label="lable"),
    ),
    Job(
        "a slice that is not there",
        csv(*many("a", 12), *many("b", 12)),
        "missing_column",
        None,
        Columns(slices=("source",)),
    ),
    Job(
        "a group column that is not there",
        csv(*many("a", 12), *many("b", 12)),
        "missing_column",
        None,
        hyperparameters=split("group", group_column="customer"),
    ),
    Job("no text anywhere", csv(*[b",a"] * 12), "empty_value", 1),
    Job("no label anywhere", csv(*[b"text,"] * 12), "empty_value", 1),
    Job("one class", csv(*many("a", 12)), "single_class", 1),
    Job("one row", csv(b"text,a"), "single_class", 1),
    Job(
        "nothing but rare classes, all dropped",
        csv(*many("a", 12), *many("b", 2), b"only one,c"),
        "single_class",
        1,
        hyperparameters={"rare_classes": "drop"},
    ),
    Job("labels apart by case", csv(*many("a", 12), *many("b", 12), b"odd one,A"), "label_case_collision", 25),
    Job("a quantity as label", csv(*[b"text number %d,%d.5" % (n, n) for n in range(30)]), "class_too_small", 1),
    Job(
        "a label that training lacks",
        csv(*many("a", 12), *many("b", 12)),
        "unknown_label",
        2,
        test=csv(b"one,a", b"two,zebra", b"three,b"),
    ),
    Job(
        "a time that does not parse",
        csv(*many("a", 12, "2026-01-02"), *many("b", 12, "2026-02-30"), header=TIMED),
        "invalid_time",
        13,
        hyperparameters=split("time", time_column="at"),
    ),
    Job(
        "dates and numbers",
        csv(*many("a", 12, "2026-01-02"), *many("b", 11, "17"), header=TIMED),
        "invalid_time",
        13,
        hyperparameters=split("time", time_column="at"),
    ),
    Job(
        "one time",
        csv(*many("a", 12, "2026"), *many("b", 12, "2026"), header=TIMED),
        "invalid_time",
        1,
        hyperparameters=split("time", time_column="at"),
    ),
    Job(
        "an unknown split",
        csv(*many("a", 12, "train"), *many("b", 12, "trial"), header=TIMED),
        "unknown_split",
        13,
        hyperparameters=split("predefined", column="at"),
    ),
    Job(
        "nothing to train on",
        csv(*many("a", 12, "test"), *many("b", 12, "val"), header=TIMED),
        "unknown_split",
        1,
        hyperparameters=split("predefined", column="at"),
    ),
    Job(
        "two groups for three sides",
        csv(*many("a", 12, "x"), *many("b", 12, "y"), header=TIMED),
        "class_too_small",
        1,
        hyperparameters=split("group", group_column="at"),
    ),
]


@pytest.mark.parametrize("job", JOBS, ids=[job.name for job in JOBS])
def test_rows_that_cannot_be_trained_on_end_the_job_before_training(tmp_path: Path, job: Job) -> None:
    link = RecordingLink()
    with pytest.raises(DatasetInvalid) as raised:
        run = child_job(job, tmp_path)
        load_sides(run, parse_hyperparameters(run.spec.hyperparameters), link)
    failure = raised.value.failure
    assert failure.code == "dataset_invalid" and failure.message
    findings = [Finding.model_validate(finding) for finding in failure.findings]
    assert job.code in [finding.code for finding in findings], findings
    finding = next(finding for finding in findings if finding.code == job.code)
    assert finding.severity == "error" and finding.fix
    assert job.row is None or finding.rows[:1] == [job.row], finding
    told = [event["data"]["code"] for event in link.of("data_warning") if event["level"] == "error"]
    assert job.code in told and link.of("phase_changed") == []


def child_job(job: Job, folder: Path) -> ChildJob:
    inputs = {}
    for name, content in (("train", job.content), ("test", job.test)):
        if content is not None:
            (folder / name).mkdir()
            assert uploaded("rows.csv", content, folder / name).is_valid
            inputs[name] = DatasetInput(id=f"ds_{name}", sha256="0" * 64, rows_file=folder / name / ROWS_FILE)
    spec = JobSpec(
        dataset="ds_train",
        test_dataset="ds_test" if job.test else None,
        backbone="tiny",
        columns=job.columns,
        register_as="m",
        hyperparameters=json.loads(json.dumps(job.hyperparameters)),
    )
    return ChildJob(
        job_id="ft_1",
        tenant="default",
        attempt=1,
        spec=spec,
        train=inputs["train"],
        test=inputs.get("test"),
        backbone_folder=folder,
        store_root=folder,
        work_dir=folder,
        worker=WorkerProfile(),
    )
