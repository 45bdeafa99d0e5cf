"""Matching distillation (OD-DETR 3.2): a query also learns what its counterpart in the teacher is matched to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from steadydetr.equations.online import join_matches
from steadydetr.learning.context import StepContext
from steadydetr.learning.matching import paired_iou, query_of_targets
from steadydetr.learning.teachers import Counterparts, TeacherOutput
from steadydetr.structures import Assignment, Match, MatchResult, Stages, Targets

CONDITION = 0.5  # IoU from which StageInteractor accepts a further target


@dataclass(frozen=True, kw_only=True)
class JoinedMatches:
    """What a query learns of its own match and of the teacher's. Table 3 varies `classes`, Table 4 `boxes` and the weights."""

    classes: Literal["union", "conditional", "none"] = "union"  # conditional: only where the query's box overlaps the target by half
    boxes: bool = True
    class_weight: float = 1.0  # of the costlier of two queries that learn one target: in the class loss
    box_weight: float = 0.51  # and in the box losses, w_d of Eq. 4

    def __post_init__(self) -> None:
        for name in ("class_weight", "box_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)} must not be negative")

    def assign(self, solved: MatchResult, taught: Tensor, stages: Stages, targets: Targets) -> Assignment:
        """The student's own match joined with the teacher's.

        Args:
            solved: of the student, in folded indices.
            taught: [R] the student's query that the teacher's match of the same stage gives each target, -1: none.
            stages: the student's predictions, of which `targets` are those of one batch.
        """
        folded = targets.repeat_batch(len(stages.logits))
        own, image = query_of_targets(solved.match, len(taught)), folded.image
        joined = join_matches(own, taught, image, len(folded.counts), solved.cost)
        extra = joined.taught & (self.classes != "none")
        if self.classes == "conditional":
            boxes = stages.flat[1].detach()[image, taught.clamp(min=0)]
            extra = extra & (paired_iou(boxes, folded.boxes.to(boxes.dtype)) > CONDITION)
        costlier = (joined.costlier, joined.taught & (own >= 0) & ~joined.costlier)  # of two queries the taught one, the own one
        match = solved.match
        classes = (
            weigh(match, extra & costlier[1], self.class_weight),
            weigh(pick(image, taught, extra), costlier[0], self.class_weight),
        )
        learned = joined.taught_box & self.boxes
        boxes_own = weigh(match, learned & costlier[1], self.box_weight)
        return Assignment(classes, concatenate(boxes_own, weigh(pick(image, taught, learned), costlier[0], self.box_weight)))


@dataclass(frozen=True, kw_only=True)
class MatchingDistillation(JoinedMatches):
    """Defaults: OD-DETR's."""

    teacher: str = "ema"
    counterparts: Counterparts = "token"


def pick(image: Tensor, query: Tensor, chosen: Tensor) -> Match:
    """The pairs of the chosen targets, [R] each -> P pairs."""
    target = chosen.nonzero()[:, 0]
    return Match(image[target], query[target], target)


def weigh(match: Match, costlier: Tensor, weight: float) -> Match:
    """The match with `weight` at the targets [R] where its query is the costlier of two, 1 elsewhere."""
    if weight == 1:
        return match
    return Match(match.image, match.query, match.target, torch.where(costlier[match.target], weight, 1.0))


def concatenate(a: Match, b: Match) -> Match:
    weights = [torch.ones_like(m.query, dtype=torch.float32) if m.weight is None else m.weight for m in (a, b)]
    image, query, target = (torch.cat((getattr(a, name), getattr(b, name))) for name in ("image", "query", "target"))
    return Match(image, query, target, torch.cat(weights))


def teacher_queries(teacher_output: TeacherOutput, context: StepContext, by: Counterparts) -> Tensor:
    """[R] the student's query whose counterpart the teacher matches to each target, stage by stage, -1: none."""
    rows = len(teacher_output.solved.cost)
    query = query_of_targets(teacher_output.solved.match, rows)
    image = context.targets.repeat_batch(len(teacher_output.stages.logits)).image % len(context.targets.counts)
    counterpart = teacher_output.counterparts(context.queries["main"], by)[image, query.clamp(min=0)]
    return torch.where(query >= 0, counterpart, -1)
