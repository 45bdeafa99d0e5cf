"""An objective: class scores that cannot decide are punished."""

from __future__ import annotations

from dataclasses import dataclass

from steadydetr import register
from steadydetr.learning.context import StepContext
from steadydetr.objectives import Matched, Objective, Predicted
from steadydetr.structures import Losses


@register("entropy")
@dataclass(frozen=True)
class Entropy(Objective):
    """The mean entropy of the class scores of the main queries."""

    weight: float = 0.1

    @property
    def name(self) -> str:
        return "entropy"

    def add_losses(self, losses: Losses, context: StepContext, stages: Predicted, matched: Matched) -> None:
        score = stages["main"].logits.float().sigmoid()  # [S, B, N, C]
        entropy = -(score * score.clamp(min=1e-6).log()).mean((2, 3))
        losses.add("entropy/scores", entropy.sum(1) / context.batch.global_totals.images, self.weight)
