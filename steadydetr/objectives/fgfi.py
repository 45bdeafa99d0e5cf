"""FGFI, which imitates the teacher near objects.

Legend: B images, L tokens of a level. Terms are [1], summed over the images of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from steadydetr.boxes import iou_giou, to_xyxy
from steadydetr.equations.distill import imitated
from steadydetr.kinds import register
from steadydetr.lazy import nn
from steadydetr.learning.context import StepContext
from steadydetr.nn.anchors import token_anchors
from steadydetr.objectives.feature_levels import Level
from steadydetr.objectives.level_distillation import LevelDistillation

if TYPE_CHECKING:
    from torch import Tensor


@register("fgfi")
@dataclass(frozen=True)
class FGFI(LevelDistillation):
    """Fine-grained feature imitation (Wang et al. 2019): only near objects, as the overlaps of anchors tell.

    DETRs have no anchors. The boxes that encoders add their proposals to (Deformable DETR A.4) are used instead: one a token, at fixed
    places, which need no detector with proposals.  # D-50
    """

    weight: float = 0.01
    threshold: float = 0.5  # of the best anchor's overlap, psi

    @property
    def name(self) -> str:
        return "fgfi"

    def module(self, student: int, teacher: int, stride: int) -> nn.Module:
        return nn.Conv2d(student, teacher, 3, padding=1)

    def terms(self, module: nn.Module, level: Level, context: StepContext) -> dict[str, tuple[Tensor, float]]:
        near = self.near(level, context)
        adapted = module(level.as_map(level.student)).flatten(2).transpose(1, 2)
        error = (adapted - level.teacher).square().sum(-1)
        value = (error * near).sum(1) / (2 * near.sum(1)).clamp(min=1)
        return {"imitated": (value.sum().reshape(1), self.weight)}

    def near(self, level: Level, context: StepContext) -> Tensor:
        """The cells that are learned, [B, L] bool."""
        part = slice(level.start, level.start + level.padding.shape[1])
        anchors, usable = (values[:, part] for values in token_anchors(context.memory))
        targets = context.targets
        iou, _ = iou_giou(to_xyxy(anchors)[targets.image], to_xyxy(targets.boxes.to(anchors.dtype))[:, None])
        return imitated(iou * usable[targets.image], targets.image, len(anchors), self.threshold)
