"""How the parts of a transformer start."""

from __future__ import annotations

from torch import nn

from steadydetr.nn.attention import SelfAttention
from steadydetr.nn.deformable_attention import DeformableAttention


def initialise(module: nn.Module) -> None:
    """xavier_uniform on every weight matrix of a transformer part, except that attention keeps its own rules (F-12, F-27)."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
    for part in module.modules():
        if isinstance(part, DeformableAttention):
            part.reset_parameters()
        elif isinstance(part, SelfAttention):
            nn.init.xavier_uniform_(part.in_proj_weight)
