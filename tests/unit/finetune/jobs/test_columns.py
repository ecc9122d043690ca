"""Columns by role: what a request may name, and what jobs of earlier versions said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from finetune.data.canonical import canonical_writer
from finetune.data.labelled import load_labelled
from finetune.data.options import Columns, SideColumns
from finetune.data.record_batches import RowBatch
from finetune.jobs.records import JobSpec
from service.api.schemas import FinetuneRequest

JOB = {"dataset": "ds_1", "backbone": "tiny", "register_as": "m"}
STORED = {"text": "review", "label": "stars", "slices": ["source", "year"]}


def spec(**values: Any) -> JobSpec:
    return JobSpec.model_validate({**JOB, **values})


@pytest.mark.parametrize("task", ["auto", "text-classification", "text-multi-label", "text-regression"])
def test_a_stored_job_is_read_and_written_as_it_was(task: str) -> None:
    assert spec(task=task, columns=STORED).model_dump(mode="json")["columns"] == STORED
    assert JobSpec.model_validate_json(spec(task=task, columns=STORED).model_dump_json()) == spec(
        task=task, columns=STORED
    )


@pytest.mark.parametrize("columns", [{}, {"columns": {}}, {"columns": {"label": "label"}}])
def test_the_role_that_is_needed_is_written_down(columns: dict[str, Any]) -> None:
    assert spec(**columns).model_dump(mode="json")["columns"] == {"text": "text", "label": "label", "slices": []}
    request = FinetuneRequest.model_validate({"dataset": "ds_1", "register_as": "m", **columns})
    assert request.columns == spec(**columns).columns


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"txt": "text"}, "'txt' is no role of texts; known are text, text_pair"),
        ({"image": "file"}, "'image' is no role of texts"),
        ({"text": ""}, "at least 1 character"),
        ({"text": "x" * 201}, "at most 200 characters"),
        ({"text": []}, "at least 1 item"),
        ({"text": ["a"] * 11}, "at most 10 items"),
        ({"text": ["a", ""]}, "at least 1 character"),
        ({"text": [["a"]]}, "valid string"),
        ({"text_pair": None}, "valid string"),
        ({"label": 3}, "valid string"),
    ],
)
@pytest.mark.parametrize("task", ["auto", "text-regression"])
def test_what_is_no_role_or_no_name_is_refused(task: str, columns: dict[str, Any], message: str) -> None:
    for model, rest in ((JobSpec, JOB), (FinetuneRequest, {"dataset": "ds_1", "register_as": "m"})):
        with pytest.raises(ValidationError, match=message):
            model.model_validate({**rest, "task": task, "columns": columns})


def test_the_schema_names_every_role() -> None:
    found = Columns.model_json_schema()
    roles = ["label", "slices", "spans", "text", "text_pair"]
    assert sorted(found["properties"]) == roles and not found["additionalProperties"]
    name, several = found["properties"]["text"]["anyOf"]
    assert name == {"type": "string", "minLength": 1, "maxLength": 200} and several["items"] == name
    assert found["properties"]["text"]["default"] == "text"
    of_a_side = SideColumns.model_json_schema()["properties"]
    assert sorted(of_a_side) == ["label", "spans", "text", "text_pair"] and "default" not in of_a_side["text"]


@pytest.mark.parametrize("named", [{}, {"spans": "marks"}, {"label": "marks"}, {"text": "body", "spans": "marks"}])
def test_entities_are_read_from_a_column_of_spans(named: dict[str, str]) -> None:
    for model, rest in ((JobSpec, JOB), (FinetuneRequest, {"dataset": "ds_1", "register_as": "m"})):
        read = model.model_validate({**rest, "task": "token-classification", "columns": named})
        assert read.columns.label == named.get("spans", named.get("label", "spans"))
        assert read.columns.named == {"text": named.get("text", "text")}
        again = model.model_validate({**rest, "task": "token-classification", "columns": read.columns.model_dump()})
        assert again.columns == read.columns
    with pytest.raises(ValidationError, match="spans and label are both given"):
        JobSpec.model_validate({**JOB, "task": "token-classification", "columns": {"spans": "a", "label": "b"}})
    with pytest.raises(ValidationError, match="'spans' is no role"):
        JobSpec.model_validate({**JOB, "task": "text-classification", "columns": {"spans": "a"}})


def test_names_of_a_side_need_its_dataset_and_a_role_that_there_is() -> None:
    names = {"text": ["title", "body"], "label": "gold"}
    given = spec(test_dataset="ds_2", test_columns=names, columns=STORED)
    assert given.columns_by_side["test"].all_named == ("title", "body", "gold")
    assert given.columns_by_side["validation"] == given.columns_by_side["train"] == given.columns
    assert JobSpec.model_validate_json(given.model_dump_json()) == given
    for values, message in (
        ({"test_columns": names}, "no effect without test_dataset"),
        ({"validation_dataset": "ds_2", "validation_columns": {"txt": "a"}}, "no role of texts"),
    ):
        with pytest.raises(ValidationError, match=message):
            spec(**values)


def test_two_columns_make_pairs_and_both_must_be_filled(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    with canonical_writer(path, ["a", "b", "label"]) as writer:
        writer.write(RowBatch([1, 2, 3, 4], [["p", "q", None, "s"], ["1", " ", "3", "4"], ["x", "y", "x", "y"]]))
    rows, findings = load_labelled(path, Columns.model_validate({"text": "a", "text_pair": "b"}))
    assert rows.examples == [("p", "1"), ("s", "4")] and rows.row_numbers.tolist() == [1, 4]
    assert [(finding.code, finding.column, finding.rows) for finding in findings] == [
        ("empty_value", "b", [2]),
        ("empty_value", "a", [3]),
    ]
    modality = rows.modality
    assert modality.digest(("a ", "B")) == modality.digest(("A", "b")) != modality.digest(("a b", ""))
    assert modality.content(("a", "b")) != modality.content(("a b", "")) != modality.content("a b")
