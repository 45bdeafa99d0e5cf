"""Matching distillation (OD-DETR 3.2): a query also learns the target that the teacher matches to the query's counterpart."""

from __future__ import annotations

from dataclasses import dataclass, replace
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

        Where a target has several queries of the student's own, each learns its share; those of the teacher's match learn all (D-213).

        Args:
            matched: of the student, with shares.
            teacher: the student's queries that are the counterparts of those in the teacher's match of the same stages.
            stages: the student's predictions; `targets` are those of one batch.
        """
        folded, match = targets.repeat_batch(len(stages.logits)), matched.match
        image, teacher_query = folded.image, teacher.query.flatten()
        added = join_matches(match, teacher_query, image, len(folded.counts), matched.cost)
        taken = torch.full_like(added.classes, self.classes != "none")
        if self.classes == "conditional":
            boxes = stages.flat[1].detach()[image, teacher_query.clamp(min=0)]
            taken = paired_iou(boxes, folded.boxes.to(boxes.dtype)) > CONDITION

        def join(chosen: Tensor, taken: Tensor, weight: float) -> tuple[Match, Match]:
            """The student's pairs, and the teacher's for the chosen targets; `taken` are those for which its match counts, [R] bool."""
            own = whole_share(match, added.both & taken[match.target])
            pairs = teacher.pairs(chosen)
            return weigh(own, added.own_costlier & chosen[match.target], weight), weigh(pairs, added.costlier[pairs.target], weight)

        classes = join(added.classes & taken, taken, self.class_weight)
        taken = torch.full_like(taken, self.boxes)
        return Assignment(classes, Match.cat(join(added.boxes & taken, taken, self.box_weight)))


@register("matching-distillation")
@dataclass(frozen=True, kw_only=True)
class MatchingDistillation(JoinedMatches):
    """Which teacher's match is joined with the student's. Defaults: OD-DETR's."""

    teacher: str = "ema"
    counterparts: Counterparts = "token"  # how two-stage queries of student and teacher belong together


def weigh(match: Match, costlier: Tensor, weight: float) -> Match:
    """The match with `weight` for the pairs ([P] bool) that are the costliest of their target, and 1 for the others."""
    return match if weight == 1 else replace(match, weight=torch.where(costlier, weight, 1.0))


def whole_share(match: Match, whole: Tensor) -> Match:
    """The match, of which these pairs ([P] bool) learn all of their targets."""
    return match if match.share is None else replace(match, share=torch.where(whole, 1.0, match.share))


def teacher_queries(teacher_output: TeacherOutput, student: Queries, by: Counterparts) -> MatchedQueries:
    """The student's query whose counterpart the teacher matches to each target."""
    return teacher_output.matched_queries.renumbered(teacher_output.counterparts(student, by))
