"""Feature distillation as in DETRDistill's released code, which differs from the paper's Eq. 8 (D-44).

It compares the maps before the encoder, padding included, with one mask an image and level.

Legend: T stages of the teacher, B images, M its queries, K pairs of a query and a class, L tokens of a level, d channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from steadydetr.equations.distill import released_mask
from steadydetr.kinds import register
from steadydetr.lazy import torch
from steadydetr.learning.context import StepContext
from steadydetr.objectives.base import Matched, Objective, Predicted
from steadydetr.objectives.feature_distillation import best_iou
from steadydetr.objectives.feature_levels import Level, check_levels, shared_levels
from steadydetr.structures import DecodedStages, Losses, Targets, take_rows, without_autocast

if TYPE_CHECKING:
    from torch import Tensor

    from steadydetr.detectors.base import Detector

MOST_PAIRS = 100  # pairs of a query and a class that are used, the best by score


@register("released-features")
@dataclass(frozen=True)
class ReleasedFeatures(Objective):
    """Instead of `FeatureDistillation`: student and teacher need the same width, because there is no layer that adapts channels."""

    teacher: str = "teacher"
    weight: float = 1.0

    @property
    def name(self) -> str:
        return "features"

    def check(self, student: Detector, teachers: Mapping[str, Detector]) -> None:
        check_levels(self.name, self.teacher, student, teachers)
        if student.width != teachers[self.teacher].width:
            raise ValueError(
                f"objective {self.name} as released compares channels as they are, but the student has {student.width},"
                f" the teacher {teachers[self.teacher].width}"
            )

    def add_losses(self, losses: Losses, context: StepContext, stages: Predicted, matched: Matched) -> None:
        levels = shared_levels(context, self.name, self.teacher, "inputs", losses, with_padding=True)
        with without_autocast(context.memory.tokens):
            stages_of_teacher = context.teacher_outputs[self.teacher].stages.in_float32()
            values = released_terms(levels, *released_queries(stages_of_teacher, context.targets, MOST_PAIRS))
        losses.add(f"{self.name}/error", values / context.batch.global_totals.images, self.weight)


def released_queries(stages: DecodedStages, targets: Targets, top: int) -> tuple[Tensor, Tensor]:
    """The `top` pairs of a query and a class with the best scores: their queries [T, B, K, d] and qualities [T, B, K].

    The quality is the score times the best IoU with an object of the image, or the score alone where the image has no objects.
    """
    _, _, count, classes = stages.logits.shape
    score, pair = stages.logits.sigmoid().flatten(2).topk(min(top, count * classes), -1)
    query = pair // classes
    empty = torch.tensor([objects == 0 for objects in targets.counts], device=score.device)
    quality = torch.where(empty[:, None], score, score * best_iou(stages, targets).gather(-1, query))
    return take_rows(stages.content, query), quality


def released_terms(levels: list[Level], queries: Tensor, quality: Tensor) -> Tensor:
    """[T] the mean of (mask (F_T - F_S))^2 over channels and all tokens, padding included, summed over images and levels."""
    errors = [(level.teacher - level.student).square().mean(-1) for level in levels]
    total = []
    for stage in zip(queries, quality, strict=True):
        masks = [released_mask(level.teacher, *stage) for level in levels]
        total.append(torch.stack([(mask.square() * error).mean(1).sum() for mask, error in zip(masks, errors, strict=True)]).sum())
    return torch.stack(total)
