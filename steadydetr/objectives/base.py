"""What a training method is made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from steadydetr.lazy import nn
from steadydetr.learning.context import StepContext
from steadydetr.learning.matching import Problem
from steadydetr.structures import DecodedStages, Losses, MatchResult, QueryGroup

if TYPE_CHECKING:
    from steadydetr.detectors.base import Detector

Predicted = Mapping[str, DecodedStages]  # the predictions of all query groups of a step, by the group's name
Matched = Mapping[str, MatchResult]  # the solutions of all assignment problems of a step, by the problem's name


class Objective(ABC):
    """A frozen dataclass that adds query groups to the decoder's pass and terms to the loss.

    `name` prefixes its losses, so it is unique within a method.
    """

    teacher: str | None = None  # the name of the teacher that it learns from: a field of those objectives that have one
    embeds_labels: bool = False  # whether it uses the student's `embed`; what only that trains is left out where no objective does
    extra_groups: tuple[str, ...] = ()  # those of the student's `extra_groups` that it uses; the same holds for them

    @property
    @abstractmethod
    def name(self) -> str: ...

    @property
    def distils(self) -> bool:
        """Whether it exists only together with a teacher. What a detector learns by itself may use a teacher too, but does not need it."""
        return self.teacher is not None

    @property
    def learns_from(self) -> tuple[str, ...]:
        """The names of its teachers."""
        return () if self.teacher is None else (self.teacher,)

    @property
    def reads(self) -> tuple[str, ...]:
        """Those teachers whose output it uses in every step. Teachers that no objective reads are not run."""
        return self.learns_from

    def check(self, student: Detector, teachers: Mapping[str, Detector]) -> None:  # noqa: B027
        """Raise ValueError, with the reason, where this objective cannot work with these models. Called when a method is built."""

    def prepare(self, student: Detector, teachers: Mapping[str, Detector]) -> nn.Module | None:
        """What this objective trains besides the student, such as a layer from its width to the teacher's: `context.adapters[name]`.

        Called once, when a method is built. It may also give the student another start. Not part of the student's checkpoint.
        """
        return None

    def query_groups(self, context: StepContext) -> list[QueryGroup]:
        """Queries for the decoder's pass, whose predictions `add_losses` gets by the group's name."""
        return []

    def problems(self, context: StepContext, stages: Predicted) -> list[Problem]:
        """Assignment problems. Those of all objectives are solved together, with one fetch to the host."""
        return []

    @abstractmethod
    def add_losses(self, losses: Losses, context: StepContext, stages: Predicted, matched: Matched) -> None:
        """Add this objective's terms."""


def require_further_queries(objective: str, student: Detector) -> None:
    """Raise ValueError where the student makes none."""
    if not student.makes_queries:
        raise ValueError(
            f"objective {objective}: {student.architecture} makes no further queries; --objectives.{objective} none leaves it out"
        )


def require_teacher(objective: str, name: str, teachers: Mapping[str, Detector]) -> None:
    """Raise ValueError where the recipe has no teacher of that name."""
    if name not in teachers:
        known = f"has {', '.join(teachers)}" if teachers else "has none"
        raise ValueError(f"objective {objective} learns from a teacher called {name!r}, but the recipe {known}")


def require_alike(objective: str, name: str, student: Detector, teachers: Mapping[str, Detector], attributes: Sequence[str]) -> None:
    """Raise ValueError where student and teacher differ in one of these attributes.

    For objectives that give the teacher's queries to the student, or that compare both stage by stage.
    """
    require_teacher(objective, name, teachers)
    teacher = teachers[name]
    for attribute in attributes:
        ours, theirs = getattr(student, attribute), getattr(teacher, attribute)
        if ours != theirs:
            raise ValueError(
                f"objective {objective} compares student and teacher query by query: the student ({student.architecture}) has"
                f" {attribute} = {ours}, the teacher {name!r} ({teacher.architecture}) {theirs}. It is made for the student's average, ema"
            )
