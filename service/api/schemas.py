"""Request and response bodies of the native routes. Unknown fields are refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from finetune.data.options import AUTO, Columns, TaskColumns, WantedTask
from model_registry.refs import NAME_PATTERN


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PredictParameters(_Request):
    top_k: int | None = Field(None, ge=1, description="return only the best so many scores; not for regression")
    threshold: float | None = Field(
        None,
        ge=0,
        le=1,
        description="one label a text: below it the label is null; several: from it on a label is given",
    )
    truncate: bool = Field(True, description="cut over-long inputs; otherwise they are refused with 422")
    max_length: int | None = Field(None, ge=4, le=100_000, description="tokens to keep, special ones included")
    return_embedding: bool = Field(False, description="add each input's vector")
    timeout_ms: int | None = Field(None, ge=1, le=3_600_000, description="deadline of this request")


ModelName = Annotated[str, StringConstraints(min_length=1, max_length=140)]


class PredictRequest(_Request):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        json_schema_extra={"examples": [{"model": "reviews", "inputs": ["a film that holds to the end"]}]},
    )
    model: ModelName | None = Field(None, description="name, name@alias or name:version; default: default_model")
    inputs: str | list[str] | list[tuple[str, str]] = Field(description="one text, several, or several pairs")
    parameters: PredictParameters = PredictParameters()


class LabelScore(BaseModel):
    label: str
    score: float


class PredictionOut(BaseModel):
    """text-classification: one label, null where the model abstains. Of a backbone label and score are null."""

    index: int
    label: str | None
    score: float | None
    scores: list[LabelScore]
    embedding: list[float] | None = None


class LabelsOut(BaseModel):
    """text-multi-label: any number of labels, none included, most probable first."""

    index: int
    labels: list[str]
    scores: list[LabelScore]
    embedding: list[float] | None = None


class ValueOut(BaseModel):
    """text-regression: a number in the units of the training data."""

    index: int
    value: float
    embedding: list[float] | None = None


class Usage(BaseModel):
    input_tokens: int


def _example(model: str, **prediction: Any) -> dict[str, Any]:
    return {
        "id": "pred_…",
        "object": "predictions",
        "model": model,
        "version": 1,
        "predictions": [{"index": 0, **prediction}],
        "usage": {"input_tokens": 7},
    }


class PredictResponse(BaseModel):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                _example("reviews", label="good", score=0.61, scores=[{"label": "good", "score": 0.61}]),
                _example("topics", labels=["sport"], scores=[{"label": "sport", "score": 0.93}]),
                _example("stars", value=3.42),
            ]
        }
    )
    id: str
    object: Literal["predictions"] = "predictions"
    model: str
    version: int | None
    predictions: list[PredictionOut] | list[LabelsOut] | list[ValueOut]
    usage: Usage


class FinetuneRequest(_Request):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        json_schema_extra={
            "examples": [{"dataset": "ds_…", "register_as": "reviews", "hyperparameters": {"method": "auto"}}]
        },
    )
    dataset: str = Field(min_length=1, max_length=64)
    validation_dataset: str | None = Field(None, max_length=64)
    test_dataset: str | None = Field(None, max_length=64)
    backbone: str | None = Field(None, pattern=NAME_PATTERN)
    task: WantedTask = AUTO
    columns: TaskColumns = Field(Columns(), validate_default=True)
    register_as: str = Field(pattern=NAME_PATTERN)
    promote: Literal["manual", "if_better"] = "manual"
    hyperparameters: dict[str, Any] = {}
    metadata: dict[
        Annotated[str, StringConstraints(max_length=64)], Annotated[str, StringConstraints(max_length=512)]
    ] = Field({}, max_length=16)


class CancelRequest(_Request):
    keep_best: bool = Field(True, description="register the best so far before ending")


class AliasRequest(_Request):
    version: int = Field(ge=1)
    expected_version: int | None = Field(description="where the alias points now; null if it does not exist yet")
    reason: str = Field("", max_length=1024)


class AliasPending(BaseModel):
    """An alias that has moved to a version which this replica does not serve yet."""

    object: Literal["alias.pending"] = "alias.pending"
    model: str
    alias: str
    wanted: int
    serving: int | None = Field(description="version that requests get meanwhile; null: 503 model_not_ready")
    reason: str | None = Field(description="what keeps the wanted version from serving")
    retry_at: float | None = Field(description="seconds since the epoch; null while the load is in progress")
    change: dict[str, Any]


class RollbackRequest(_Request):
    alias: str = Field("champion", pattern=NAME_PATTERN)
    reason: str = Field("", max_length=1024)


class ImportRequest(_Request):
    name: str = Field(pattern=NAME_PATTERN, description="model to register the checkpoint as")
    source: str = Field(min_length=1, max_length=512, description="folder below import_root, or hub:org/name@revision")


def inlined_schema(model: type[BaseModel]) -> dict[str, Any]:
    """A model's JSON schema without `$defs`, to stand inside another document."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})

    def resolved(node: Any) -> Any:
        if isinstance(node, list):
            return [resolved(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            name = node["$ref"].rpartition("/")[2]
            return resolved({**definitions[name], **{key: value for key, value in node.items() if key != "$ref"}})
        return {key: resolved(value) for key, value in node.items()}

    inlined: dict[str, Any] = resolved(schema)
    return inlined
