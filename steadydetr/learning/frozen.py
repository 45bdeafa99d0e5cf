"""Models that teach: frozen, or the average of the student."""

from __future__ import annotations

import copy
import hashlib
from typing import Generic, TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


class Frozen(nn.Module, Generic[Model]):
    """A model that is always in evaluation mode and without gradients, even when the method around it is set to training mode."""

    def __init__(self, model: Model, fingerprint: str = "") -> None:
        super().__init__()
        self.model: Model = model.requires_grad_(False).eval()
        self.fingerprint = fingerprint  # a hash of its weights, "" where they change

    def train(self, mode: bool = True) -> Frozen[Model]:
        return super().train(False)


class Average(Frozen[Model]):
    """Exponential moving average of a detector's parameters and floating buffers; other buffers are copied."""

    def __init__(self, model: Model, decay: float) -> None:
        super().__init__(copy.deepcopy(model))
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """After the optimiser's step: average <- decay * average + (1 - decay) * model."""
        mine, theirs = self.model.state_dict(), model.state_dict()
        floating = [name for name, tensor in mine.items() if tensor.is_floating_point()]
        torch._foreach_lerp_([mine[name] for name in floating], [theirs[name] for name in floating], 1 - self.decay)
        for name in mine.keys() - set(floating):
            mine[name].copy_(theirs[name])


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of a model's weights, by which a resumed run checks that its teacher is the same."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
