"""Multi-scale deformable attention in pure PyTorch (Zhu et al. 2021, Eq. 3)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Levels = tuple[tuple[int, int], ...]


def sample_values(value: Tensor, levels: Levels, locations: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of bilinearly sampled values.

    value [B, L, H, d], locations [B, N, H, levels, P, 2] in 0..1, weights [B, N, H, levels, P] -> [B, N, H * d].
    """
    images, _, heads, dim = value.shape
    count, points = locations.shape[1], locations.shape[4]
    grids = (2 * locations - 1).permute(0, 2, 1, 3, 4, 5).flatten(0, 1)
    flat_weights = weights.permute(0, 2, 1, 3, 4).flatten(0, 1)
    total = value.new_zeros(images * heads, dim, count)
    for level, part in enumerate(value.split([h * w for h, w in levels], dim=1)):
        maps = part.permute(0, 2, 3, 1).reshape(images * heads, dim, *levels[level])
        sampled = F.grid_sample(maps, grids[:, :, level].to(maps.dtype), align_corners=False)
        total = total + (sampled * flat_weights[:, None, :, level]).sum(-1)
    return total.view(images, heads * dim, count).transpose(1, 2)


class DeformableAttention(nn.Module):
    def __init__(self, dim: int, heads: int, levels: int, points: int) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = nn.Linear(dim, heads * levels * points * 2)
        self.attention_weights = nn.Linear(dim, heads * levels * points)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.sampling_offsets.weight)
        angle = torch.arange(self.heads) * (2 * math.pi / self.heads)
        direction = torch.stack((angle.cos(), angle.sin()), -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.points + 1)
        bias = direction[:, None, None] * steps[None, None, :, None]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(bias.expand(-1, self.levels, -1, -1).flatten())
        for layer in (self.attention_weights,):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def project(self, tokens: Tensor, padding: Tensor) -> Tensor:
        return self.value_proj(tokens).masked_fill(padding[..., None], 0).unflatten(-1, (self.heads, -1))

    def sampling_points(self, query: Tensor, reference: Tensor, sized: bool | Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
        shape = (self.heads, self.levels, self.points)
        offsets = self.sampling_offsets(query).unflatten(-1, (*shape, 2))
        weights = self.attention_weights(query).unflatten(-1, (self.heads, -1)).softmax(-1).unflatten(-1, shape[1:])
        size = torch.tensor([(w, h) for h, w in levels], dtype=reference.dtype, device=reference.device)
        by_box = reference[:, :, None, :, None, 2:] * (0.5 / self.points)
        by_cell = (1 / size)[None, None, None, :, None]
        if isinstance(sized, bool):
            scale = by_box if sized else by_cell
        else:
            scale = torch.where(sized[:, None, None, None, None], by_box, by_cell)
        return reference[:, :, None, :, None, :2] + offsets * scale, weights

    def forward(self, query: Tensor, reference: Tensor, sized: bool | Tensor, value: Tensor, levels: Levels) -> Tensor:
        locations, weights = self.sampling_points(query, reference, sized, levels)
        return self.output_proj(sample_values(value, levels, locations, weights))
