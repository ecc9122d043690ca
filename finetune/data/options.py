"""What a job says about its data: which columns hold what, and how rows are divided into sides."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema, model_validator

from modeling.tasks import TASKS

TRAIN, VALIDATION, TEST = 0, 1, 2

SIDE_NAMES = {
    **dict.fromkeys(("train", "training", "trn", "fit"), TRAIN),
    **dict.fromkeys(("validation", "valid", "val", "dev", "development", "eval", "evaluation"), VALIDATION),
    **dict.fromkeys(("test", "testing", "tst", "holdout", "held-out"), TEST),
}


AUTO: Final = "auto"


def _known_task(name: str) -> str:
    if name != AUTO and name not in TASKS:
        raise ValueError(f"there is no task {name[:60]!r}; known are {', '.join([AUTO, *TASKS])}")
    return name


WantedTask = Annotated[str, AfterValidator(_known_task), WithJsonSchema({"type": "string", "enum": [AUTO, *TASKS]})]
"""A task by name, or `auto`: the label column decides."""


class FrozenModel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Columns(FrozenModel):
    """Which columns of the dataset hold what. `slices` name groups of rows to evaluate apart."""

    text: str = Field("text", min_length=1, max_length=200)
    label: str = Field("label", min_length=1, max_length=200)
    slices: tuple[Annotated[str, Field(min_length=1, max_length=200)], ...] = Field((), max_length=5)


class SplitOptions(FrozenModel):
    strategy: Literal["hash", "stratified", "random", "group", "time", "predefined"] = "hash"
    validation: float = Field(0.15, gt=0, lt=0.9)
    test: float = Field(0.15, ge=0, lt=0.9)
    column: str | None = Field(None, min_length=1, max_length=200)
    group_column: str | None = Field(None, min_length=1, max_length=200)
    time_column: str | None = Field(None, min_length=1, max_length=200)
    leaks: Literal["auto", "keep", "drop"] = "auto"

    @property
    def column_read(self) -> str | None:
        """The column that the strategy goes by, if any."""
        return {"predefined": self.column, "group": self.group_column, "time": self.time_column}.get(self.strategy)

    def resolved(self) -> SplitOptions:
        """Without `auto`: leaks are dropped where we cut by a column, and kept where the sides were given."""
        if self.leaks != "auto":
            return self
        return self.model_copy(update={"leaks": "drop" if self.strategy in {"group", "time"} else "keep"})

    @model_validator(mode="after")
    def _names_the_column_of_its_strategy(self) -> SplitOptions:
        for strategy, name in (("predefined", "column"), ("group", "group_column"), ("time", "time_column")):
            is_given = getattr(self, name) is not None
            if self.strategy == strategy and not is_given:
                raise ValueError(f"strategy {strategy} needs {name}")
            if self.strategy != strategy and is_given:
                raise ValueError(f"{name} is for strategy {strategy} and would have no effect with {self.strategy}")
        return self

    @model_validator(mode="after")
    def _leaves_training_rows(self) -> SplitOptions:
        if self.validation + self.test > 0.9:
            raise ValueError("validation and test together leave less than a tenth of the rows for training")
        return self
