"""FGD, which weights foreground, background and attention apart, and compares contexts of whole maps.

Legend: B images, L tokens of a level, d channels of the teacher, G objects. Terms are [1], summed over the images of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from steadydetr.boxes import to_xyxy
from steadydetr.equations.distill import background, channel_attention, channel_weights, foreground, spatial_attention, spatial_weights
from steadydetr.kinds import register
from steadydetr.lazy import nn
from steadydetr.learning.context import StepContext
from steadydetr.objectives.feature_levels import Level
from steadydetr.objectives.level_distillation import LevelDistillation, square_sum
from steadydetr.structures import Targets

if TYPE_CHECKING:
    from torch import Tensor


@register("fgd")
@dataclass(frozen=True)
class FGD(LevelDistillation):
    """Focal and global distillation (Yang et al. 2022). Weights: those for anchor-based one-stage detectors, as in DETRDistill's code."""

    foreground: float = 1e-3  # alpha
    background: float = 5e-4  # beta
    attention: float = 5e-4  # gamma
    context: float = 5e-6  # lambda
    temperature: float = 0.5
    focal: bool = True  # squared differences are weighted by the teacher's attention

    @property
    def name(self) -> str:
        return "fgd"

    def module(self, student: int, teacher: int, stride: int) -> nn.Module:
        from steadydetr.objectives.adapters import ContextBlock, align

        return nn.ModuleDict({"align": align(student, teacher), "student": ContextBlock(teacher), "teacher": ContextBlock(teacher)})

    def terms(self, module: nn.Module, level: Level, context: StepContext) -> dict[str, tuple[Tensor, float]]:
        parts = cast(nn.ModuleDict, module)
        student, teacher, padding = parts["align"](level.student), level.teacher, level.padding
        boxes = boxes_in_cells(context.targets, level).to(teacher.dtype)
        covered = foreground(boxes, context.targets.image, len(teacher), level.size)
        spatial, channel = self._attention(teacher, padding)
        spatial_s, channel_s = self._attention(student, padding)
        error = (teacher - student).masked_fill(padding[..., None], 0).square()
        error = (error * channel[:, None]).sum(-1) * spatial if self.focal else error.sum(-1)
        attention = (channel_s - channel).abs().sum() + (spatial_s - spatial).abs().sum()
        global_context = parts["student"](student, padding) - parts["teacher"](teacher, padding)
        return {
            "foreground": ((error * covered).sum().reshape(1), self.foreground),
            "background": ((error * background(covered, padding)).sum().reshape(1), self.background),
            "attention": (attention.reshape(1), self.attention),
            "context": (square_sum(global_context, padding), self.context),
        }

    def _attention(self, features: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        """The attention of tokens [B, L] and of channels [B, d]."""
        spatial = spatial_weights(spatial_attention(features), padding, self.temperature)
        return spatial, channel_weights(channel_attention(features, padding), self.temperature)


def boxes_in_cells(targets: Targets, level: Level) -> Tensor:
    """The targets' boxes in cells of the level, [G, 4] xyxy."""
    return to_xyxy(targets.boxes) * level.extent[targets.image].repeat(1, 2).to(targets.boxes)
