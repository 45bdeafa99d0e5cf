"""Matching distillation (OD-DETR 3.2): a query also learns the target that the teacher matches to the query's counterpart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from steadydetr.equations.online import join_matches
from steadydetr.kinds import register
from steadydetr.lazy import torch
from steadydetr.learning.matching import paired_iou
from steadydetr.learning.predictions import Counterparts, TeacherOutput
from steadydetr.structures import Assignment, Match, MatchedQueries, MatchResult, Queries, Stages, Targets

if TYPE_CHECKING:
    from torch import Tensor

CONDITION = 0.5  # a further target is learned where the IoU is above it (StageInteractor)


@register("joined-matches")
@dataclass(frozen=True, kw_only=True)
class JoinedMatches:
    """How the student's own match and the teacher's are joined. Table 3 varies `classes`, Table 4 `boxes` and the weights.

    Where both matches give a target to different queries, both learn it, and the one with the larger matching cost has another weight.
    """

    classes: Literal["union", "conditional", "none"] = "union"  # pairs of the teacher's whose class is learned; conditional: IoU above 0.5
    boxes: bool = True  # the boxes of the teacher's pairs are learned by queries that are matched to nothing else
    class_weight: float = 1.0  # of the costlier of two queries that learn one target, in the class loss
    box_weight: float = 0.51  # the same in the box losses, w_d of Eq. 4

    def __post_init__(self) -> None:
        for name in ("class_weight", "box_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)} must not be negative")

    def assign(self, matched: MatchResult, teacher: MatchedQueries, stages: Stages, targets: Targets) -> Assignment:
        """The student's own match joined with the teacher's.

        Args:
            matched: of the student.
            teacher: the student's queries that are the counterparts of those in the teacher's match of the same stages.
            stages: the student's predictions; `targets` are those of one batch.
        """
        folded, match = targets.repeat_batch(len(stages.logits)), matched.match
        image, teacher_query = folded.image, teacher.query.flatten()
        own = MatchedQueries.of(match, targets, len(stages.logits)).query.flatten()
        added = join_matches(own, teacher_query, image, len(folded.counts), matched.cost)
        chosen = added.classes & (self.classes != "none")
        if self.classes == "conditional":
            boxes = stages.flat[1].detach()[image, teacher_query.clamp(min=0)]
            chosen = chosen & (paired_iou(boxes, folded.boxes.to(boxes.dtype)) > CONDITION)
        own_is_costlier = added.classes & (own >= 0) & ~added.costlier
        classes = (
            weigh(match, chosen & own_is_costlier, self.class_weight),
            weigh(teacher.pairs(chosen), added.costlier, self.class_weight),
        )
        chosen = added.boxes & self.boxes
        own_boxes = weigh(match, chosen & own_is_costlier, self.box_weight)
        return Assignment(classes, Match.cat((own_boxes, weigh(teacher.pairs(chosen), added.costlier, self.box_weight))))


@register("matching-distillation")
@dataclass(frozen=True, kw_only=True)
class MatchingDistillation(JoinedMatches):
    """Which teacher's match is joined with the student's. Defaults: OD-DETR's."""

    teacher: str = "ema"
    counterparts: Counterparts = "token"  # how two-stage queries of student and teacher belong together


def weigh(match: Match, costlier: Tensor, weight: float) -> Match:
    """The match with `weight` for the targets ([R] bool) whose query is the costlier of two, and 1 for the others."""
    if weight == 1:
        return match
    return Match(match.image, match.query, match.target, torch.where(costlier[match.target], weight, 1.0))


def teacher_queries(teacher_output: TeacherOutput, student: Queries, by: Counterparts) -> MatchedQueries:
    """The student's query whose counterpart the teacher matches to each target."""
    return teacher_output.matched_queries.renumbered(teacher_output.counterparts(student, by))
