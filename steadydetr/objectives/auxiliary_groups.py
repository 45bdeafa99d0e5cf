"""Auxiliary groups (OD-DETR 3.4): the teacher's best updated queries of each stage start anew in the student's first stage.

Legend: T teacher stages, S student stages, B images, K slots of a group, R rows of one batch at all T teacher stages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from steadydetr.detectors.base import Detector
from steadydetr.learning.context import StepContext
from steadydetr.learning.criterion import Criterion
from steadydetr.learning.matching import Problem, cheapest_queries, query_of_targets
from steadydetr.objectives.base import Objective, require_alike
from steadydetr.objectives.matching_distillation import JoinedMatches, pick
from steadydetr.structures import Assignment, Losses, MatchResult, Queries, QueryGroup, Stages

CHEAPEST = 2  # queries of each target


@dataclass(frozen=True)
class AuxiliaryGroups(Objective):
    """Defaults: OD-DETR's. Its Table 6 varies `matching`."""

    teacher: str = "ema"
    matching: Literal["both", "own", "teacher"] = "both"  # re-matching joined with the teacher's match, either alone
    distillation: JoinedMatches = JoinedMatches()  # of both
    reduction: Literal["mean", "sum"] = "mean"  # over the groups  # D-34

    @property
    def name(self) -> str:
        return "auxiliary"

    def check(self, student: Detector, teachers: Mapping[str, Detector]) -> None:
        require_alike(self.name, self.teacher, student, teachers, ("width", "positioned"))

    def query_groups(self, context: StepContext) -> list[QueryGroup]:
        """All groups side by side, as blocks that do not see each other."""
        teacher_output, (chosen, valid) = context.teacher_outputs[self.teacher], self._chosen(context)
        count, _, slots = chosen.shape

        def gather(tensor: Tensor) -> Tensor:
            """[T, B, N, D] -> [B, T*K, D]."""
            return tensor.gather(2, chosen[..., None].expand(-1, -1, -1, tensor.shape[-1])).transpose(0, 1).flatten(1, 2)

        position = teacher_output.queries.position  # D-57
        assert teacher_output.stages.content is not None
        queries = Queries(
            gather(teacher_output.stages.content),
            gather(teacher_output.stages.boxes),
            valid=valid.transpose(0, 1).flatten(1, 2),
            position=None if position is None else gather(position.expand(count, -1, -1, -1)),
        )
        blocks = torch.arange(count, device=chosen.device).repeat_interleave(slots)
        return [QueryGroup(self.name, queries, blocks=blocks)]

    def problems(self, context: StepContext, stages: Mapping[str, Stages], criterion: Criterion) -> list[Problem]:
        return [criterion.problem(self._fold(stages[self.name], context), context.targets, self.name)]

    def add_losses(
        self, losses: Losses, context: StepContext, stages: Mapping[str, Stages], solved: Mapping[str, MatchResult], criterion: Criterion
    ) -> None:
        predicted = self._fold(stages[self.name], context)
        taught, missing = self._taught(context, len(stages[self.name].logits))
        losses.measure(f"{self.name}/targets_outside", missing)
        own = solved[self.name]
        if self.matching == "both":
            assignment = self.distillation.assign(own, taught, predicted, context.targets)
        elif self.matching == "own":
            assignment = Assignment((own.match,), own.match)
        else:
            folded = context.targets.repeat_batch(len(predicted.logits))
            match = pick(folded.image, taught, taught >= 0)
            assignment = Assignment((match,), match)
        groups = len(context.teacher_outputs[self.teacher].stages.logits) if self.reduction == "mean" else 1
        criterion.add_losses(losses, self.name, predicted, assignment, context.targets, context.normaliser * groups)

    def _chosen(self, context: StepContext) -> tuple[Tensor, Tensor]:
        """The teacher's queries of every group and which slots hold one, [T, B, K] each; one empty slot where there is no object (D-29)."""
        teacher_output = context.teacher_outputs[self.teacher]
        count, images, queries, _ = teacher_output.stages.logits.shape
        folded = context.targets.repeat_batch(count)
        slots = max(min(CHEAPEST * context.batch.global_totals.most_objects, queries), 1)
        chosen, valid = cheapest_queries(teacher_output.solved.cost, folded.image, len(folded.counts), CHEAPEST, slots)
        return chosen.unflatten(0, (count, images)), valid.unflatten(0, (count, images))

    def _fold(self, stages: Stages, context: StepContext) -> Stages:
        """[S, B, T*K] -> [S*T, B, K]: to the criterion, a group at a stage is one more stage. Only `logits`, `boxes` and `valid`."""
        count = len(context.teacher_outputs[self.teacher].stages.logits)

        def fold(tensor: Tensor) -> Tensor:
            return tensor.unflatten(2, (count, -1)).transpose(1, 2).flatten(0, 1)

        assert stages.valid is not None
        valid = fold(stages.valid.expand(len(stages.logits), -1, -1))
        return Stages(fold(stages.logits), fold(stages.boxes), valid=valid)

    def _taught(self, context: StepContext, student_stages: int) -> tuple[Tensor, Tensor]:
        """The slot that the teacher's match of a group's stage gives each target, -1: its query is outside, [S*R]; that share."""
        teacher_output, (chosen, valid) = context.teacher_outputs[self.teacher], self._chosen(context)
        rows, (count, images, queries, _) = len(teacher_output.solved.cost), teacher_output.stages.logits.shape
        slot = torch.full((count * images, queries), -1, device=chosen.device)
        place = torch.arange(chosen.shape[2], device=chosen.device).expand(count * images, -1)
        slot.scatter_(1, chosen.flatten(0, 1), torch.where(valid.flatten(0, 1), place, -1))
        query = query_of_targets(teacher_output.solved.match, rows)
        image = context.targets.repeat_batch(count).image
        found = torch.where(query >= 0, slot[image, query.clamp(min=0)], -1)
        return found.repeat(student_stages), (found < 0).sum() / max(rows, 1)
