"""Prediction distillation (OD-DETR 3.3): the teacher's queries go through the student's decoder and must come out as the teacher's.

Legend: S stages, B images, N queries, C classes, P pairs of a query with the target that the teacher matched to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from steadydetr.detectors.base import Detector
from steadydetr.equations.detection import box_terms, classification_loss
from steadydetr.equations.online import distillation_terms, task_weight
from steadydetr.learning.context import StepContext
from steadydetr.learning.criterion import Criterion
from steadydetr.learning.matching import paired_iou
from steadydetr.objectives.assignment_distillation import makes_references
from steadydetr.objectives.base import Objective, require_alike
from steadydetr.structures import Losses, Match, MatchResult, QueryGroup, Stages, Targets


@dataclass(frozen=True)
class PredictionDistillation(Objective):
    """Defaults: OD-DETR's. Its Table 5: `naive`, then without `listen`; Stop Update is the teacher's."""

    teacher: str = "ema"
    naive: bool = False  # every query learns the teacher's scores and box as they are; divided by the queries
    listen: bool = True  # learn a box only where the teacher's is better (Listen2stu)
    position: Literal["teacher", "student"] = "teacher"  # whose position vectors the queries take, where they have their own  # D-35

    @property
    def name(self) -> str:
        return "prediction"

    def check(self, student: Detector, teachers: Mapping[str, Detector]) -> None:
        require_alike(self.name, self.teacher, student, teachers, ("stages", "width", "positioned"))
        if self.position == "student" and student.positioned and not makes_references(student):
            raise ValueError(
                "objective prediction: position student needs learned queries, which are those of the teacher by number; of a two-stage"
                " detector the position vectors belong to other boxes. Leave --objectives.prediction.position teacher"
            )

    def query_groups(self, context: StepContext) -> list[QueryGroup]:
        queries = context.teacher_outputs[self.teacher].queries
        if self.position == "student" and queries.position is not None:
            queries = replace(queries, position=context.queries["main"].position)
        return [QueryGroup(self.name, queries)]

    def add_losses(
        self, losses: Losses, context: StepContext, stages: Mapping[str, Stages], solved: Mapping[str, MatchResult], criterion: Criterion
    ) -> None:
        teacher_output, weights = context.teacher_outputs[self.teacher], criterion.loss_weights
        with torch.autocast(context.memory.tokens.device.type, enabled=False):
            student, teacher = stages[self.name].in_float32(), teacher_output.stages.in_float32()
            if self.naive:
                values = naive_terms(student, teacher, context.batch.global_totals.images * student.logits.shape[2], criterion)
            else:
                values = self._terms(student, teacher, teacher_output.solved.match, context, criterion)
        for part, value in zip(("class", "l1", "giou"), values, strict=True):
            losses.add(f"{self.name}/{part}", value, getattr(weights, "label" if part == "class" else part))

    def _terms(
        self, student: Stages, teacher: Stages, match: Match, context: StepContext, criterion: Criterion
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[S] each (Eq. 5, 6)."""
        targets = context.targets.repeat_batch(len(student.logits))
        wanted, weight, iou = teacher_target(teacher, match, targets)
        label = classification_loss(student.flat[0], wanted, wanted > 0, None, criterion.gamma)
        ours, theirs = (part.flat[1][match.image, match.query] for part in (student, teacher))
        l1, giou, _ = box_terms(ours, theirs, criterion.giou_eps)
        own_iou = paired_iou(ours.detach(), targets.boxes[match.target].to(ours.dtype))
        l1, giou = distillation_terms(own_iou, iou, weight, l1, giou, self.listen)
        stage = match.image // len(context.targets.counts)
        zeros = l1.new_zeros(len(student.logits))
        per_stage = label.unflatten(0, student.logits.shape[:2]).sum((1, 2, 3))
        return tuple(  # type: ignore[return-value]
            value / context.normaliser for value in (per_stage, zeros.index_add(0, stage, l1), zeros.index_add(0, stage, giou))
        )


def teacher_target(teacher: Stages, match: Match, folded: Targets) -> tuple[Tensor, Tensor, Tensor]:
    """c' with the TOOD weight at the matched entries [S*B, N, C]; that weight [P]; the teacher's IoU with its target [P] (Eq. 5)."""
    logits, boxes = teacher.flat
    scores = logits.sigmoid()
    at = (match.image, match.query, folded.labels[match.target])
    iou = paired_iou(boxes[match.image, match.query], folded.boxes[match.target].to(boxes.dtype))
    weight = task_weight(scores[at], iou)
    return scores.index_put(at, weight), weight, iou


def naive_terms(student: Stages, teacher: Stages, queries: int, criterion: Criterion) -> tuple[Tensor, Tensor, Tensor]:
    """[S] each: every query of the step alike, divided by their number (Table 5, naive distillation)."""
    wanted = teacher.logits.sigmoid()
    label = classification_loss(student.logits, wanted, wanted > 0, None, criterion.gamma).sum((1, 2, 3))
    l1, giou, _ = box_terms(student.boxes, teacher.boxes, criterion.giou_eps)
    return label / queries, l1.sum((1, 2)) / queries, giou.sum((1, 2)) / queries
