"""What a job says about its data: which columns hold what, and how rows are divided into sides."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, WithJsonSchema, model_validator

from modeling.inputs import MODALITIES, Modality
from modeling.tasks import DEFAULT_MODALITY, TASKS

TRAIN, VALIDATION, TEST = 0, 1, 2

SIDE_NAMES = {
    **dict.fromkeys(("train", "training", "trn", "fit"), TRAIN),
    **dict.fromkeys(("validation", "valid", "val", "dev", "development", "eval", "evaluation"), VALIDATION),
    **dict.fromkeys(("test", "testing", "tst", "holdout", "held-out"), TEST),
}


AUTO: Final = "auto"
DEFAULT_ANSWERS: Final = "label"
_MOST_JOINED = 10
JOINTS: Final[dict[str, str]] = {"text": "\n"}
"""What separates the cells of several columns that make up one role; a modality without has one column each."""


def _known_task(name: str) -> str:
    if name != AUTO and name not in TASKS:
        raise ValueError(f"there is no task {name[:60]!r}; known are {', '.join([AUTO, *TASKS])}")
    return name


def modality_of(task: str) -> Modality:
    """The modality of a task by name, the default one of `auto`."""
    return MODALITIES[DEFAULT_MODALITY if task == AUTO else TASKS[task].modality]


WantedTask = Annotated[str, AfterValidator(_known_task), WithJsonSchema({"type": "string", "enum": [AUTO, *TASKS]})]
"""A task by name, or `auto`: the label column decides."""


class FrozenModel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _with_roles(schema: dict[str, Any], _: type[BaseModel], *, is_default: bool) -> None:
    name = {"type": "string", "minLength": 1, "maxLength": 200}
    column = {"anyOf": [name, {"type": "array", "items": name, "minItems": 1, "maxItems": _MOST_JOINED}]}
    defaults = {
        role: {"default": role} if is_default and role in modality.roles[:1] else {}
        for modality in MODALITIES.values()
        for role in modality.roles
    }
    answers = {task.answer_column: name for task in TASKS.values()}
    schema["properties"] = answers | schema["properties"]
    schema["properties"] |= {role: column | default for role, default in defaults.items()}
    schema["additionalProperties"] = False


ColumnName = Annotated[str, Field(min_length=1, max_length=200)]
RoleColumns = ColumnName | Annotated[tuple[ColumnName, ...], Field(min_length=1, max_length=_MOST_JOINED)]
"""The column of a role, or several whose cells are joined."""


class _ByRole(BaseModel):
    """Columns of examples by role, as further fields."""

    model_config = ConfigDict(frozen=True, extra="allow", json_schema_extra=partial(_with_roles, is_default=True))
    __pydantic_extra__: dict[str, RoleColumns] = Field(init=False)

    def check(self, modality: Modality) -> None:
        """Raises `ValueError` for a role that the modality lacks, or columns that it cannot join."""
        for role, columns in self.named.items():
            if role not in modality.roles:
                raise ValueError(
                    f"{role[:60]!r} is no role of {modality.plural}; known are {', '.join(modality.roles)}"
                )
            if not isinstance(columns, str) and len(columns) > 1 and modality.name not in JOINTS:
                raise ValueError(f"{role}: {modality.plural} cannot be joined; name one column")

    @property
    def named(self) -> dict[str, str | tuple[str, ...]]:
        """The columns of examples as far as they were named."""
        return self.model_extra or {}


Roles = TypeVar("Roles", bound=_ByRole)


class SideColumns(_ByRole):
    """What is called otherwise in the dataset of a side; the other names are those of the training data."""

    model_config = ConfigDict(json_schema_extra=partial(_with_roles, is_default=False))
    label: ColumnName | None = None


class Columns(_ByRole):
    """Which columns of the dataset hold what, by role: those of the task's modality, `label`, and `slices`, which name
    groups of rows to evaluate apart."""

    label: ColumnName = "label"
    slices: tuple[ColumnName, ...] = Field((), max_length=5)

    def inputs(self, modality: Modality) -> dict[str, tuple[str, ...]]:
        """The columns of each role that makes up an example. Raises `ValueError` as `check` does."""
        self.check(modality)
        named = {modality.roles[0]: modality.roles[0], **self.named}
        return {role: (columns,) if isinstance(columns, str) else columns for role, columns in named.items()}

    @property
    def all_named(self) -> tuple[str, ...]:
        """Every column that was named for examples and their labels."""
        named = ((columns,) if isinstance(columns, str) else columns for columns in self.named.values())
        return (*(name for columns in named for name in columns), self.label)

    def of_side(self, other: SideColumns | None) -> Columns:
        """The columns in the dataset of a side."""
        if other is None:
            return self
        return self.model_copy(update=other.named | ({} if other.label is None else {"label": other.label}))


def _of_task(columns: Columns, info: ValidationInfo) -> Columns:
    """The columns with the roles that the field `task` needs, named or not."""
    task = info.data.get("task", AUTO)
    columns, modality = _with_answers(columns, task), modality_of(task)
    columns.check(modality)
    update: dict[str, Any] = {modality.roles[0]: modality.roles[0], **columns.named}
    if "label" not in columns.model_fields_set:
        update["label"] = DEFAULT_ANSWERS if task == AUTO else TASKS[task].answer_column
    return columns.model_copy(update=update)


def _known_to_task(columns: SideColumns | None, info: ValidationInfo) -> SideColumns | None:
    if columns is None:
        return None
    task = info.data.get("task", AUTO)
    columns = _with_answers(columns, task)
    columns.check(modality_of(task))
    return columns


def _with_answers(columns: Roles, task: str) -> Roles:
    """The columns with that of the answers as `label`, if it was named by the role that the task has for it: `spans`.
    Raises `ValueError` if it was named twice."""
    role = DEFAULT_ANSWERS if task == AUTO else TASKS[task].answer_column
    if role == DEFAULT_ANSWERS or role not in columns.named:
        return columns
    if "label" in columns.model_fields_set:
        raise ValueError(f"{role} and label are both given, and mean the same for {task}; give one of them")
    others = {name: value for name, value in columns.named.items() if name != role}
    given = {name: getattr(columns, name) for name in columns.model_fields_set if name in type(columns).model_fields}
    return type(columns).model_validate({**given, **others, "label": columns.named[role]})


TaskColumns = Annotated[Columns, AfterValidator(_of_task)]
"""Columns beside a task, in a field behind it."""
TaskSideColumns = Annotated[SideColumns | None, AfterValidator(_known_to_task)]
"""The same of a side."""


class RareClasses(FrozenModel):
    """What becomes of classes with fewer than `least` different inputs."""

    policy: Literal["keep", "drop", "other"] = "keep"
    least: int = 3


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
