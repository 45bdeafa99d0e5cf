"""Target-aware feature distillation (DETRDistill 4.2, Eq. 5-8): the teacher's queries say where the student should be like the teacher.

Legend: S stages, B images, M queries of the teacher, L tokens of a level, d channels of the teacher.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steadydetr.boxes import iou_giou, to_xyxy
from steadydetr.detectors.base import Detector
from steadydetr.equations.distill import over_tokens, quality_score, released_mask, token_error, weighted_squares
from steadydetr.kinds import register
from steadydetr.learning.context import StepContext
from steadydetr.learning.criterion import Criterion
from steadydetr.learning.matching import paired_iou
from steadydetr.learning.teachers import TeacherOutput
from steadydetr.objectives.base import Objective
from steadydetr.objectives.feature_levels import Level, Source, check_levels, shared_levels
from steadydetr.structures import Losses, Match, MatchResult, Stages, Targets

RELEASED_TOP = 100  # pairs of a query and a class that the released code takes, by score


@register("feature-distillation")
@dataclass(frozen=True)
class FeatureDistillation(Objective):
    """Defaults: the paper's. `mask` mean is its Eq. 6 (Table 2), ones is FitNet (Tables 1 and 3)."""

    teacher: str = "teacher"
    weight: float | None = None  # lambda_2; None: 20, as released 1
    mask: Literal["target-aware", "mean", "ones"] = "target-aware"
    similarity: Literal["dot", "cosine"] = "dot"  # of a token with a query
    source: Source = "encoder"
    queries: Literal["last", "initial", "every"] = "last"  # the output of the last decoder stage, what enters the first, every output
    quality: Literal["matched", "best"] = "matched"  # IoU with the matched target, 0 without one; or with the best of the image
    gamma: float = 0.5  # of the score, against the IoU
    as_released: bool = False  # the loss of the released code, which has none of the choices above  # D-44

    def __post_init__(self) -> None:
        if self.as_released and replace(self, as_released=False) != FeatureDistillation(self.teacher, self.weight):
            raise ValueError("as_released fixes mask, similarity, source, queries, quality and gamma: leave them as they are")

    @property
    def name(self) -> str:
        return "features"

    def check(self, student: Detector, teachers: Mapping[str, Detector]) -> None:
        check_levels(self.name, self.teacher, student, teachers)
        if self.as_released and student.width != teachers[self.teacher].width:
            raise ValueError(
                f"objective {self.name} as released compares channels as they are, but the student has {student.width},"
                f" the teacher {teachers[self.teacher].width}"
            )

    def prepare(self, student: Detector, teachers: Mapping[str, Detector]) -> nn.Module | None:
        """phi, a linear layer for all levels; where the widths are equal it starts as the identity."""  # D-45
        if self.as_released:
            return None
        phi = nn.Linear(student.width, teachers[self.teacher].width)
        if phi.in_features == phi.out_features:
            nn.init.eye_(phi.weight)
            nn.init.zeros_(phi.bias)
        return phi

    def add_losses(
        self, losses: Losses, context: StepContext, stages: Mapping[str, Stages], solved: Mapping[str, MatchResult], criterion: Criterion
    ) -> None:
        source: Source = "inputs" if self.as_released else self.source
        levels = shared_levels(context, self.name, self.teacher, source, losses, with_padding=self.as_released)
        teacher_output = context.teacher_outputs[self.teacher]
        with torch.autocast(context.memory.tokens.device.type, enabled=False):
            if self.as_released:
                queries, quality = released_queries(teacher_output.stages.in_float32(), context.targets, RELEASED_TOP)
                values = released_terms(levels, queries, quality)
            else:
                values = self._terms(levels, teacher_output, context)
        weight = (1.0 if self.as_released else 20.0) if self.weight is None else self.weight
        losses.add(f"{self.name}/error", values / context.batch.global_totals.images, weight)

    def _terms(self, levels: list[Level], teacher_output: TeacherOutput, context: StepContext) -> Tensor:
        """[S] summed over images, mean over levels; of S query sets each counts 1 / S (Eq. 5, 6, 8)."""
        queries, quality = self._weighed(teacher_output, context.targets)
        phi, values = context.adapters[self.name], []
        for level in levels:
            error = token_error(phi(level.student), level.teacher, level.padding)
            masks = torch.stack([self._mask(level.teacher, *weighed) for weighed in zip(queries, quality, strict=True)])
            values.append(over_tokens(masks * error, level.padding).sum(1))
        return torch.stack(values).mean(0) / len(queries)

    def _mask(self, features: Tensor, queries: Tensor, quality: Tensor) -> Tensor:
        """[B, L] what the squared difference of a token counts."""
        if self.mask == "ones":
            return features.new_ones(features.shape[:2])
        if self.similarity == "cosine":
            features, queries = F.normalize(features, dim=-1), F.normalize(queries, dim=-1)
        if self.mask == "mean":
            return (features @ queries.mean(1)[..., None])[..., 0].square()
        return weighted_squares(features, queries, quality)

    def _weighed(self, teacher_output: TeacherOutput, targets: Targets) -> tuple[Tensor, Tensor]:
        """The teacher's queries [S, B, M, d] and q / M [S, B, M]; S is 1 or all stages. Only queries that count are kept."""
        stages = teacher_output.stages.in_float32()
        assert stages.content is not None
        if self.quality == "matched":
            quality = matched_quality(stages, teacher_output.solved.match, targets, self.gamma)
        else:
            quality = quality_score(stages.logits.sigmoid().amax(-1), best_iou(stages, targets), self.gamma)
        queries = stages.content
        if self.queries != "every":
            queries = queries[-1:] if self.queries == "last" else teacher_output.queries.content[None].to(quality.dtype)
            quality = quality[-1:]
        count = quality.shape[-1]
        if self.mask == "target-aware" and self.quality == "matched":
            quality, kept = quality.topk(min(max(targets.counts), count), -1)
            queries = queries.gather(2, kept[..., None].expand(-1, -1, -1, queries.shape[-1]))
        return queries, quality / count


def matched_quality(stages: Stages, match: Match, targets: Targets, gamma: float) -> Tensor:
    """[S, B, M] the quality of each matched query, 0 of all others (Eq. 7)."""
    logits, boxes = stages.flat
    folded = targets.repeat_batch(len(stages.logits))
    score = logits[match.image, match.query, folded.labels[match.target]].sigmoid()
    iou = paired_iou(boxes[match.image, match.query], folded.boxes[match.target].to(boxes.dtype))
    quality = logits.new_zeros(logits.shape[:2]).index_put((match.image, match.query), quality_score(score, iou, gamma))
    return quality.unflatten(0, stages.logits.shape[:2])


def best_iou(stages: Stages, targets: Targets) -> Tensor:
    """[S, B, M] the largest IoU of each query's box with a target of its image, 0 where there is none."""
    boxes = stages.flat[1]
    folded = targets.repeat_batch(len(stages.logits))
    iou, _ = iou_giou(to_xyxy(boxes)[folded.image], to_xyxy(folded.boxes.to(boxes.dtype))[:, None])
    best = boxes.new_zeros(boxes.shape[:2]).scatter_reduce(0, folded.image[:, None].expand_as(iou), iou, "amax")
    return best.unflatten(0, stages.logits.shape[:2])


def released_queries(stages: Stages, targets: Targets, top: int) -> tuple[Tensor, Tensor]:
    """The decoder outputs [S, B, top, d] of the pairs of a query and a class with the best scores, and score x best IoU of each.

    The score alone in images without objects.
    """
    assert stages.content is not None
    _, _, count, classes = stages.logits.shape
    score, pair = stages.logits.sigmoid().flatten(2).topk(min(top, count * classes), -1)
    query = pair // classes
    empty = torch.tensor([objects == 0 for objects in targets.counts], device=score.device)
    quality = torch.where(empty[:, None], score, score * best_iou(stages, targets).gather(-1, query))
    return stages.content.gather(2, query[..., None].expand(-1, -1, -1, stages.content.shape[-1])), quality


def released_terms(levels: list[Level], queries: Tensor, quality: Tensor) -> Tensor:
    """[S] the mean of (mask (F_T - F_S))^2 over channels and all tokens, padding included, summed over images and levels."""
    errors = [(level.teacher - level.student).square().mean(-1) for level in levels]
    total = []
    for weighed in zip(queries, quality, strict=True):
        masks = [released_mask(level.teacher, *weighed) for level in levels]
        total.append(torch.stack([(mask.square() * error).mean(1).sum() for mask, error in zip(masks, errors, strict=True)]).sum())
    return torch.stack(total)
