"""What the JSON files of a run must hold to be read by reports and figures: names and types. Further keys are allowed."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from steadydetr.files import one_line
from steadydetr.metrics.table import CLASS_METRICS, METRICS

Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Layer = Annotated[str, msgspec.Meta(pattern=r"^\d{1,4}$")]
Values = Annotated[list[float], msgspec.Meta(max_length=1000)]  # of decoder stages
Named = Annotated[dict[str, float], msgspec.Meta(max_length=1000)]
ByClass = dict[str, float | None]


class TrainRecord(msgspec.Struct):
    step: Count
    epoch: Count
    loss: float
    losses: Named
    lr: float
    gradient_norm: float
    images_per_second: float
    measures: Named = {}
    memory_gib: float | None = None


class Measured(msgspec.Struct):
    """What records of evaluations and of stability share."""

    step: Count
    epoch: Count
    weights: Literal["model", "ema"]


EvalRecord = msgspec.defstruct(
    "EvalRecord",
    [*((metric.name, float | None, None) for metric in METRICS), *((metric.name, ByClass | None, None) for metric in CLASS_METRICS)],
    bases=(Measured,),
    kw_only=True,
)


class StabilityRecord(Measured):
    unstable_score: Annotated[dict[Layer, float], msgspec.Meta(max_length=1000)]
    between_stages: Values
    between_epochs: float | None
    consistency: Values | None


class Plan(msgspec.Struct):
    """A recipe's training, as far as a report needs it."""

    epochs: Count
    batch_size: Count
    seed: int
    schedule: str = ""
    drop_epochs: Values = []


class PlannedData(msgspec.Struct):
    source: str = ""
    val_source: str = ""
    val_split: str = ""
    limit: int | None = None


class PlannedTeacher(msgspec.Struct):
    checkpoint: str = ""


class PlannedRecipe(msgspec.Struct):
    training: Plan
    name: str = "?"
    data: PlannedData | None = None
    teachers: list[PlannedTeacher] = []


class ConfigFile(msgspec.Struct):
    """config.json of a run. Its recipe may be of another version."""

    recipe: dict[str, Any]
    classes: list[str] = []
    category_ids: list[int] = []
    data: dict[str, str] = {}


class DividedPlace(msgspec.Struct):
    place: str
    split: str
    train: list[str]
    val: list[str]


class SplitsFile(msgspec.Struct):
    """splits.json of a run."""

    divisions: list[DividedPlace]


class SummaryFile(msgspec.Struct):
    """summary.json; the metrics in it have the names and types of an evaluation's."""

    seconds: float | None = None


RECORDS: dict[str, Any] = {"train": TrainRecord, "eval": EvalRecord, "stability": StabilityRecord}  # by kind


def check_types(content: Any, expected: Any, where: str, mend: str = "") -> None:
    """Raise ValueError, saying where, if a plain JSON value lacks a name or has a value of another type than `expected` has."""
    try:
        msgspec.convert(content, expected)
    except (msgspec.ValidationError, OverflowError) as error:
        raise ValueError(f"{where}: {one_line(error, 300)}{mend}") from None
