"""MGD, which generates the teacher's map from parts of the student's.

Legend: B images, L tokens of a level, d channels of the teacher. Terms are [1], summed over the images of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from steadydetr.kinds import register
from steadydetr.learning.context import StepContext
from steadydetr.objectives.feature_levels import Level
from steadydetr.objectives.level_distillation import LevelDistillation, align, square_sum
from steadydetr.structures import Batch, seed_of


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
        return Generator(student, teacher)

    def terms(self, module: nn.Module, level: Level, context: StepContext) -> dict[str, tuple[Tensor, float]]:
        kept = (random_by_token(context.batch, level) <= 1 - self.masked).to(level.student)
        return {"generated": (square_sum(module(level, kept) - level.teacher, level.padding), self.weight)}


class Generator(nn.Module):
    """Two convolutions that fill in what is left out of a map."""

    def __init__(self, student: int, teacher: int) -> None:
        super().__init__()
        self.align = align(student, teacher)
        self.first, self.second = (nn.Conv2d(teacher, teacher, 3, padding=1) for _ in range(2))

    def forward(self, level: Level, kept: Tensor) -> Tensor:
        """`kept`: [B, L], 0 where the student's token is left out -> [B, L, d]."""
        padding = level.padding.unflatten(1, level.size)[:, None]
        seen = level.as_map(self.align(level.student) * kept[..., None]).masked_fill(padding, 0)
        return self.second(self.first(seen).relu().masked_fill(padding, 0)).flatten(2).transpose(1, 2)


def random_by_token(batch: Batch, level: Level) -> Tensor:
    """A random number in 0..1 for every token, [B, L]: a function of seed, step, image and level, however images are dealt to ranks."""
    numbers = []
    for image_id in batch.image_ids:
        generator = torch.Generator().manual_seed(seed_of(batch.seed, batch.step, image_id, level.start))
        numbers.append(torch.rand(level.padding.shape[1], generator=generator))
    return torch.stack(numbers).to(level.padding.device, non_blocking=True)
