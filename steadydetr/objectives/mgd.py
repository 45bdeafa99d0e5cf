"""MGD, which generates the teacher's map from parts of the student's.

Legend: B images, L tokens of a level, d channels of the teacher. Terms are [1], summed over the images of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from steadydetr.kinds import register
from steadydetr.lazy import nn, torch
from steadydetr.learning.context import StepContext
from steadydetr.objectives.feature_levels import Level
from steadydetr.objectives.level_distillation import LevelDistillation, square_sum
from steadydetr.structures import Batch, seed_of

if TYPE_CHECKING:
    from torch import Tensor


@register("mgd")
@dataclass(frozen=True)
class MGD(LevelDistillation):
    """Masked generative distillation (Yang et al. 2022): the teacher's map is generated from the student's, parts of which are left out."""

    weight: float = 2e-5  # alpha, of its detectors
    masked: float = 0.65  # share of the tokens that are left out, lambda

    @property
    def name(self) -> str:
        return "mgd"

    def module(self, student: int, teacher: int, stride: int) -> nn.Module:
        from steadydetr.objectives.adapters import Generator

        return Generator(student, teacher)

    def terms(self, module: nn.Module, level: Level, context: StepContext) -> dict[str, tuple[Tensor, float]]:
        kept = (random_by_token(context.batch, level) <= 1 - self.masked).to(level.student)
        return {"generated": (square_sum(module(level, kept) - level.teacher, level.padding), self.weight)}


def random_by_token(batch: Batch, level: Level) -> Tensor:
    """A random number in 0..1 for every token, [B, L]: a function of seed, step, image and level, however images are dealt to ranks."""
    numbers = []
    for image_id in batch.image_ids:
        generator = torch.Generator().manual_seed(seed_of(batch.seed, batch.step, image_id, level.start))
        numbers.append(torch.rand(level.padding.shape[1], generator=generator))
    return torch.stack(numbers).to(level.padding.device, non_blocking=True)
