"""Averages of a detector in training."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


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
