"""Target-aware feature distillation (DETRDistill 4.2, Eq. 5-8): the student's features learn the teacher's, weighted by query masks.

Legend: T stages of the teacher or the one of them that is used, B images, M queries of the teacher, L tokens of a level, d channels of
the teacher.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from steadydetr.boxes import iou_giou, to_xyxy
from steadydetr.equations.distill import over_tokens, quality_score, token_error, weighted_squares
from steadydetr.kinds import register
from steadydetr.lazy import F, nn, torch
from steadydetr.learning.context import StepContext
from steadydetr.learning.matching import paired_iou
from steadydetr.learning.predictions import TeacherOutput
from steadydetr.objectives.base import Matched, Objective, Predicted
from steadydetr.objectives.feature_levels import FeatureSource, Level, check_levels, shared_levels
from steadydetr.structures import Losses, Match, Stages, Targets, take_rows, without_autocast

if TYPE_CHECKING:
    from torch import Tensor

    from steadydetr.detectors.base import Detector


@register("feature-distillation")
@dataclass(frozen=True)
class FeatureDistillation(Objective):
    """Defaults: the paper's. `mask` mean is its Eq. 6 (Table 2), ones is FitNet (Tables 1 and 3). Released code: `ReleasedFeatures`."""

    teacher: str = "teacher"
    weight: float = 20.0  # lambda_2
    mask: Literal["target-aware", "mean", "ones"] = "target-aware"
    similarity: Literal["dot", "cosine"] = "dot"  # of a token with a query
    source: FeatureSource = "encoder"
    queries: Literal["last", "initial", "every"] = "last"  # the output of the last decoder stage, what enters the first, every output
    quality: Literal["matched", "best"] = "matched"  # IoU with the matched target, 0 without one; or with the best of the image
    gamma: float = 0.5  # of the score, against the IoU

    @property
    def name(self) -> str:
        return "features"

    def check(self, student: Detector, teachers: Mapping[str, Detector]) -> None:
        check_levels(self.name, self.teacher, student, teachers)

    def prepare(self, student: Detector, teachers: Mapping[str, Detector]) -> nn.Module | None:
        """phi, a linear layer for all levels; where the widths are equal it starts as the identity."""  # D-45
        phi = nn.Linear(student.width, teachers[self.teacher].width)
        if phi.in_features == phi.out_features:
            nn.init.eye_(phi.weight)
            nn.init.zeros_(phi.bias)
        return phi

    def add_losses(self, losses: Losses, context: StepContext, stages: Predicted, matched: Matched) -> None:
        levels = shared_levels(context, self.name, self.teacher, self.source, losses)
        with without_autocast(context.memory.tokens):
            values = self._terms(levels, context.teacher_outputs[self.teacher], context)
        losses.add(f"{self.name}/error", values / context.batch.global_totals.images, self.weight)

    def _terms(self, levels: list[Level], teacher_output: TeacherOutput, context: StepContext) -> Tensor:
        """[T] summed over images, mean over levels, divided by the number of stages that are used (Eq. 5, 6, 8)."""
        queries, quality = self._queries_and_quality(teacher_output, context.targets)
        phi, values = context.adapters[self.name], []
        for level in levels:
            error = token_error(phi(level.student), level.teacher, level.padding)
            masks = torch.stack([self._mask(level.teacher, *stage) for stage in zip(queries, quality, strict=True)])
            values.append(over_tokens(masks * error, level.padding).sum(1))
        return torch.stack(values).mean(0) / len(queries)

    def _mask(self, features: Tensor, queries: Tensor, quality: Tensor) -> Tensor:
        """The weight of every token's squared difference, [B, L]."""
        if self.mask == "ones":
            return features.new_ones(features.shape[:2])
        if self.similarity == "cosine":
            features, queries = F.normalize(features, dim=-1), F.normalize(queries, dim=-1)
        if self.mask == "mean":
            return (features @ queries.mean(1)[..., None])[..., 0].square()
        return weighted_squares(features, queries, quality)

    def _queries_and_quality(self, teacher_output: TeacherOutput, targets: Targets) -> tuple[Tensor, Tensor]:
        """The teacher's queries [T, B, M, d] and q / M [T, B, M], of one or all of its stages.

        Where only matched queries have a quality, the others are left out, which saves most of the masks.
        """
        stages = teacher_output.stages.in_float32()
        if self.quality == "matched":
            quality = matched_quality(stages, teacher_output.matched.match, targets, self.gamma)
        else:
            quality = quality_score(stages.logits.sigmoid().amax(-1), best_iou(stages, targets), self.gamma)
        queries = stages.content
        if self.queries != "every":
            queries = queries[-1:] if self.queries == "last" else teacher_output.queries.content[None].to(quality.dtype)
            quality = quality[-1:]
        count = quality.shape[-1]
        if self.mask == "target-aware" and self.quality == "matched":
            quality, kept = quality.topk(min(max(targets.counts), count), -1)
            queries = take_rows(queries, kept)
        return queries, quality / count


def matched_quality(stages: Stages, match: Match, targets: Targets, gamma: float) -> Tensor:
    """[T, B, M] the quality of each matched query, 0 of all others (Eq. 7)."""
    logits, boxes = stages.flat
    folded = targets.repeat_batch(len(stages.logits))
    score = logits[match.image, match.query, folded.labels[match.target]].sigmoid()
    iou = paired_iou(boxes[match.image, match.query], folded.boxes[match.target].to(boxes.dtype))
    quality = logits.new_zeros(logits.shape[:2]).index_put((match.image, match.query), quality_score(score, iou, gamma))
    return quality.unflatten(0, stages.logits.shape[:2])


def best_iou(stages: Stages, targets: Targets) -> Tensor:
    """[T, B, M] the largest IoU of each query's box with a target of its image, 0 where there is none."""
    boxes = stages.flat[1]
    folded = targets.repeat_batch(len(stages.logits))
    iou, _ = iou_giou(to_xyxy(boxes)[folded.image], to_xyxy(folded.boxes.to(boxes.dtype))[:, None])
    best = boxes.new_zeros(boxes.shape[:2]).scatter_reduce(0, folded.image[:, None].expand_as(iou), iou, "amax")
    return best.unflatten(0, stages.logits.shape[:2])
