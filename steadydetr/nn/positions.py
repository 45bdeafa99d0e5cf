"""Sine position embeddings of feature maps and boxes."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def feature_position(
    padding: Tensor, dim: int, temperature: float = 10000.0, offset: float = 0.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Sine embedding of a level's padding mask [B, h, w] -> [B, h, w, dim]; y half first (DETR; F-07)."""
    inside = (~padding).to(torch.float32)
    y, x = inside.cumsum(1), inside.cumsum(2)
    y = (y + offset) / (y[:, -1:, :] + 1e-6)
    x = (x + offset) / (x[:, :, -1:] + 1e-6)
    return box_position(torch.stack((y, x), -1), dim // 2, temperature).to(dtype)


def box_position(coordinates: Tensor, features: int, temperature: float = 10000.0) -> Tensor:
    """Sine embedding of coordinates in 0..1, [..., n] -> [..., n * features], sines and cosines interleaved."""
    index = torch.arange(features, dtype=torch.float32, device=coordinates.device)
    frequency = temperature ** (2 * torch.div(index, 2, rounding_mode="floor") / features)
    angle = (coordinates * (2 * math.pi))[..., None] / frequency
    return torch.stack((angle[..., 0::2].sin(), angle[..., 1::2].cos()), -1).flatten(-3)


def xyzr_position(xyzr: Tensor, width: int) -> Tensor:
    """Position vectors [..., width] of AdaMixer's boxes: sines and cosines of x / 1000, y / 1000, z and r, a quarter of them each."""
    scale = torch.tensor([1000.0, 1000.0, 1.0, 1.0], dtype=xyzr.dtype, device=xyzr.device) * (2 * math.pi)
    return box_position(xyzr / scale, width // 4)
