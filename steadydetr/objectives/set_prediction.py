"""The detection loss of DETR: the main queries at every stage, and the encoder's proposals, are matched and learn their targets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from steadydetr.kinds import register
from steadydetr.learning.context import StepContext
from steadydetr.learning.matching import Problem
from steadydetr.learning.predictions import proposal_targets
from steadydetr.objectives.base import Matched, Objective, Predicted, require_alike
from steadydetr.objectives.matching_distillation import MatchingDistillation, teacher_queries
from steadydetr.structures import Assignment, DecodedStages, Losses, MatchResult, QueryGroup

if TYPE_CHECKING:
    from steadydetr.detectors.base import Detector


@register("set-prediction", "set-prediction", "detection")
@dataclass(frozen=True)
class SetPrediction(Objective):
    """Adds the query group "main" and the losses of the proposals; a method has it once."""

    teacher_match: MatchingDistillation | None = None  # a query also learns the targets that a teacher matches to its counterpart

    @property
    def name(self) -> str:
        return "main"

    @property
    def learns_from(self) -> tuple[str, ...]:
        return () if self.teacher_match is None else (self.teacher_match.teacher,)

    def check(self, student: Detector, teachers: Mapping[str, Detector]) -> None:
        if self.teacher_match is not None:
            require_alike(self.name, self.teacher_match.teacher, student, teachers, ("architecture", "stages"))

    def query_groups(self, context: StepContext) -> list[QueryGroup]:
        return [QueryGroup("main", context.queries["main"])]

    def problems(self, context: StepContext, stages: Predicted) -> list[Problem]:
        criterion = context.criterion
        problems = [criterion.mixed_problem(stages["main"], context.targets, "main", last=True)]
        if context.proposals is not None:
            targets = proposal_targets(context.student, context.targets)
            problems.append(criterion.mixed_problem(context.proposals, targets, "proposals", last=False))
        return problems

    def add_losses(self, losses: Losses, context: StepContext, stages: Predicted, matched: Matched) -> None:
        criterion, main, normaliser = context.criterion, stages["main"], context.normaliser
        assignment = self._assign(losses, context, main, matched["main"])
        criterion.add_losses(losses, "main", main, assignment, context.targets, normaliser)
        if context.proposals is not None:
            targets = proposal_targets(context.student, context.targets)
            match = criterion.shared(matched["proposals"].match, context.proposals, targets)
            criterion.add_losses(losses, "proposals", context.proposals, Assignment.of(match), targets, normaliser)

    def _assign(self, losses: Losses, context: StepContext, stages: DecodedStages, matched: MatchResult) -> Assignment:
        """The student's own match, joined with the teacher's where there is one; with it, how far they agree is logged."""
        own = context.criterion.shared(matched.match, stages, context.targets)
        if self.teacher_match is None:
            return Assignment.of(own)
        teacher_output = context.teacher_outputs[self.teacher_match.teacher]
        teacher = teacher_queries(teacher_output, context.queries["main"], self.teacher_match.counterparts)
        rows = max(teacher.query.numel(), 1)
        losses.measure("main/same_query_as_teacher", (teacher.query.flatten()[own.target] == own.query).sum() / rows)
        losses.measure("main/without_counterpart", (~teacher.valid).sum() / rows)
        return self.teacher_match.assign(MatchResult(own, matched.cost), teacher, stages, context.targets)
