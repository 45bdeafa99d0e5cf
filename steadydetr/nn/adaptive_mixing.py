"""How a query of AdaMixer reads the image: places in the pyramid of maps, and layers made by the query for what was sampled there.

Legend: G groups of channels, P places that each group of a query samples, P' points after mixing, C = D / G channels of a group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from steadydetr.equations.adamixer import adaptive_mixing, level_weights, sample_places
from steadydetr.nn.deformable_attention import sample_values
from steadydetr.structures import Levels


class PlaceSampling(nn.Module):
    """Every group of a query samples `points` places around the query's box, at any height between the maps (AdaMixer 3.2)."""

    def __init__(self, dim: int, groups: int, points: int) -> None:
        super().__init__()
        self.groups, self.points = groups, points
        self.sampling_offsets = nn.Linear(dim, groups * points * 3)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Places spread over the box, on a grid where their number is a square, else at random; in maps of half the box's size."""
        side = math.isqrt(self.points)
        bias = torch.empty(self.groups, self.points, 3)
        nn.init.uniform_(bias, -0.5, 0.5)
        if side**2 == self.points:
            ticks = (torch.arange(side) + 0.5) / side - 0.5
            bias[..., :2] = torch.cartesian_prod(ticks, ticks)
        bias[..., 2] = -1.0
        nn.init.zeros_(self.sampling_offsets.weight)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(bias.flatten())

    def sampling_points(self, content: Tensor, xyzr: Tensor, levels: Levels, strides: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Where each query samples, (x, y) in 0..1 of every map, [B, N, G, levels, P, 2], and what the map counts there, without the 2."""
        offsets = self.sampling_offsets(content)
        offsets = offsets.to(torch.promote_types(offsets.dtype, xyzr.dtype)).unflatten(-1, (self.groups, self.points, 3))
        places = sample_places(xyzr, offsets)
        extents = places.new_tensor([(w * stride, h * stride) for (h, w), stride in zip(levels, strides, strict=True)])
        return places[:, :, :, None, :, :2] / extents[:, None], level_weights(places[..., 2], strides).transpose(-1, -2)

    def forward(self, content: Tensor, xyzr: Tensor, tokens: Tensor, levels: Levels, strides: Sequence[int]) -> Tensor:
        """Content [B, N, D], boxes [B, N, 4] and tokens [B, L, D] -> [B, N, G, P, C]. A place is sampled as a query of its own."""
        locations, weights = self.sampling_points(content, xyzr, levels, strides)
        by_place = locations.permute(0, 1, 4, 2, 3, 5).flatten(1, 2), weights.permute(0, 1, 4, 2, 3).flatten(1, 2)
        value = tokens.unflatten(-1, (self.groups, -1))
        sampled = sample_values(value, levels, by_place[0].unsqueeze(-2), by_place[1].unsqueeze(-1))
        return sampled.unflatten(1, (-1, self.points)).unflatten(-1, (self.groups, -1)).transpose(2, 3)


class AdaptiveMixing(nn.Module):
    """Each query makes a layer for the channels and one for the points of what it sampled (AdaMixer 3.3)."""

    def __init__(self, dim: int, groups: int, in_points: int, out_points: int) -> None:
        super().__init__()
        self.groups, self.channels, self.in_points, self.out_points = groups, dim // groups, in_points, out_points
        self.generator = nn.Linear(dim, groups * (self.channels**2 + in_points * out_points))
        self.output = nn.Linear(groups * out_points * self.channels, dim)

    def forward(self, sampled: Tensor, content: Tensor) -> Tensor:
        """[B, N, G, P, C] and [B, N, D] -> [B, N, D]."""
        weights = self.generator(content).unflatten(-1, (self.groups, -1))
        channels, points = weights.split((self.channels**2, self.in_points * self.out_points), -1)
        channels, points = channels.unflatten(-1, (self.channels, -1)), points.unflatten(-1, (self.out_points, -1))
        return self.output(adaptive_mixing(sampled, channels, points).flatten(2))
