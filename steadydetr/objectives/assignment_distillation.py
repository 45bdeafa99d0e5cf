"""Query-prior assignment distillation (DETRDistill 4.3, Eq. 9): the teacher's queries as an extra group with the teacher's assignment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from steadydetr.detectors import DeformableDETR
from steadydetr.detectors.base import Detector
from steadydetr.equations.distill import teacher_stages
from steadydetr.learning.context import StepContext
from steadydetr.learning.criterion import Criterion, Weights
from steadydetr.learning.matching import Problem
from steadydetr.objectives.base import Objective, require_teacher
from steadydetr.objectives.matching_distillation import pick
from steadydetr.structures import Assignment, Losses, Match, MatchResult, Queries, QueryGroup, Stages


@dataclass(frozen=True)
class AssignmentDistillation(Objective):
    """Default: Teacher Assigned. The supplement's Table 4 also has `matching own` (Teacher Group) and `init` (Teacher Init).

    The teacher's queries are constants; where its width differs, learned linear layers adapt content and position vectors.
    """

    teacher: str = "teacher"
    matching: Literal["teacher", "own"] = "teacher"
    init: bool = False  # no group: the student's learned queries only start as the teacher's
    reference: Literal["teacher", "student"] = "teacher"  # student: made by its own layer from the teacher's position vectors  # D-39
    weight: float = 1.0  # lambda_3

    def __post_init__(self) -> None:
        if self.init and replace(self, init=False) != AssignmentDistillation(self.teacher):
            raise ValueError(
                "objective assignment: init has no group of the teacher's queries: leave matching, reference and weight as they are"
            )

    @property
    def name(self) -> str:
        return "assignment"

    @property
    def reads(self) -> tuple[str, ...]:
        return () if self.init else self.learns_from

    def check(self, student: Detector, teachers: Mapping[str, Detector]) -> None:
        require_teacher(self.name, self.teacher, teachers)
        teacher = teachers[self.teacher]
        ours, theirs = type(student).__name__, type(teacher).__name__
        if self.init:
            mine, given = learned_queries(student), learned_queries(teacher)
            if not mine or shapes(mine) != shapes(given):
                raise ValueError(
                    "objective assignment: init needs learned queries of equal number and width in student and teacher, but"
                    f" the student ({ours}) has {shapes(mine) or 'none'}, the teacher ({theirs}) {shapes(given) or 'none'}"
                )
        elif student.positioned and not teacher.positioned:
            raise ValueError(
                f"objective assignment: every query of the student ({ours}) brings a position vector, which the queries of the teacher"
                f" ({theirs}) have not; take a Deformable DETR for a teacher, or --objectives.assignment none"
            )
        elif self.reference == "student" and not makes_references(student):
            raise ValueError(
                "objective assignment: reference student needs a layer that makes references of position vectors, as a one-stage"
                f" Deformable DETR has; the student ({ours}) has none"
            )

    def prepare(self, student: Detector, teachers: Mapping[str, Detector]) -> nn.Module | None:
        teacher = teachers[self.teacher]
        if self.init:
            with torch.no_grad():
                for mine, given in zip(learned_queries(student).values(), learned_queries(teacher).values(), strict=True):
                    mine.copy_(given)
            return None
        if teacher.width == student.width:
            return None
        adapted = ("content", "position") if student.positioned else ("content",)
        return nn.ModuleDict({part: nn.Linear(teacher.width, student.width) for part in adapted})

    def query_groups(self, context: StepContext) -> list[QueryGroup]:
        return [] if self.init else [QueryGroup(self.name, self._queries(context))]

    def problems(self, context: StepContext, stages: Mapping[str, Stages], criterion: Criterion) -> list[Problem]:
        if self.init or self.matching == "teacher":
            return []
        return [criterion.problem(stages[self.name], context.targets, self.name)]

    def add_losses(
        self, losses: Losses, context: StepContext, stages: Mapping[str, Stages], solved: Mapping[str, MatchResult], criterion: Criterion
    ) -> None:
        if self.init:
            return
        predicted = stages[self.name]
        match = solved[self.name].match if self.matching == "own" else self._taught(context, len(predicted.logits))
        w = criterion.loss_weights
        weights = Weights(self.weight * w.label, self.weight * w.l1, self.weight * w.giou)
        criterion.add_losses(losses, self.name, predicted, Assignment((match,), match), context.targets, context.normaliser, weights)

    def _queries(self, context: StepContext) -> Queries:
        """Those of the teacher. They have a size only where the student's own have, so that its first stage need not learn two kinds."""
        given, student = context.teacher_outputs[self.teacher].queries, context.student
        content, position = given.content, given.position if student.positioned else None
        adapter = context.adapters.get(self.name)
        if isinstance(adapter, nn.ModuleDict):
            content = adapter["content"](content)
            position = None if position is None else adapter["position"](position)
        if self.reference == "student":
            assert isinstance(student, DeformableDETR) and position is not None
            return Queries(content, student.refer(position), sized=False, position=position)
        return Queries(content, given.reference, given.sized and context.queries["main"].sized, given.valid, position)

    def _taught(self, context: StepContext, stages: int) -> Match:
        """The teacher's match, at every stage of the student that of the teacher's stage that it learns from (Fig. 5)."""
        teacher_output = context.teacher_outputs[self.teacher]
        query = teacher_output.holders(teacher_stages(stages, len(teacher_output.stages.logits)).tolist()).flatten()
        return pick(context.targets.repeat_batch(stages).image, query, query >= 0)


def makes_references(student: Detector) -> bool:
    return isinstance(student, DeformableDETR) and not student.config.two_stage


def learned_queries(detector: Detector) -> dict[str, Tensor]:
    """What of a detector's queries is learned: content, position vectors and the layer that makes references of them, or anchors."""
    return {name: parameter for name, parameter in detector.named_parameters() if name.startswith("query_")}


def shapes(parameters: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name.removesuffix('.weight')} {list(p.shape)}" for name, p in parameters.items())
