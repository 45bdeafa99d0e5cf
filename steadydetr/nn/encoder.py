"""Deformable encoder over the tokens of all levels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from steadydetr.nn.deformable_attention import DeformableAttention
from steadydetr.nn.layers import FeedForward

Levels = tuple[tuple[int, int], ...]


class EncoderLayer(nn.Module):
    def __init__(self, dim: int, heads: int, levels: int, points: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.attention = DeformableAttention(dim, heads, levels, points)
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.ffn = FeedForward(dim, hidden, dropout)

    def forward(self, tokens: Tensor, position: Tensor, reference: Tensor, padding: Tensor, levels: Levels) -> Tensor:
        value = self.attention.project(tokens, padding)
        attended = self.attention(tokens + position, reference, False, value, levels)
        return self.ffn(self.norm(tokens + self.dropout(attended)))


class Encoder(nn.Module):
    def __init__(self, layer: Callable[[], EncoderLayer], depth: int, checkpointing: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(depth))
        self.checkpointing = checkpointing

    def forward(self, tokens: Tensor, position: Tensor, padding: Tensor, valid_ratios: Tensor, levels: Levels) -> Tensor:
        """Tokens [B, L, D], their position [B, L, D], padding [B, L] -> [B, L, D]."""
        reference = token_centres(levels, valid_ratios)
        for layer in self.layers:
            if self.checkpointing and self.training:
                tokens = checkpoint(layer, tokens, position, reference, padding, levels, use_reentrant=False)
            else:
                tokens = layer(tokens, position, reference, padding, levels)
        return tokens


def token_centres(levels: Levels, valid_ratios: Tensor) -> Tensor:
    """The centre of every token, seen from every level: [B, L, levels, 4] with width and height 0 (reference-facts 5)."""
    centres = []
    for level, (height, width) in enumerate(levels):
        y, x = torch.meshgrid(
            torch.arange(height, device=valid_ratios.device, dtype=valid_ratios.dtype) + 0.5,
            torch.arange(width, device=valid_ratios.device, dtype=valid_ratios.dtype) + 0.5,
            indexing="ij",
        )
        size = torch.tensor((width, height), device=valid_ratios.device, dtype=valid_ratios.dtype)
        centres.append(torch.stack((x, y), -1).flatten(0, 1) / (valid_ratios[:, level, None] * size))
    placed = torch.cat(centres, dim=1)[:, :, None] * valid_ratios[:, None]
    return torch.cat((placed, torch.zeros_like(placed)), -1)
