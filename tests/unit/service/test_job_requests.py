"""What a request for a job is held to before it waits for a worker."""

from __future__ import annotations

import pytest

from finetune.data.errors import DatasetUnreadable
from finetune.data.records import ColumnReport, DatasetRecord, DatasetReport, DatasetStatus
from finetune.jobs.records import JobSpec
from service.api.finetune import _check_dataset

EXCESS = "there are 10,001 labels"


def checked(id_: str, *names: str, excess: str | None = None) -> DatasetRecord:
    columns = [
        ColumnReport(name=name, type="text", empty=0, distinct=None, example="a", excess_as_labels=excess)
        for name in names
    ]
    report = DatasetReport(rows=9, columns=columns, findings=[])
    return DatasetRecord(id_, "t", "f", "csv", DatasetStatus.READY, "", 1, 9, columns, report, 0.0, 0.0, None)


def test_a_side_may_call_its_label_otherwise() -> None:
    values = {"dataset": "a", "test_dataset": "b", "backbone": "tiny", "register_as": "m"}
    spec = JobSpec.model_validate({**values, "test_columns": {"label": "gold"}})
    _check_dataset(checked("a", "text", "label"), spec, split_column=None)
    _check_dataset(checked("b", "text", "gold"), spec, split_column=None)
    with pytest.raises(DatasetUnreadable, match="gold"):
        _check_dataset(checked("b", "text", "label"), spec, split_column=None)
    with pytest.raises(DatasetUnreadable, match=EXCESS):
        _check_dataset(checked("b", "text", "gold", excess=EXCESS), spec, split_column=None)
