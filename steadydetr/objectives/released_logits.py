"""Logits distillation as in DETRDistill's released code (D-36): all predictions of the teacher are positive, boxes are clipped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from steadydetr.boxes import to_cxcywh, to_xyxy
from steadydetr.kinds import register
from steadydetr.lazy import torch
from steadydetr.learning.context import StepContext
from steadydetr.learning.criterion import Weights
from steadydetr.objectives.logits_distillation import LogitsObjective, Slots, StageChoice, StagePairs

if TYPE_CHECKING:
    from torch import Tensor


@register("released-logits")
@dataclass(frozen=True)
class ReleasedLogits(LogitsObjective):
    """Instead of `LogitsDistillation`: one assignment of all predictions, with class and box, divided by the matched queries."""

    teacher: str = "teacher"
    positive_class: bool = True
    positive_box: bool = True
    stages: StageChoice = "progressive"  # group: all teacher stages that cover the same part of the decoder, their mean
    weights: Weights = Weights(1.0, 5.0, 2.0)
    weight: float = 1.0  # lambda_1

    def slots(self, pairs: StagePairs, context: StepContext) -> dict[str, Slots]:
        images, queries, _ = pairs.scores.shape
        every = torch.arange(queries, device=pairs.scores.device).expand(images, -1)
        return {"positive": Slots(every, torch.ones_like(every, dtype=torch.bool))}

    def normalisers(self, pairs: StagePairs, context: StepContext) -> dict[str, float]:
        """As many as there are queries on both sides."""
        return {"positive": float(context.batch.global_totals.images * min(pairs.logits.shape[1], pairs.scores.shape[1]))}

    def learned_boxes(self, boxes: Tensor) -> Tensor:
        return to_cxcywh(to_xyxy(boxes).clamp(0, 1))
