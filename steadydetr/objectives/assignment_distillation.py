"""Query-prior assignment distillation (DETRDistill 4.3, Eq. 9): the teacher's queries as an extra group with the teacher's assignment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from steadydetr.equations.distill import teacher_stages
from steadydetr.kinds import register
from steadydetr.lazy import nn, torch
from steadydetr.learning.context import StepContext
from steadydetr.learning.matching import Problem
from steadydetr.objectives.base import Matched, Objective, Predicted, require_teacher
from steadydetr.structures import Assignment, Losses, Match, Queries, QueryGroup

if TYPE_CHECKING:
    from torch import Tensor

    from steadydetr.detectors.base import Detector


@register("assignment-distillation")
@dataclass(frozen=True)
class AssignmentDistillation(Objective):
    """Default: Teacher Assigned. The supplement's Table 4 also has `matching own` (Teacher Group) and `TeacherInit`.

    The teacher's queries are constants; where its width differs, learned linear layers adapt content and position vectors. A student
    whose queries bring position vectors gets a layer that makes them of boxes, where the teacher's bring none (D-214).
    """

    teacher: str = "teacher"
    matching: Literal["teacher", "own"] = "teacher"
    reference: Literal["teacher", "student"] = "teacher"  # student: made by its own layer from the teacher's position vectors  # D-39
    weight: float = 1.0  # lambda_3

    @property
    def name(self) -> str:
        return "assignment"

    def check(self, student: Detector, teachers: Mapping[str, Detector]) -> None:
        require_teacher(self.name, self.teacher, teachers)
        teacher = teachers[self.teacher]
        ours, theirs = student.architecture, teacher.architecture
        if self.reference == "student" and not student.makes_references:
            raise ValueError(
                "objective assignment: reference student needs a layer that makes references of position vectors, as a one-stage"
                f" Deformable DETR has; the student ({ours}) has none"
            )
        if self.reference == "student" and not teacher.positioned:
            raise ValueError(
                f"objective assignment: reference student is made of the teacher's position vectors, which the queries of the teacher"
                f" ({theirs}) have not: --objectives.assignment.reference teacher"
            )

    def prepare(self, student: Detector, teachers: Mapping[str, Detector]) -> nn.Module | None:
        teacher, layers = teachers[self.teacher], nn.ModuleDict()
        if teacher.width != student.width:
            adapted = ("content", "position") if student.positioned and teacher.positioned else ("content",)
            layers.update({part: nn.Linear(teacher.width, student.width) for part in adapted})
        layer = student.new_position() if student.positioned and not teacher.positioned else None
        if layer is not None:
            layers["position"] = layer
        return layers or None

    def query_groups(self, context: StepContext) -> list[QueryGroup]:
        return [QueryGroup(self.name, self._queries(context))]

    def problems(self, context: StepContext, stages: Predicted) -> list[Problem]:
        return [] if self.matching == "teacher" else [context.criterion.problem(stages[self.name], context.targets, self.name)]

    def add_losses(self, losses: Losses, context: StepContext, stages: Predicted, matched: Matched) -> None:
        predicted = stages[self.name]
        match = matched[self.name].match if self.matching == "own" else self._teacher_match(context, len(predicted.logits))
        assignment, factor = Assignment.of(match), self.weight
        context.criterion.add_losses(losses, self.name, predicted, assignment, context.targets, context.normaliser, factor=factor)

    def _queries(self, context: StepContext) -> Queries:
        """The teacher's queries. Their references have a size only where the student's own have, so that its first stage sees one kind."""
        given, student = context.teacher_outputs[self.teacher].queries, context.student
        layers = dict(context.adapters[self.name].named_children()) if self.name in context.adapters else {}
        content, position = given.content, given.position if student.positioned else None
        content = layers["content"](content) if "content" in layers else content
        if student.positioned and position is None:
            position = student.position_of(layers.get("position"), given.reference, content)
        elif "position" in layers:
            position = layers["position"](position)
        if self.reference == "student" and position is not None:
            return Queries(content, student.refer(position), sized=False, position=position)
        return Queries(content, given.reference, given.sized and context.queries["main"].sized, given.valid, position)

    def _teacher_match(self, context: StepContext, stages: int) -> Match:
        """At every stage of the student the teacher's match of the stage that it learns from (Fig. 5)."""
        teacher_output = context.teacher_outputs[self.teacher]
        chosen = teacher_stages(stages, len(teacher_output.stages.logits)).tolist()
        return teacher_output.matched_queries.at_stages(chosen).pairs()


@register("teacher-init")
@dataclass(frozen=True)
class TeacherInit(Objective):
    """Teacher Init of the supplement's Table 4: no group and no loss, but the student's learned queries start as the teacher's."""

    teacher: str = "teacher"

    @property
    def name(self) -> str:
        return "assignment"

    @property
    def reads(self) -> tuple[str, ...]:
        return ()

    def check(self, student: Detector, teachers: Mapping[str, Detector]) -> None:
        require_teacher(self.name, self.teacher, teachers)
        teacher = teachers[self.teacher]
        mine, given = student.learned_queries(), teacher.learned_queries()
        if not mine or named_shapes(mine) != named_shapes(given):
            raise ValueError(
                "objective assignment: Teacher Init needs learned queries of equal number and width in student and teacher, but"
                f" the student ({student.architecture}) has {named_shapes(mine) or 'none'}, the teacher ({teacher.architecture})"
                f" {named_shapes(given) or 'none'}: --objectives.assignment assignment-distillation"
            )

    def prepare(self, student: Detector, teachers: Mapping[str, Detector]) -> None:
        with torch.no_grad():
            for mine, given in zip(student.learned_queries().values(), teachers[self.teacher].learned_queries().values(), strict=True):
                mine.copy_(given)

    def add_losses(self, losses: Losses, context: StepContext, stages: Predicted, matched: Matched) -> None:
        """None: it acts before the first step."""


def named_shapes(parameters: Mapping[str, Tensor]) -> str:
    """Names and shapes for a message."""
    return ", ".join(f"{name.removesuffix('.weight')} {list(p.shape)}" for name, p in parameters.items())
