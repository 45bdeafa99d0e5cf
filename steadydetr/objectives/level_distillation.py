"""Feature distillation level by level, as detectors with convolutions do it and DETRDistill is compared with (its Tables 1 and 3).

FGD, MGD, FKD and FGFI compare the levels that student and teacher share with trained modules for every level, sum over levels and
divide by the images of the step. Padding is left out everywhere.  # D-49

Legend: B images, L tokens of a level and d channels of the teacher. Terms are [1], summed over the images of the batch.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from steadydetr.lazy import nn, torch
from steadydetr.learning.context import StepContext
from steadydetr.objectives.base import Matched, Objective, Predicted
from steadydetr.objectives.feature_levels import FeatureSource, Level, check_levels, common_strides, shared_levels
from steadydetr.structures import Losses, without_autocast

if TYPE_CHECKING:
    from torch import Tensor

    from steadydetr.detectors.base import Detector


@dataclass(frozen=True)
class LevelDistillation(Objective):
    """Has a trained module for every level that student and teacher share; its terms are summed over levels."""

    teacher: str = "teacher"
    source: FeatureSource = "encoder"

    def check(self, student: Detector, teachers: Mapping[str, Detector]) -> None:
        check_levels(self.name, self.teacher, student, teachers)

    def prepare(self, student: Detector, teachers: Mapping[str, Detector]) -> nn.Module:
        teacher = teachers[self.teacher]
        return nn.ModuleList(self.module(student.width, teacher.width, stride) for stride in common_strides(student, teacher))

    @abstractmethod
    def module(self, student: int, teacher: int, stride: int) -> nn.Module:
        """The module that is trained for one level, for a student and a teacher with so many channels."""

    @abstractmethod
    def terms(self, module: nn.Module, level: Level, context: StepContext) -> dict[str, tuple[Tensor, float]]:
        """The terms of one level with their weights, by name; `module` is what `self.module` made for it."""

    def add_losses(self, losses: Losses, context: StepContext, stages: Predicted, matched: Matched) -> None:
        levels = shared_levels(context, self.name, self.teacher, self.source, losses)
        modules = cast(nn.ModuleList, context.adapters[self.name])
        with without_autocast(context.memory.tokens):
            found = [self.terms(module, level, context) for module, level in zip(modules, levels, strict=True)]
        for part, (_, weight) in found[0].items():
            total = torch.stack([terms[part][0] for terms in found]).sum(0)
            losses.add(f"{self.name}/{part}", total / context.batch.global_totals.images, weight)


def square_sum(values: Tensor, padding: Tensor) -> Tensor:
    """The sum of squares over all valid tokens: [B, L, d] -> [1]."""
    return values.masked_fill(padding[..., None], 0).square().sum().reshape(1)
