"""The detection loss of DETR: one-to-one matching of the main queries at every stage, and of the encoder's proposals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from steadydetr.detectors.base import Detector
from steadydetr.learning.context import StepContext
from steadydetr.learning.criterion import Criterion
from steadydetr.learning.matching import Problem, query_of_targets
from steadydetr.objectives.base import Objective, require_alike
from steadydetr.objectives.matching_distillation import MatchingDistillation, teacher_queries
from steadydetr.structures import Assignment, Losses, MatchResult, QueryGroup, Stages, Targets


@dataclass(frozen=True)
class SetPrediction(Objective):
    """Owner of the group "main" and of the proposals."""

    teacher_match: MatchingDistillation | None = None  # a teacher whose match is learned beside the student's own

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

    def problems(self, context: StepContext, stages: Mapping[str, Stages], criterion: Criterion) -> list[Problem]:
        problems = [criterion.problem(stages["main"], context.targets, "main")]
        if context.proposals is not None:
            problems.append(criterion.problem(context.proposals, proposal_targets(context), "proposals"))
        return problems

    def add_losses(
        self, losses: Losses, context: StepContext, stages: Mapping[str, Stages], solved: Mapping[str, MatchResult], criterion: Criterion
    ) -> None:
        criterion.add_losses(
            losses,
            "main",
            stages["main"],
            self._assign(losses, context, stages["main"], solved["main"]),
            context.targets,
            context.normaliser,
        )
        if context.proposals is not None:
            match = solved["proposals"].match
            targets = proposal_targets(context)
            criterion.add_losses(losses, "proposals", context.proposals, Assignment((match,), match), targets, context.normaliser)

    def _assign(self, losses: Losses, context: StepContext, stages: Stages, solved: MatchResult) -> Assignment:
        if self.teacher_match is None:
            return Assignment((solved.match,), solved.match)
        taught = teacher_queries(context.teacher_outputs[self.teacher_match.teacher], context, self.teacher_match.counterparts)
        own, rows = query_of_targets(solved.match, len(taught)), max(len(taught), 1)
        losses.measure("main/same_query_as_teacher", ((taught == own) & (own >= 0)).sum() / rows)
        losses.measure("main/without_counterpart", (taught < 0).sum() / rows)
        return self.teacher_match.assign(solved, taught, stages, context.targets)


def proposal_targets(context: StepContext) -> Targets:
    """The targets of the proposals: without their classes where the detector's proposals know none (F-16)."""
    targets = context.targets
    return replace(targets, labels=torch.zeros_like(targets.labels)) if context.student.class_agnostic_proposals else targets
