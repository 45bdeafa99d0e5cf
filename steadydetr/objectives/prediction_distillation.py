"""Prediction distillation (OD-DETR 3.3): the teacher's queries go through the student's decoder and must come out as the teacher's.

Both have as many stages and queries, so S = T and N = M here.

Legend: S stages, B images, F folded images, N queries, C classes, P pairs of a query with the target that the teacher matched to it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from steadydetr.equations.detection import classification_loss
from steadydetr.equations.online import distillation_terms, task_weight
from steadydetr.kinds import register
from steadydetr.learning.context import StepContext
from steadydetr.learning.criterion import Criterion
from steadydetr.learning.matching import paired_iou
from steadydetr.objectives.base import Matched, Objective, Predicted, require_alike
from steadydetr.structures import Losses, Match, QueryGroup, Stages, Targets, without_autocast

if TYPE_CHECKING:
    from torch import Tensor

    from steadydetr.detectors.base import Detector

Position = Literal["teacher", "student"]


class PredictionObjective(Objective):
    """What both forms share: the teacher's queries as a group of the student, and losses named after the criterion's terms."""

    teacher: str
    position: Position

    @property
    def name(self) -> str:
        return "prediction"

    def check(self, student: Detector, teachers: Mapping[str, Detector]) -> None:
        require_alike(self.name, self.teacher, student, teachers, ("stages", "width", "positioned"))
        if self.position == "student" and student.positioned and not student.makes_references:
            raise ValueError(
                "objective prediction: position student needs learned queries, which are those of the teacher by number; of a two-stage"
                " detector the position vectors belong to other boxes. Leave --objectives.prediction.position teacher"
            )

    def query_groups(self, context: StepContext) -> list[QueryGroup]:
        queries = context.teacher_outputs[self.teacher].queries
        if self.position == "student" and queries.position is not None:
            queries = replace(queries, position=context.queries["main"].position)
        return [QueryGroup(self.name, queries)]

    def add_losses(self, losses: Losses, context: StepContext, stages: Predicted, matched: Matched) -> None:
        teacher_output, weights = context.teacher_outputs[self.teacher], context.criterion.loss_weights
        with without_autocast(context.memory.tokens):
            student, teacher = stages[self.name].in_float32(), teacher_output.stages.in_float32()
            label, l1, giou = self.terms(student, teacher, teacher_output.matched.match, context)
        losses.add(f"{self.name}/class", label, weights.label)
        losses.add(f"{self.name}/l1", l1, weights.l1)
        losses.add(f"{self.name}/giou", giou, weights.giou)

    @abstractmethod
    def terms(self, student: Stages, teacher: Stages, match: Match, context: StepContext) -> tuple[Tensor, Tensor, Tensor]:
        """The class, L1 and GIoU terms, [S] each; `match` is the teacher's."""


@register("prediction-distillation")
@dataclass(frozen=True)
class PredictionDistillation(PredictionObjective):
    """Defaults: OD-DETR's. Its Table 5 begins with `NaivePrediction`, then has `listen` off; Stop Update is an option of the teacher."""

    teacher: str = "ema"
    listen: bool = True  # learn a box only where the teacher's is better (Listen2stu)
    position: Position = "teacher"  # whose position vectors the queries have, where they bring some  # D-35

    def terms(self, student: Stages, teacher: Stages, match: Match, context: StepContext) -> tuple[Tensor, Tensor, Tensor]:
        """Eq. 5 and 6."""
        criterion, targets = context.criterion, context.targets.repeat_batch(len(student.logits))
        wanted, weight, iou = teacher_target(teacher, match, targets)
        label = classification_loss(student.flat[0], wanted, wanted > 0, None, criterion.gamma)
        ours, theirs = (part.flat[1][match.image, match.query] for part in (student, teacher))
        l1, giou = criterion.box_terms(ours, theirs)
        own_iou = paired_iou(ours.detach(), targets.boxes[match.target].to(ours.dtype))
        l1, giou = distillation_terms(own_iou, iou, weight, l1, giou, self.listen)
        stage = match.image // len(context.targets.counts)
        zeros, normaliser = l1.new_zeros(len(student.logits)), context.normaliser
        per_stage = label.unflatten(0, student.logits.shape[:2]).sum((1, 2, 3))
        return per_stage / normaliser, zeros.index_add(0, stage, l1) / normaliser, zeros.index_add(0, stage, giou) / normaliser


@register("naive-prediction")
@dataclass(frozen=True)
class NaivePrediction(PredictionObjective):
    """Every query learns the teacher's scores and box as they are (OD-DETR Table 5)."""

    teacher: str = "ema"
    position: Position = "teacher"  # whose position vectors the queries have, where they bring some  # D-35
    divisor: Literal["queries", "objects"] = "queries"  # of the sums; by the objects of the step the other rows of Table 5 divide  # D-34

    def terms(self, student: Stages, teacher: Stages, match: Match, context: StepContext) -> tuple[Tensor, Tensor, Tensor]:
        queries = float(context.batch.global_totals.images * student.logits.shape[2])
        return naive_terms(student, teacher, queries if self.divisor == "queries" else context.normaliser, context.criterion)


def teacher_target(teacher: Stages, match: Match, folded: Targets) -> tuple[Tensor, Tensor, Tensor]:
    """The c' of Eq. 5: the teacher's scores [F, N, C], in which a matched entry is replaced by its task weight.

    Returns:
        c', the task weights [P], and the IoU of the teacher's boxes with their targets [P].
    """
    logits, boxes = teacher.flat
    scores = logits.sigmoid()
    at = (match.image, match.query, folded.labels[match.target])
    iou = paired_iou(boxes[match.image, match.query], folded.boxes[match.target].to(boxes.dtype))
    weight = task_weight(scores[at], iou)
    return scores.index_put(at, weight), weight, iou


def naive_terms(student: Stages, teacher: Stages, normaliser: float, criterion: Criterion) -> tuple[Tensor, Tensor, Tensor]:
    """The sums over all queries, divided by `normaliser`, [S] each (Table 5, naive distillation)."""
    wanted = teacher.logits.sigmoid()
    label = classification_loss(student.logits, wanted, wanted > 0, None, criterion.gamma).sum((1, 2, 3))
    l1, giou = criterion.box_terms(student.boxes, teacher.boxes)
    return label / normaliser, l1.sum((1, 2)) / normaliser, giou.sum((1, 2)) / normaliser
