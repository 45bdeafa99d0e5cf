"""Small shared modules: feed-forward block, multi-layer perceptron, the neck that brings backbone maps to one width."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn


class FeedForward(nn.Module):
    """Residual two-layer block with post-normalisation. [..., D] -> [..., D]."""

    def __init__(self, dim: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim, hidden)
        self.linear2 = nn.Linear(hidden, dim)
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x))))))


class MLP(nn.Module):
    """`depth` linear layers with ReLU between them."""

    def __init__(self, inputs: int, hidden: int, outputs: int, depth: int) -> None:
        super().__init__()
        widths = [inputs, *[hidden] * (depth - 1), outputs]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    @property
    def output(self) -> nn.Linear:
        """The last layer."""
        return cast(nn.Linear, self.layers[-1])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


def box_head(dim: int) -> MLP:
    """Three layers to four box deltas; the last one starts at zero, so that a box starts at its reference."""
    head = MLP(dim, dim, 4, 3)
    nn.init.zeros_(head.output.weight)
    nn.init.zeros_(head.output.bias)
    return head


def class_head(dim: int, num_classes: int, prior: float = 0.01) -> nn.Linear:
    """Linear with the bias at which every score starts as `prior` (RetinaNet 4.1)."""
    head = nn.Linear(dim, num_classes)
    nn.init.constant_(head.bias, -math.log((1 - prior) / prior))
    return head


def keep_outputs(head: nn.Linear, rows: Sequence[int]) -> None:
    """From here on the layer gives these of its outputs alone, in this order."""
    kept = list(rows)
    head.weight, head.bias = nn.Parameter(head.weight[kept].detach()), nn.Parameter(head.bias[kept].detach())
    head.out_features = len(kept)


class Neck(nn.Module):
    """Backbone maps to one width: 1x1 convolution and GroupNorm each; further levels by 3x3 convolutions of stride 2.

    The first extra level sees the raw last backbone map, later ones the level before (F-02, F-03). With `shared_norm` all levels have
    one GroupNorm (AdaMixer).
    """

    def __init__(self, channels: list[int], dim: int, levels: int, groups: int = 32, bias: bool = True, shared_norm: bool = False) -> None:
        super().__init__()
        if levels < len(channels):
            raise ValueError(f"levels = {levels}, but the backbone gives {len(channels)} maps: raise levels or take fewer out_indices")
        maps = [nn.Conv2d(c, dim, 1, bias=bias) for c in channels]
        extra = [nn.Conv2d(channels[-1] if i == 0 else dim, dim, 3, 2, 1, bias=bias) for i in range(levels - len(channels))]
        self.convs = nn.ModuleList([*maps, *extra])
        self.norm = nn.GroupNorm(groups, dim) if shared_norm else None
        self.norms = nn.ModuleList(nn.GroupNorm(groups, dim) for _ in self.convs) if self.norm is None else None
        for conv in (*maps, *extra):
            nn.init.xavier_uniform_(conv.weight)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        levels: list[Tensor] = []
        for i, conv in enumerate(self.convs):
            source = maps[i] if i < len(maps) else maps[-1] if i == len(maps) else levels[-1]
            norm = self.norm if self.norms is None else self.norms[i]
            levels.append(cast(nn.Module, norm)(conv(source)))
        return levels
