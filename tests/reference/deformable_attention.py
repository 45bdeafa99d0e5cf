"""Slow, obvious counterparts of deformable sampling: one number at a time, and PyTorch's own `grid_sample` level by level."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Levels = tuple[tuple[int, int], ...]


def bilinear(image: Sequence[Sequence[float]], x: float, y: float) -> float:
    """The value at (x, y) in 0..1; pixel (0, 0) has its centre at (0.5 / width, 0.5 / height); zero outside."""
    height, width = len(image), len(image[0])
    column, line = x * width - 0.5, y * height - 0.5
    left, top = math.floor(column), math.floor(line)
    total = 0.0
    for i, j in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
        if 0 <= i < height and 0 <= j < width:
            total += (1 - abs(line - i)) * (1 - abs(column - j)) * image[i][j]
    return total


def sample_values(value: Tensor, levels: Levels, locations: Tensor, weights: Tensor) -> Tensor:
    """As `steadydetr.nn.deformable_attention.sample_values`, by six loops."""
    images, _, heads, dim = value.shape
    maps = [part.unflatten(1, size) for part, size in zip(value.split([h * w for h, w in levels], 1), levels, strict=True)]
    output = torch.zeros(images, locations.shape[1], heads, dim, dtype=value.dtype)
    for b, n, h, d in torch.cartesian_prod(*(torch.arange(k) for k in output.shape)).tolist():
        total = 0.0
        for level, image in enumerate(maps):
            channel = image[b, :, :, h, d].tolist()
            for (x, y), weight in zip(locations[b, n, h, level].tolist(), weights[b, n, h, level].tolist(), strict=True):
                total += weight * bilinear(channel, x, y)
        output[b, n, h, d] = total
    return output.flatten(2)


def sample_values_by_grid(value: Tensor, levels: Levels, locations: Tensor, weights: Tensor) -> Tensor:
    """The same by `grid_sample`, as the PyTorch fallback of Deformable DETR does it; autograd gives its gradients."""
    images, _, heads, dim = value.shape
    grids = (2 * locations - 1).permute(0, 2, 1, 3, 4, 5).flatten(0, 1)
    counts = weights.permute(0, 2, 1, 3, 4).flatten(0, 1)
    total = value.new_zeros(images * heads, dim, locations.shape[1])
    for level, part in enumerate(value.split([h * w for h, w in levels], dim=1)):
        maps = part.permute(0, 2, 3, 1).reshape(images * heads, dim, *levels[level])
        sampled = F.grid_sample(maps, grids[:, :, level], align_corners=False)
        total = total + (sampled * counts[:, None, :, level]).sum(-1)
    return total.view(images, heads * dim, -1).transpose(1, 2)
