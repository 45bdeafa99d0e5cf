"""What a training method is made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from torch import nn

from steadydetr.detectors.base import Detector
from steadydetr.learning.context import StepContext
from steadydetr.learning.criterion import Criterion
from steadydetr.learning.matching import Problem
from steadydetr.structures import Losses, MatchResult, QueryGroup, Stages


class Objective(ABC):
    """A frozen dataclass that adds query groups to the decoder's pass and terms to the loss.

    `name` prefixes its losses, so it is unique within a method.
    """

    teacher: str | None = None  # whom it learns from; a field of those that do

    @property
    @abstractmethod
    def name(self) -> str: ...

    @property
    def learns_from(self) -> tuple[str, ...]:
        """The names of its teachers."""
        return () if self.teacher is None else (self.teacher,)

    @property
    def reads(self) -> tuple[str, ...]:
        """Those of them whose teacher_output it looks at in a step. Teachers that nobody reads are not run."""
        return self.learns_from

    def check(self, student: Detector, teachers: Mapping[str, Detector]) -> None:  # noqa: B027
        """Raise ValueError, with the reason, where this objective cannot work with these models. Called when a method is built."""

    def prepare(self, student: Detector, teachers: Mapping[str, Detector]) -> nn.Module | None:
        """What this objective trains besides the student, such as an adapter of its width to the teacher's: `context.adapters[name]`.

        Called once, when a method is built; here the student can also be given another start. Not part of the student's checkpoint.
        """
        return None

    def query_groups(self, context: StepContext) -> list[QueryGroup]:
        """Queries for the decoder's pass."""
        return []

    def problems(self, context: StepContext, stages: Mapping[str, Stages], criterion: Criterion) -> list[Problem]:
        """Assignment problems; all objectives' problems of a step are solved with one fetch."""
        return []

    @abstractmethod
    def add_losses(
        self, losses: Losses, context: StepContext, stages: Mapping[str, Stages], solved: Mapping[str, MatchResult], criterion: Criterion
    ) -> None:
        """Add this objective's terms; `solved` holds every problem of the step by its name."""


def require_teacher(objective: str, name: str, teachers: Mapping[str, Detector]) -> None:
    if name not in teachers:
        known = f"has {', '.join(teachers)}" if teachers else "has none"
        raise ValueError(f"objective {objective} learns from a teacher called {name!r}, but the recipe {known}")


def require_alike(objective: str, name: str, student: Detector, teachers: Mapping[str, Detector], attributes: Sequence[str]) -> None:
    """For objectives that give the student the teacher's queries, or their stages one by one: both must have the same attributes."""
    require_teacher(objective, name, teachers)
    teacher = teachers[name]
    for attribute in attributes:
        ours, theirs = getattr(student, attribute), getattr(teacher, attribute)
        if ours != theirs:
            raise ValueError(
                f"objective {objective} compares student and teacher query by query: the student ({student.architecture}) has"
                f" {attribute} = {ours}, the teacher {name!r} ({teacher.architecture}) {theirs}. It is made for the student's average, ema"
            )
