"""Matching distillation (OD-DETR 3.2): a query also learns what its twin in the teacher is matched to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from steadydetr.equations.online import join_matches
from steadydetr.matching import paired_iou, query_of_targets
from steadydetr.scene import Scene
from steadydetr.structures import Assignment, Match, Solved, Stages, Targets
from steadydetr.teachers import Lesson, Twins

CONDITION = 0.5  # IoU from which StageInteractor accepts a further target


@dataclass(frozen=True, kw_only=True)
class JoinedMatches:
    """What a query learns of its own match and of the teacher's. Table 3 varies `classes`, Table 4 `boxes` and the weights."""

    classes: Literal["union", "conditional", "none"] = "union"  # conditional: only where the query's box overlaps the target by half
    boxes: bool = True
    class_weight: float = 1.0  # of the dearer of two queries that learn one target: in the class loss
    box_weight: float = 0.51  # and in the box losses, w_d of Eq. 4

    def __post_init__(self) -> None:
        for name in ("class_weight", "box_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)} must not be negative")

    def assign(self, solved: Solved, taught: Tensor, stages: Stages, targets: Targets) -> Assignment:
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
        dearer = (joined.dearer, joined.taught & (own >= 0) & ~joined.dearer)  # of two queries the taught one, the own one
        match = solved.match
        classes = (
            weigh(match, extra & dearer[1], self.class_weight),
            weigh(pick(image, taught, extra), dearer[0], self.class_weight),
        )
        learned = joined.taught_box & self.boxes
        boxes_own = weigh(match, learned & dearer[1], self.box_weight)
        return Assignment(classes, concatenate(boxes_own, weigh(pick(image, taught, learned), dearer[0], self.box_weight)))


@dataclass(frozen=True, kw_only=True)
class MatchingDistillation(JoinedMatches):
    """Defaults: OD-DETR's."""

    teacher: str = "ema"
    twins: Twins = "token"


def pick(image: Tensor, query: Tensor, chosen: Tensor) -> Match:
    """The pairs of the chosen targets, [R] each -> P pairs."""
    target = chosen.nonzero()[:, 0]
    return Match(image[target], query[target], target)


def weigh(match: Match, dearer: Tensor, weight: float) -> Match:
    """The match with `weight` at the targets [R] where its query is the dearer of two, 1 elsewhere."""
    if weight == 1:
        return match
    return Match(match.image, match.query, match.target, torch.where(dearer[match.target], weight, 1.0))


def concatenate(a: Match, b: Match) -> Match:
    weights = [torch.ones_like(m.query, dtype=torch.float32) if m.weight is None else m.weight for m in (a, b)]
    image, query, target = (torch.cat((getattr(a, name), getattr(b, name))) for name in ("image", "query", "target"))
    return Match(image, query, target, torch.cat(weights))


def taught_queries(lesson: Lesson, scene: Scene, by: Twins) -> Tensor:
    """[R] the student's query whose twin the teacher matches to each target, stage by stage, -1: none."""
    rows = len(lesson.solved.cost)
    query = query_of_targets(lesson.solved.match, rows)
    image = scene.targets.repeat_batch(len(lesson.stages.logits)).image % len(scene.targets.counts)
    twin = lesson.twins(scene.queries["main"], by)[image, query.clamp(min=0)]
    return torch.where(query >= 0, twin, -1)
