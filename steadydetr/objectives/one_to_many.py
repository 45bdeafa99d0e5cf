"""Hybrid matching (H-DETR 3.2): the queries of a group of its own are matched with every object several times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from steadydetr.config import check_within
from steadydetr.kinds import register
from steadydetr.learning.context import StepContext
from steadydetr.learning.matching import Problem
from steadydetr.objectives.base import Matched, Objective, Predicted
from steadydetr.structures import Assignment, Losses, QueryGroup

if TYPE_CHECKING:
    from steadydetr.detectors.base import Detector


@register("one-to-many")
@dataclass(frozen=True)
class OneToMany(Objective):
    """Defaults: the paper's. The encoder's proposals are matched one to one, by the objective main."""

    repeats: int = 6  # queries that learn each object
    weight: float = 1.0  # of the group's losses

    extra_groups = ("one-to-many",)

    def __post_init__(self) -> None:
        check_within("objectives.one-to-many", self, repeats=(1, 1000), weight=(0, 1000))

    @property
    def name(self) -> str:
        return "one-to-many"

    def check(self, student: Detector, teachers: Mapping[str, Detector]) -> None:
        if self.name not in student.extra_groups:
            raise ValueError(
                f"objective {self.name} needs a detector with further queries for it, which {student.architecture} has not:"
                " use H-Deformable-DETR, or the objective groups"
            )

    def query_groups(self, context: StepContext) -> list[QueryGroup]:
        """None in evaluation mode, in which the detector has no such queries."""
        return [QueryGroup(self.name, context.queries[self.name])] if self.name in context.queries else []

    def problems(self, context: StepContext, stages: Predicted) -> list[Problem]:
        if self.name not in stages:
            return []
        problem = context.criterion.problem(stages[self.name], context.targets, self.name)
        return [replace(problem, queries=(self.repeats,) * len(problem.counts))]

    def add_losses(self, losses: Losses, context: StepContext, stages: Predicted, matched: Matched) -> None:
        """The sums are divided by the number of pairs that there are to be, objects times repeats."""
        if self.name not in stages:
            return
        criterion, assignment, normaliser = context.criterion, Assignment.of(matched[self.name].match), context.normaliser * self.repeats
        criterion.add_losses(losses, self.name, stages[self.name], assignment, context.targets, normaliser, factor=self.weight)
