"""Request and response bodies of the management routes. Unknown fields are refused."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from finetune.data.options import FrozenModel
from finetune.jobs.records import JobRequest
from model_registry.refs import NAME_PATTERN


class FinetuneRequest(JobRequest):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"dataset": "ds_…", "register_as": "reviews", "hyperparameters": {"method": "auto"}}]
        },
    )


class CancelRequest(FrozenModel):
    keep_best: bool = Field(True, description="register the best so far before ending")


class AliasRequest(FrozenModel):
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


class RollbackRequest(FrozenModel):
    alias: str = Field("champion", pattern=NAME_PATTERN)
    reason: str = Field("", max_length=1024)


class ImportRequest(FrozenModel):
    name: str = Field(pattern=NAME_PATTERN, description="model to register the checkpoint as")
    source: str = Field(min_length=1, max_length=512, description="folder below import_root, or hub:org/name@revision")
