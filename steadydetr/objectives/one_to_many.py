"""Hybrid matching (H-DETR 3.2): the queries of a group of its own are matched with every object several times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from steadydetr.config import check_within
from steadydetr.kinds import register
from steadydetr.lazy import nn
from steadydetr.learning.context import StepContext
from steadydetr.learning.matching import Problem
from steadydetr.objectives.base import Matched, Objective, Predicted, require_further_queries
from steadydetr.structures import Assignment, Losses, QueryGroup

if TYPE_CHECKING:
    from steadydetr.detectors.base import Detector


PAPERS = 1500  # further queries


@register("one-to-many")
@dataclass(frozen=True)
class OneToMany(Objective):
    """Defaults: the paper's. The encoder's proposals are matched one to one, by the objective main."""

    repeats: int = 6  # queries that learn each object
    queries: int | None = None  # of the group; None: 1500, as in the paper, or those of H-Deformable-DETR, which has them itself
    weight: float = 1.0  # of the group's losses

    extra_groups = ("one-to-many",)

    def __post_init__(self) -> None:
        check_within("objectives.one-to-many", self, repeats=(1, 1000), weight=(0, 1000))
        if self.queries is not None:
            check_within("objectives.one-to-many", self, queries=(1, 10**6))

    @property
    def name(self) -> str:
        return "one-to-many"

    def check(self, student: Detector, teachers: Mapping[str, Detector]) -> None:
        if self.name not in student.extra_groups:
            require_further_queries(self.name, student)
        elif self.queries is not None:
            raise ValueError(
                f"objectives.one-to-many.queries: {student.architecture} has further queries of its own; their number is"
                " --detector.one-to-many-queries"
            )

    def prepare(self, student: Detector, teachers: Mapping[str, Detector]) -> nn.Module | None:
        """What the further queries are made of, where the student has none itself: trained beside it and no part of it (D-212)."""
        return None if self.name in student.extra_groups else student.new_queries(self.queries or PAPERS)

    def query_groups(self, context: StepContext) -> list[QueryGroup]:
        """None in evaluation mode, where the detector has the queries itself."""
        parts = context.adapters.get(self.name)
        if parts is not None:
            queries, _ = context.student.further_queries(context.memory, parts, self.queries or PAPERS)
            return [QueryGroup(self.name, queries)]
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
