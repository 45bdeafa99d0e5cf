"""FKD, which compares features, attention, and how cells relate to each other.

Legend: B images, L tokens of a level, d channels of the teacher, n cells of a pooled map.
Terms are [1], summed over the images of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from steadydetr.equations.distill import channel_attention, channel_weights, spatial_attention, spatial_weights
from steadydetr.kinds import register
from steadydetr.lazy import nn, torch
from steadydetr.learning.context import StepContext
from steadydetr.objectives.feature_levels import Level
from steadydetr.objectives.level_distillation import LevelDistillation

if TYPE_CHECKING:
    from torch import Tensor

COARSEST = 64  # FKD pools its maps to this stride, because its non-local block relates every cell to every other


@register("fkd")
@dataclass(frozen=True)
class FKD(LevelDistillation):
    """Attention-guided and non-local distillation (Zhang and Ma 2021). Weights and temperature: those for two-stage detectors."""

    feature: float = 7e-5
    attention: float = 4e-3
    relation: float = 7e-5
    temperature: float = 0.1

    @property
    def name(self) -> str:
        return "fkd"

    def module(self, student: int, teacher: int, stride: int) -> nn.Module:
        from steadydetr.objectives.adapters import NonLocalBlock, align

        pool = max(COARSEST // stride, 1)
        return nn.ModuleDict(
            {
                "align": align(student, teacher),
                "student": NonLocalBlock(teacher, pool),
                "teacher": NonLocalBlock(teacher, pool),
                "relation": nn.Linear(teacher, teacher),
            }
        )

    def terms(self, module: nn.Module, level: Level, context: StepContext) -> dict[str, tuple[Tensor, float]]:
        parts = cast(nn.ModuleDict, module)
        student, teacher, padding = parts["align"](level.student), level.teacher, level.padding
        difference = (teacher - student).masked_fill(padding[..., None], 0)
        spatial_s, spatial_t = (spatial_attention(features).masked_fill(padding, 0) for features in (student, teacher))
        channel_s, channel_t = (channel_attention(features, padding) for features in (student, teacher))
        with torch.no_grad():
            spatial = spatial_weights(spatial_s + spatial_t, padding, self.temperature)
            channel = channel_weights(channel_s + channel_t, self.temperature)
            focus = (spatial[..., None] * channel[:, None]).sqrt()
        cells, empty = parts["student"](student, level)
        relation = (parts["relation"](cells) - parts["teacher"](teacher, level)[0]).masked_fill(empty, 0)
        return {
            "feature": (norms(difference * focus), self.feature),
            "attention": (norms(spatial_s - spatial_t) + norms(channel_s - channel_t), self.attention),
            "relation": (norms(relation), self.relation),
        }


def norms(values: Tensor) -> Tensor:
    """The norms of every image's values, summed: [B, ...] -> [1]."""
    return torch.linalg.vector_norm(values.flatten(1), dim=1).sum().reshape(1)
