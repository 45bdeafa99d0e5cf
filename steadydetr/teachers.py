"""Teachers: detectors that a student learns from, and what they say of a batch."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from steadydetr.structures import Memory, Queries, Solved, Stages

Model = TypeVar("Model", bound=nn.Module)
HORIZON = 0.028  # of a run, in steps: what decay 0.9996 is of OD-DETR's 12 epochs (2,500 of 89,000)
Twins = Literal["token", "rank"]


class Average(nn.Module, Generic[Model]):
    """Exponential moving average of a detector's parameters and floating buffers; other buffers are copied.

    Always in evaluation mode and without gradients, whatever `train()` is asked.
    """

    def __init__(self, model: Model, decay: float) -> None:
        super().__init__()
        self.model: Model = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay = decay

    def train(self, mode: bool = True) -> Average[Model]:
        return super().train(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """After the optimiser's step: average <- decay * average + (1 - decay) * model."""
        mine, theirs = self.model.state_dict(), model.state_dict()
        floating = [name for name, tensor in mine.items() if tensor.is_floating_point()]
        torch._foreach_lerp_([mine[name] for name in floating], [theirs[name] for name in floating], 1 - self.decay)
        for name in mine.keys() - set(floating):
            mine[name].copy_(theirs[name])


@dataclass(frozen=True)
class EMATeacher:
    """The average of the student's weights as its teacher (OD-DETR)."""

    decay: float | None = None  # 0.9996 in the paper; None: a horizon of 2.8% of the run's steps  # D-31
    stop_update: bool = True  # frozen from the first drop of the learning rate; no drop, no stop  # D-32

    @property
    def name(self) -> str:
        return "ema"

    def decay_for(self, total_steps: int | None) -> float:
        """The decay of a run of so many steps; None: of unknown length."""
        if self.decay is not None:
            return self.decay
        return 0.9996 if total_steps is None else max(1 - 1 / (HORIZON * total_steps), 0.0)


@dataclass(frozen=True)
class Lesson:
    """What a teacher says of a batch, without gradients; its match with the targets is in folded indices."""

    memory: Memory
    queries: Queries
    stages: Stages
    solved: Solved

    def twins(self, student: Queries, by: Twins) -> Tensor:
        """[B, N] the student's query that is the twin of each of the teacher's, -1: none.

        Queries of two-stage detectors are twins by the encoder token that they come from, or by rank; learned ones by number (D-28).
        """
        images, mine = self.queries.content.shape[:2]
        theirs = student.content.shape[1]
        device = self.queries.content.device
        if by == "rank" or student.token is None or self.queries.token is None:
            number = torch.arange(mine, device=device)
            return torch.where(number < theirs, number, -1).expand(images, -1)
        place = torch.full(self.memory.tokens.shape[:2], -1, device=device)
        place.scatter_(1, student.token, torch.arange(theirs, device=device).expand(images, -1))
        return place.gather(1, self.queries.token)
