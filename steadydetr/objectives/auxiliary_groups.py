"""Auxiliary groups (OD-DETR 3.4): the teacher's best updated queries of each stage enter the student's first stage.

Legend: S student stages, T teacher stages, which is the number of auxiliary groups; B images, G objects, N queries, M those of the teacher;
K slots of a group. A group's stage is to the criterion one more stage: S * T stages in all, the student's stage first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from steadydetr.kinds import register
from steadydetr.lazy import torch
from steadydetr.learning.context import StepContext
from steadydetr.learning.matching import Problem, cheapest_queries
from steadydetr.objectives.base import Matched, Objective, Predicted, require_alike
from steadydetr.objectives.matching_distillation import JoinedMatches
from steadydetr.structures import (
    Assignment,
    Losses,
    MatchedQueries,
    Queries,
    QueryGroup,
    Stages,
    take_rows,
)

if TYPE_CHECKING:
    from torch import Tensor

    from steadydetr.detectors.base import Detector

CHEAPEST = 2  # queries of each target


@register("auxiliary-groups")
@dataclass(frozen=True)
class AuxiliaryGroups(Objective):
    """Defaults: OD-DETR's. Its Table 6 varies `matching`."""

    teacher: str = "ema"
    matching: Literal["both", "own", "teacher"] = "both"  # both: the student's own match of the group, joined with the teacher's
    distillation: JoinedMatches = JoinedMatches()  # how both are joined
    reduction: Literal["mean", "sum"] = "mean"  # over the groups  # D-34

    @property
    def name(self) -> str:
        return "auxiliary"

    def check(self, student: Detector, teachers: Mapping[str, Detector]) -> None:
        require_alike(self.name, self.teacher, student, teachers, ("width", "positioned"))
        if not student.takes_boxes:
            raise ValueError(
                "objective auxiliary: its queries start from the teacher's boxes, but a query of the student"
                f" ({student.architecture}) is about a point, which takes no box: --objectives.auxiliary none"
            )

    def query_groups(self, context: StepContext) -> list[QueryGroup]:
        """All auxiliary groups side by side, as blocks that do not see each other."""
        teacher_output, (chosen, valid) = context.teacher_outputs[self.teacher], self._chosen(context)
        count, _, slots = chosen.shape

        def gather(tensor: Tensor) -> Tensor:
            """[T, B, M, D] -> [B, T*K, D]."""
            return take_rows(tensor, chosen).transpose(0, 1).flatten(1, 2)

        position = teacher_output.queries.position  # D-57
        queries = Queries(
            gather(teacher_output.stages.content),
            gather(teacher_output.stages.boxes),
            valid=valid.transpose(0, 1).flatten(1, 2),
            position=None if position is None else gather(position.expand(count, -1, -1, -1)),
        )
        blocks = torch.arange(count, device=chosen.device).repeat_interleave(slots)
        return [QueryGroup(self.name, queries, blocks=blocks)]

    def problems(self, context: StepContext, stages: Predicted) -> list[Problem]:
        return [context.criterion.problem(self._fold(stages[self.name], context), context.targets, self.name)]

    def add_losses(self, losses: Losses, context: StepContext, stages: Predicted, matched: Matched) -> None:
        predicted, own = self._fold(stages[self.name], context), matched[self.name]
        teacher = self._teacher_slots(context)
        losses.measure(f"{self.name}/targets_outside", (~teacher.valid).sum() / max(teacher.query.numel(), 1))
        teacher = teacher.repeated(len(stages[self.name].logits))
        if self.matching == "both":
            assignment = self.distillation.assign(own, teacher, predicted, context.targets)
        else:
            assignment = Assignment.of(own.match if self.matching == "own" else teacher.pairs())
        groups = len(context.teacher_outputs[self.teacher].stages.logits) if self.reduction == "mean" else 1
        context.criterion.add_losses(losses, self.name, predicted, assignment, context.targets, context.normaliser * groups)

    def _chosen(self, context: StepContext) -> tuple[Tensor, Tensor]:
        """The teacher's queries in the slots of every group and which slots hold one, [T, B, K] each.

        Where the step has no objects there is one empty slot (D-29).
        """
        teacher_output = context.teacher_outputs[self.teacher]
        count, images, queries, _ = teacher_output.stages.logits.shape
        folded = context.targets.repeat_batch(count)
        slots = max(min(CHEAPEST * context.batch.global_totals.most_objects, queries), 1)
        chosen, valid = cheapest_queries(teacher_output.matched.cost, folded.image, len(folded.counts), CHEAPEST, slots)
        return chosen.unflatten(0, (count, images)), valid.unflatten(0, (count, images))

    def _fold(self, stages: Stages, context: StepContext) -> Stages:
        """[S, B, T*K] -> [S*T, B, K]: to the criterion, a group's stage is one more stage."""
        count = len(context.teacher_outputs[self.teacher].stages.logits)

        def fold(tensor: Tensor) -> Tensor:
            return tensor.unflatten(2, (count, -1)).transpose(1, 2).flatten(0, 1)

        valid = None if stages.valid is None else fold(stages.valid.expand(len(stages.logits), -1, -1))
        masks = stages.masks and replace(stages.masks, queries=fold(stages.masks.queries))
        return Stages(fold(stages.logits), fold(stages.boxes), valid, masks)

    def _teacher_slots(self, context: StepContext) -> MatchedQueries:
        """The teacher's match of each group's stage by slots instead of queries, [T, G]; -1 also where the query is in no slot."""
        teacher_output, (chosen, valid) = context.teacher_outputs[self.teacher], self._chosen(context)
        slot = torch.full(teacher_output.stages.logits.shape[:3], -1, device=chosen.device)
        numbers = torch.arange(chosen.shape[2], device=chosen.device).expand_as(chosen)
        return teacher_output.matched_queries.renumbered(slot.scatter(2, chosen, torch.where(valid, numbers, -1)))
